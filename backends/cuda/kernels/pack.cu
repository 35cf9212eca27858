// Packs rows of blocks, as in a file, into tiles while a weight is loaded; pack16: from the tiles of
// 16 rows of the cpu backend, for a weight that it computes with too.
// @kernel pack<{EVERY}>
// @kernel pack16<{LENT}>
//
// raw    whole tiles: their rows one after another, in pinned memory of the host, at a multiple of
//        16 bytes; pack16: whole tiles of 16 rows
// to     the planes of the weight, which are zero
// first  the first tile of `raw`, counted over all matrices; pack16: of 16 rows
//
// Grid: tiles, chunks of 32 groups. A block of 256 threads packs one chunk of a tile: it copies the
// bytes of the 8 rows to shared memory with loads of 16 bytes, then each thread packs one group.
// Neighbouring threads have neighbouring rows, as in the planes, so stores are contiguous.
// Traffic: each byte of the file crosses the bus once; each byte of the planes is written once.
//
// The parts of a group are those that products take from rows of a file (raw.cuh), so packing needs
// no code for a type. Rows past the end of a matrix stay zero.
//
// In pack16 a chunk of a tile of 16 rows is contiguous, and each thread packs one group of two rows.
// Traffic: the host's tiles are 0 to 6 % larger than the file's blocks.
//
// Lost: to copy the rows to the device first and pack from there. This takes memory on the device
// that every plan would have to count, and saves nothing: the bus is slower than this kernel. Also
// lost: tables of bit positions for a common permutation; types that compute codes (tq1_0, q3_K,
// nvfp4) would need a second way. Instead of pack16, the host could restore the file's rows while it
// copies them to pinned memory: then its cores and memory would work for every byte, where now they
// do nothing.
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

template <class F>
__global__ void __launch_bounds__(256) pack(const unsigned char* raw, Packed to, int first) {
    constexpr int BLOCK = F::Blocks::BYTES, CHUNK = PACKED_GROUPS / F::block_groups * BLOCK;
    constexpr int WORDS = (CHUNK + 15) / 16 + 1;  // a chunk may start anywhere in a word
    __shared__ uint4 rows[8][WORDS];
    begin();
    const int number = first + blockIdx.x, matrix = number / to.tiles, tile = number % to.tiles;
    const int n_rows = min(8, to.rows - tile * 8), row_bytes = to.blocks * BLOCK;
    const int start = blockIdx.y * CHUNK, size = min(CHUNK, row_bytes - start);
    // `raw` begins with the first row of tile `first`.
    const long long skipped = (long long)(first / to.tiles) * to.rows + first % to.tiles * 8;
    const long long row0 = (long long)matrix * to.rows + tile * 8 - skipped;
    const unsigned char* chunk = raw + row0 * row_bytes + start;

    for (int i = threadIdx.x; i < 8 * WORDS; i += 256) {
        const int row = i / WORDS, word = i % WORDS;
        const unsigned char* from = chunk + (long long)row * row_bytes;
        const int offset = (unsigned long long)from % 16;
        if (row < n_rows && word * 16 < offset + size)
            rows[row][word] = *(const uint4*)(from - offset + word * 16);
    }
    __syncthreads();

    const int row = threadIdx.x % 8, local = threadIdx.x / 8;
    const int group = blockIdx.y * PACKED_GROUPS + local;
    if (row >= n_rows || group >= to.groups) return;
    Row<Raw<F>> from;
    from.blocks = (const unsigned char*)rows[row] +
                  (unsigned long long)(chunk + (long long)row * row_bytes) % 16;
    store_group<F>(Row<F>(to, matrix, tile, row), group, load_group(from, local));
}

template <class F>
__global__ void __launch_bounds__(256) pack16(const unsigned char* raw, Packed to, int first) {
    using T = Tiles16<F>;
    __shared__ uint4 chunk[T::bytes(PACKED_GROUPS) / 16];
    begin();
    const int number = first + blockIdx.x, per_matrix = (to.rows + 15) / 16;
    const int matrix = number / per_matrix, tile = number % per_matrix;
    const int start = blockIdx.y * PACKED_GROUPS, groups = min(PACKED_GROUPS, to.groups - start);
    const long long skipped = (long long)blockIdx.x * T::bytes(to.groups) + T::bytes(start);
    const uint4* from = (const uint4*)(raw + skipped);

    for (int i = threadIdx.x; i < T::bytes(groups) / 16; i += 256) chunk[i] = from[i];
    __syncthreads();

    const int local = threadIdx.x / 8;
    if (local >= groups) return;
    for (int half = 0; half < 2; ++half) {
        const int row = half * 8 + threadIdx.x % 8;
        if (tile * 16 + row >= to.rows) return;
        Row<Tiles16<F>> source;
        source.first = (const unsigned char*)chunk, source.row = row;
        store_group<F>(Row<F>(to, matrix, tile * 2 + half, row % 8), start + local,
                       load_group(source, local));
    }
}

}  // namespace tiles
using namespace tiles;
