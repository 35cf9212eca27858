// Packs rows of blocks, as in a file, into tiles while a weight is loaded; pack16: from the tiles of
// 16 rows of the cpu backend, for a weight that it computes with too.
// @kernel pack<{EVERY}>
// @kernel pack16<{LENT}>
//
// raw      whole tiles: their rows one after another, in pinned memory of the host, at a multiple of
//          16 bytes; pack16: whole tiles of 16 rows
// to       the planes of the weight, which are zero
// first    the first tile of `raw`, counted over all matrices; pack16: of 16 rows
// n_tiles  of `raw`
// ids      i32 [n_used, n_tokens]: other matrices than these are left out, and `raw` is the whole
//          weight; no data: none is
//
// A part of a block is 256 threads, which pack chunks: 32 groups of a tile. They copy the bytes of
// the 8 rows to shared memory with loads of 16 bytes, then each thread packs one group. Neighbouring
// threads have neighbouring rows, as in the planes, so stores are contiguous.
// Traffic: each byte of the file crosses the bus once; each byte of the planes is written once.
//
// Grid: as many blocks as there is work for, which use the whole device and take one chunk a part; or
// fewer, if other kernels run beside (loading.py). Then a part goes on to further chunks, and the
// bytes of the next are on their way while it packs one. 55 GB/s over a way of 2.5 us are 140 KB
// under way; 21 blocks have 390.
//
// The parts of a group are those that products take from rows of a file (raw.cuh), so packing needs
// no code for a type. Rows past the end of a matrix stay zero.
//
// In pack16 a chunk of a tile of 16 rows is contiguous, and each thread packs one group of two rows.
// Traffic: the host's tiles are 0 to 6 % larger than the file's blocks.
//
// Lost: to copy the rows to the device first and pack from there. The copy engine would leave all
// multiprocessors to what runs beside, where this takes 21 of 132; but a run reads weights ahead
// because the bus is slower than what it computes, and each piece would be two more launches, with
// memory on the device that every plan would have to count. One part a block: each block of a product
// that fills a multiprocessor would have to wait for one of four times as many. Also
// lost: tables of bit positions for a common permutation; types that compute codes (tq1_0, q3_K,
// nvfp4) would need a second way. Instead of pack16, the host could restore the file's rows while it
// copies them to pinned memory: then its cores and memory would work for every byte, where now they
// do nothing. The list of chosen matrices could come from a launch before; but few tokens have few ids,
// and each block reads them once. To look at all matrices and skip others: 2,000 rounds of each block,
// as long as the bus takes for the experts of a token.
#include "tiles16.cuh"

namespace tiles {

constexpr int PACKED_GROUPS = 32;  // per thread block; a multiple of the groups of any file's block

template <int BYTES>
__device__ __forceinline__ void store_small(const unsigned char* plane, int unit, unsigned value) {
    if constexpr (BYTES == 1) ((unsigned char*)plane)[unit] = value;
    if constexpr (BYTES == 2) ((unsigned short*)plane)[unit] = value;
    if constexpr (BYTES == 4) ((unsigned*)plane)[unit] = value;
}

template <class F, class Source>
__device__ __forceinline__ void store_group(const Row<F>& row, int group, const RawGroup<Source>& raw) {
    if constexpr (F::code_bytes == 4) ((unsigned*)row.codes)[group * 8] = raw.codes[0].x;
    if constexpr (F::code_bytes == 8)
        ((uint2*)row.codes)[group * 8] = make_uint2(raw.codes[0].x, raw.codes[0].y);
    for (int run = 0; run < F::code_runs; ++run)
        ((uint4*)row.codes)[(group * F::code_runs + run) * 8] = raw.codes[run];
    if constexpr (F::high == 2) store_small<2>(row.high, group * 8, raw.high.x);
    if constexpr (F::high == 4) ((unsigned*)row.high)[group * 8] = raw.high.x;
    if constexpr (F::high == 8) ((uint2*)row.high)[group * 8] = raw.high;
    store_small<F::scale_bytes>(row.scales, group * 8, raw.scale.own);
    if (group % F::block_groups == 0)
        store_small<F::super_bytes>(row.supers, group / F::block_groups * 8, raw.scale.shared);
}

// The matrices that some ids choose, in order, for all threads of a block.
struct Chosen {
    static constexpr int MOST = 1024;  // matrices
    struct Memory {
        unsigned flags[MOST / 4];  // a byte for each
        unsigned short list[MOST];
    };
    const Memory& memory;
    int count;  // -1: all matrices

