// lightning_indexer: y[j, t] = sum_n w[n, t] max(0, q[:, n, t] . k[:, j]) + mask[j, t], on tensor
// cores, for rows of 128 elements of f16, bf16 or q8_0.
// @kernel scores<{__half|__nv_bfloat16|q8_0}, {32|64}, {false|true}>
// @kernel hot 90a scores<{__half|__nv_bfloat16|q8_0}, {32|64}, {false|true}>
// @kernel pack_queries<{__half|__nv_bfloat16}, {32|64}>
//
// Rows of the cache are the A of a product, and a token's heads are its B. A warpgroup loads its 64
// or 128 rows straight into registers as fragments, once, and multiplies them with one token after
// another. So a row is read once for a chunk of tokens, and products of heads never leave registers:
// relu, weights and the sum over heads follow in place. Elements of a row are in the order in which
// 16-byte loads put them into fragments; queries have the same order in shared memory.
//
// One token: the cache is read at its bandwidth, and each block rounds the queries itself. More
// tokens: `pack_queries` writes images of B to scratch, which are copied as they are. The next
// product runs while a warpgroup weights and sums the last one. If a token sees none of a
// warpgroup's rows, they are not multiplied, but written: -inf.
//
// q is scaled by a power of two for each head to magnitudes below 1, so that f16 cannot overflow;
// the weight has the inverse.
//
// Traffic: one token: rows, and the queries from L2 for each block. Chunks of tokens: a row and a
// token's image are read from L2 for each pair of a block of rows and a chunk.
//
// Designs that lost. By count: rows by way of shared memory take as much of its bandwidth as B does;
// heads as A and rows as B need a reduction over 8 lanes in place of 4 for each row. Measured on an
// H100: queries loaded behind the rows, one after another, 5.6 to 11.7 us for 8,192 rows of f16, 3.4
// now; chunks whose warpgroups all wait at each token, 290 TFLOP/s.
#include "indexer_tiles.cuh"

constexpr int STAGES = 4;

// grid: tokens, groups of N heads, n3.
template <class T, int N>
__global__ void __launch_bounds__(256) pack_queries(const __grid_constant__ Indexer a) {
    begin();
    const int t = blockIdx.x, group = blockIdx.y, i3 = blockIdx.z;
    const long long number = ((long long)i3 * a.n_tokens + t) * gridDim.y + group;
    Heads<T, N, 8> heads;
    heads.load(a, t, i3, group);
    heads.store(a.images + number * IMAGE<N>);
}

// The images of a chunk's tokens on their way through STAGES places in shared memory. Warpgroups may
// be at different steps: on 9.0 one thread starts the copies, and warps report what they have read.
template <int N>
struct Images {
    char *memory;
    const char *from;
    int steps;

#if __CUDA_ARCH__ >= 900
    u64 *full, *empty;

    __device__ Images(char *memory, const char *from, int steps) : memory(memory), from(from), steps(steps) {
        __shared__ u64 barriers[2 * STAGES];
        full = barriers, empty = barriers + STAGES;
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; ++i)
                barrier_init(full + i, 1), barrier_init(empty + i, blockDim.x / 32);
            fence_barriers();
        }
        __syncthreads();
    }
    __device__ __forceinline__ void copy(int step) const {
        if (threadIdx.x || step >= steps) return;
        const int at = step % STAGES;
        if (step >= STAGES) barrier_wait(empty + at, step / STAGES + 1 & 1);
        barrier_expect(full + at, IMAGE<N>);
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                shared_address(memory + at * STAGE<N>)),
            "l"(from + (long long)step * IMAGE<N>), "r"(IMAGE<N>), "r"(shared_address(full + at))
            : "memory");
    }
    __device__ __forceinline__ void wait(int step) const {
        barrier_wait(full + step % STAGES, step / STAGES & 1);
    }
    __device__ __forceinline__ void release(int step) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(empty + step % STAGES);
    }
#else
    __device__ Images(char *memory, const char *from, int steps) : memory(memory), from(from), steps(steps) {}
    __device__ __forceinline__ void copy(int step) const {
        if (step < steps) {
            const u32 to = shared_address(memory) + step % STAGES * STAGE<N>;
            const char *image = from + (long long)step * IMAGE<N>;
            for (int i = threadIdx.x * 16; i < IMAGE<N>; i += blockDim.x * 16)
                copy16(to + i, image + i, true);
        }
        copies_commit();
    }
    __device__ __forceinline__ void wait(int) const {
        copies_wait<2>();
        __syncthreads();
    }
    __device__ __forceinline__ void release(int) const {}