    __device__ __forceinline__ Chosen(const Tensor& ids, int matrices, Memory& memory)
        : memory(memory), count(-1) {
        if (!ids.data) return;
        for (int i = threadIdx.x; i < MOST / 4; i += blockDim.x) memory.flags[i] = 0;
        __syncthreads();
        for (int i = threadIdx.x; i < ids.ne[0] * ids.ne[1]; i += blockDim.x) {
            const int id = *(const int*)(ids.data + i % ids.ne[0] * ids.nb[0] +
                                         i / ids.ne[0] * ids.nb[1]);
            if (id >= 0 && id < matrices) ((unsigned char*)memory.flags)[id] = 1;
        }
        __syncthreads();
        count = 0;
        for (int word = 0; word < MOST / 4; ++word) {
            const unsigned flags = memory.flags[word];
            if (flags && word % blockDim.x == threadIdx.x)
                for (int i = 0, at = count; i < 4; ++i)
                    if (flags >> 8 * i & 1) memory.list[at++] = 4 * word + i;
            count += __popc(flags);
        }
        __syncthreads();
    }
};

// A chunk of a tile of ROWS rows, by its number among those of `raw` or of the chosen matrices.
template <int ROWS>
struct Chunk {
    int matrix, tile, start, groups;  // the tile in its matrix; the first group, and how many
    long long before;                 // tiles of `raw` before this one
    bool exists;

    __device__ __forceinline__ Chunk(int number, const Packed& to, int first, int n_tiles,
                                     const Chosen& chosen) {
        const int chunks = (to.groups + PACKED_GROUPS - 1) / PACKED_GROUPS;
        const int per_matrix = (to.rows + ROWS - 1) / ROWS, place = first + number / chunks;
        start = number % chunks * PACKED_GROUPS, groups = min(PACKED_GROUPS, to.groups - start);
        matrix = place / per_matrix, tile = place % per_matrix;
        exists = number < n_tiles * chunks;
        if (chosen.count >= 0 && exists) matrix = chosen.memory.list[matrix];
        before = (long long)matrix * per_matrix + tile - first;
    }
};

// Chunks of PARTS parts of each block: `load` brings the bytes of a chunk to registers, `store` to
// shared memory, and `use` packs them.
template <int ROWS, int PARTS, int MOST, class Load, class Store, class Use>
__device__ __forceinline__ void each_chunk(const Packed& to, int first, int n_tiles, const Tensor& ids,
                                           Load load, Store store, Use use) {
    __shared__ Chosen::Memory memory;
    const int per_matrix = (to.rows + ROWS - 1) / ROWS;
    const Chosen chosen(ids, n_tiles / per_matrix, memory);
    if (chosen.count >= 0) n_tiles = chosen.count * per_matrix;
    const int chunks = (to.groups + PACKED_GROUPS - 1) / PACKED_GROUPS;
    const int part = threadIdx.x / 256, stride = gridDim.x * PARTS;
    uint4 words[MOST];
    Chunk<ROWS> chunk(blockIdx.x * PARTS + part, to, first, n_tiles, chosen);
    if (chunk.exists) load(chunk, words);
    for (int number = blockIdx.x * PARTS; number < n_tiles * chunks; number += stride) {
        if (chunk.exists) store(chunk, words);
        __syncthreads();
        const Chunk<ROWS> next(number + stride + part, to, first, n_tiles, chosen);
        if (next.exists) load(next, words);
        if (chunk.exists) use(chunk);
        __syncthreads();
        chunk = next;
    }
}

constexpr int PARTS = 4, PARTS16 = 2;  // of a block; static shared memory has 48 KB

template <class F>
__global__ void __launch_bounds__(256 * PARTS)
    pack(const unsigned char* raw, Packed to, int first, int n_tiles, Tensor ids) {
    constexpr int BLOCK = F::Blocks::BYTES, CHUNK = PACKED_GROUPS / F::block_groups * BLOCK;
    constexpr int WORDS = (CHUNK + 15) / 16 + 1;  // a chunk may start anywhere in a word
    constexpr int MOST = (8 * WORDS + 255) / 256;
    __shared__ uint4 shared[PARTS][8][WORDS];
    begin();
    uint4(*rows)[WORDS] = shared[threadIdx.x / 256];
    const int thread = threadIdx.x % 256, row_bytes = to.blocks * BLOCK;
    // `raw` begins with the first row of tile `first`.
    const long long skipped = (long long)(first / to.tiles) * to.rows + first % to.tiles * 8;
    auto row_of = [&](const Chunk<8>& c, int row) {
        const long long row0 = (long long)c.matrix * to.rows + c.tile * 8 - skipped;
        return raw + (row0 + row) * row_bytes + c.start / F::block_groups * BLOCK;
    };
    auto each_word = [&](const Chunk<8>& c, auto action) {
        const int n_rows = min(8, to.rows - c.tile * 8);
        const int size = c.groups / F::block_groups * BLOCK;
#pragma unroll
        for (int k = 0; k < MOST; ++k) {
            const int i = thread + 256 * k, row = i / WORDS, word = i % WORDS;
            if (row >= n_rows) continue;
            const unsigned char* from = row_of(c, row);
            const int offset = (unsigned long long)from % 16;
            if (word * 16 < offset + size) action(k, row, word, from - offset + word * 16);
        }
    };
    auto load = [&](const Chunk<8>& c, uint4* words) {
        each_word(c, [&](int k, int, int, const unsigned char* at) { words[k] = *(const uint4*)at; });
    };
    auto store = [&](const Chunk<8>& c, const uint4* words) {
        each_word(c, [&](int k, int row, int word, const unsigned char*) {
            rows[row][word] = words[k];
        });
    };
    auto use = [&](const Chunk<8>& c) {
        const int row = thread % 8, local = thread / 8;
        if (row >= to.rows - c.tile * 8 || local >= c.groups) return;
        Row<Raw<F>> from;
        from.blocks = (const unsigned char*)rows[row] + (unsigned long long)row_of(c, row) % 16;
        store_group<F>(Row<F>(to, c.matrix, c.tile, row), c.start + local, load_group(from, local));
    };
    each_chunk<8, PARTS, MOST>(to, first, n_tiles, ids, load, store, use);
}

template <class F>
__global__ void __launch_bounds__(256 * PARTS16)
    pack16(const unsigned char* raw, Packed to, int first, int n_tiles, Tensor ids) {
    using T = Tiles16<F>;
    constexpr int WORDS = T::bytes(PACKED_GROUPS) / 16, MOST = (WORDS + 255) / 256;
    __shared__ uint4 shared[PARTS16][WORDS];
    begin();
    uint4* bytes = shared[threadIdx.x / 256];
    const int thread = threadIdx.x % 256;
    auto load = [&](const Chunk<16>& c, uint4* words) {
        const uint4* from = (const uint4*)(raw + c.before * T::bytes(to.groups) + T::bytes(c.start));
#pragma unroll
        for (int k = 0; k < MOST; ++k)
            if (thread + 256 * k < T::bytes(c.groups) / 16) words[k] = from[thread + 256 * k];
    };
    auto store = [&](const Chunk<16>&, const uint4* words) {
#pragma unroll
        for (int k = 0; k < MOST; ++k)
            if (thread + 256 * k < WORDS) bytes[thread + 256 * k] = words[k];
    };
    auto use = [&](const Chunk<16>& c) {
        const int local = thread / 8;
        if (local >= c.groups) return;
        for (int half = 0; half < 2; ++half) {
            const int row = half * 8 + thread % 8;
            if (c.tile * 16 + row >= to.rows) return;
            Row<Tiles16<F>> source;
            source.first = (const unsigned char*)bytes, source.row = row;
            store_group<F>(Row<F>(to, c.matrix, c.tile * 2 + half, row % 8), c.start + local,
                           load_group(source, local));
        }
    };
    each_chunk<16, PARTS16, MOST>(to, first, n_tiles, ids, load, store, use);
}

}  // namespace tiles
using namespace tiles;