#endif
};

// The mask of a token over the 128 rows of a warpgroup: a lane has four, each warp has all. So each
// warp knows by itself whether the warpgroup sees some of them.
struct Seen {
    u32 words[2];

    template <class Mine>
    __device__ Seen(const Mine &mine, int tile0, int t) {
        const int j = tile0 * 64 + mine.lane * 4;
        const u16 *at = (const u16 *)(mine.mask + t * mine.a.nb_mask[0]) + j;
        words[0] = words[1] = 0;
        if (j + 4 <= mine.live && (!mine.mask || ((u64)at & 7) == 0)) {
            if (mine.mask) {
                const uint2 four = *(const uint2 *)at;
                words[0] = four.x, words[1] = four.y;
            }
            return;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const u32 half = j + e >= mine.live ? 0xFC00 : mine.mask ? at[e] : 0;  // -inf
            words[e / 2] |= half << e % 2 * 16;
        }
    }
    __device__ bool any() const {
        return __any_sync(~0u, words[0] != 0xFC00FC00 || words[1] != 0xFC00FC00);
    }
    // The bias of a lane's own row of a tile.
    template <class Mine>
    __device__ float bias(const Mine &mine, int tile) const {
        const int r = mine.own(tile), from = r / 4;
        const u32 low = __shfl_sync(~0u, words[0], from), high = __shfl_sync(~0u, words[1], from);
        return __half2float(__ushort_as_half((r & 2 ? high : low) >> r % 2 * 16 & 0xFFFF));
    }
};

// Chunks of tokens: a warpgroup has two tiles. grid: blocks of rows, chunks, n3.
template <class K, int N>
__device__ __forceinline__ void more_tokens(const Indexer &a, char *memory) {
    using Mine = Tiles<K, N>;
    using T = typename Mine::T;
    const int groups = a.heads / N;
    const int t0 = blockIdx.y * a.chunk, t1 = min(a.n_tokens, t0 + a.chunk);
    const int steps = (t1 - t0) * groups;
    const int tile0 = (blockIdx.x * (blockDim.x / 128) + threadIdx.x / 128) * 2;
    const Mine mine(a);
    Fragments rows[2];
    if constexpr (same_type<K, q8_0>) {
        char *raw = memory + threadIdx.x / 128 * (128 * RAW);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) mine.fetch(raw + tile * (64 * RAW), tile0 + tile);
        copies_commit();
        copies_wait<0>();
        __syncthreads();
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) mine.decode(rows[tile], raw + tile * (64 * RAW));
        fence_engines_for_wgmma();  // copies of images follow what was read here
        __syncthreads();
    } else {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) mine.load(rows[tile], tile0 + tile);
    }
    const Images<N> images(
        memory, a.images + ((long long)blockIdx.z * a.n_tokens + t0) * groups * IMAGE<N>, steps);
    images.copy(0);
    images.copy(1);
    Seen next(mine, tile0, t0), now = next;
    float y[2][2] = {};
    bool visible = false;
    int t = t0, group = 0;
    for (int step = 0; step < steps; ++step) {
        images.copy(step + 2);
        if (group == 0) {
            now = next, visible = now.any();
            if (t + 1 < t1) next = Seen(mine, tile0, t + 1);
        }
        images.wait(step);
        if (visible) {
            const char *image = memory + step % STAGES * STAGE<N>;
            const float *weights = (const float *)(image + B_BYTES<N>);
            float first[N / 2], second[N / 2];
            fence_engines_for_wgmma();
            start<T, N>(first, rows[0], shared_address(image));
            start<T, N>(second, rows[1], shared_address(image));
            wait_products<1>();
            wgmma_hold(first);
            Mine::add(y[0], first, weights);
            wait_products<0>();
            wgmma_hold(second);
            Mine::add(y[1], second, weights);
        }
        images.release(step);
        if (++group < groups) continue;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            mine.write(tile0 + tile, t, y[tile], now.bias(mine, tile), [](float) {});
            y[tile][0] = y[tile][1] = 0;
        }
        ++t, group = 0;
    }
}

// MANY: tokens in chunks, from images; else one token.
template <class K, int N, bool MANY>
__global__ void __launch_bounds__(MANY ? 384 : 512, 1) scores(const __grid_constant__ Indexer a) {
    extern __shared__ __align__(1024) char memory[];
    if constexpr (MANY) {
        begin();
        more_tokens<K, N>(a, memory);
    } else {
        one_token<K, N>(a, memory, [](float) {});
    }
}
