// lightning_indexer for one token on 9.0: rows of 128 elements of f16 or bf16, multiples of 32 heads.
//
// y[j] = sum_n w[n] max(0, q[:, n] . k[:, j]) + mask[j], as in indexer.cu, but the copy engine brings
// rows to shared memory, in tiles of 64, and products read them there. With half as many registers as
// loads to these take, blocks of the next launch start beside these.
//
// Three tiles of a block are on their way at a time, 6 MB of all, which keep memory busy. What comes
// behind requests waits for them: with all rows asked for at once, 17 MB, queries took 3.3 us, and the
// wait for the launch before returned 4.6 us after that had ended (65,536 rows, H100). So products
// began when all rows had come. Only scores wait for the launch before, where nothing else needs it.
//
// Traffic: rows once, the queries from L2 for each block.
// @kernel hot 90a scores_token<{__half|__nv_bfloat16}, {32|64}>
#include "indexer.cuh"

constexpr int D = 128, BOX = 64 * 128, TILE = 2 * BOX, GROUPS = 4, BUFFERS = 8, AHEAD = 3;
// An image of N heads: B in two halves of 64 columns, in swizzled rows of 128 bytes, then the weights.
template <int N> constexpr int IMAGE = N * D * 2 + 1024;

// As in attention_hopper.cu: parameters start at 0x210, maps must be 64-byte aligned.
struct TokenIndexer {
    u64 pad[6];
    TensorMap map;
    Indexer a;
};

// The heads of a group that a warp rounds: warp, warp + 16, .. of N.
template <class T, int N>
struct Heads {
    static constexpr int MINE = N / 16;
    float4 x[MINE];
    float w[MINE];

    __device__ __forceinline__ void load(const Indexer &a, int i3, int group) {
        const int lane = threadIdx.x % 32, first = group * N + threadIdx.x / 32;
        const char *q = a.q + i3 * a.nb_q[2] + lane * 16, *from = a.w + i3 * a.nb_w[2];
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            x[i] = *(const float4 *)(q + (first + i * 16) * a.nb_q[0]);
            w[i] = *(const float *)(from + (first + i * 16) * a.nb_w[0]) * a.scale;
        }
    }
    // Scaled by a power of two to magnitudes below 1; the weight has the inverse.
    __device__ __forceinline__ void store(char *image) const {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            const int n = threadIdx.x / 32 + i * 16;
            const float4 v = x[i];
            const int e = exponent_of(v);
            const float down = __uint_as_float((127 - e) << 23);
            char *to = image + lane / 16 * (N * 128) + n * 128 + ((lane % 16 / 2 ^ (n & 7)) << 4);
            *(uint2 *)(to + lane % 2 * 8) =
                make_uint2(pack2<T>(v.x * down, v.y * down), pack2<T>(v.z * down, v.w * down));
            if (lane == 0)
                ((float *)(image + N * D * 2))[n] = w[i] * __uint_as_float((127 + e) << 23);
        }
    }
};

// A warpgroup has every fourth tile of its block.
// grid: blocks, 1, n3.
template <class T, int N>
__global__ void __launch_bounds__(128 * GROUPS, 2) scores_token(const __grid_constant__ TokenIndexer argument) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const Indexer &a = argument.a;
    extern __shared__ char unaligned[];
    __shared__ u64 full[BUFFERS], used[BUFFERS];
    char *const memory = unaligned + (-shared_address(unaligned) & 1023);
    const int groups = a.heads / N, warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0), i3 = blockIdx.z;
    // Tiles of this block: blockIdx.x, blockIdx.x + gridDim.x, ..
    const int tiles = ((a.n_kv + 63) / 64 - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
    char *const ring = memory + groups * IMAGE<N>;
    // Asks for the block's tile t. One thread calls it for each, where tile t - AHEAD has come.
    const auto fetch = [&](int t) {
        if (t >= tiles) return;
        const int buffer = t % BUFFERS;
        if (t >= BUFFERS) barrier_wait(used + buffer, t / BUFFERS - 1 & 1);
        barrier_expect(full + buffer, TILE);
#pragma unroll
        for (int c = 0; c < 2; ++c)
            tensor_copy(ring + buffer * TILE + c * BOX, &argument.map, full + buffer, c * 64,
                        (t * gridDim.x + blockIdx.x) * 64, 0, i3);
    };
    if (threadIdx.x < BUFFERS) barrier_init(full + threadIdx.x, 1), barrier_init(used + threadIdx.x, 1);
    fence_barriers();
    __syncthreads();
    if (a.early == NOTHING) begin();
    Heads<T, N> heads;
    heads.load(a, i3, 0);
    if (a.early == QUERIES) begin();
    if (threadIdx.x == 0)
        for (int t = 0; t < AHEAD; ++t) fetch(t);
    heads.store(memory);
    for (int group = 1; group < groups; ++group) {
        heads.load(a, i3, group);
        heads.store(memory + group * IMAGE<N>);
    }
    const int live = a.live(), lane = threadIdx.x % 32;
    const char *const mask = a.mask ? a.mask + i3 % a.mask_batch * a.nb_mask[1] : nullptr;
    // A lane's own row: lanes 0 and 1 of a quad have rows g and g + 8 of their warp, so have 2 and 3.
    const int own = threadIdx.x / 32 % 4 * 16 + lane / 4 + lane % 2 * 8;
    fence_engines();
    __syncthreads();
    bool waits = a.early == ALL;
#pragma unroll 1
    for (int t = warpgroup; t < tiles; t += GROUPS) {
        const int buffer = t % BUFFERS, j = (t * gridDim.x + blockIdx.x) * 64 + own;
        float bias = j < live ? 0 : __int_as_float(0xFF800000);
        if (mask && j < live) bias = __half2float(((const __half *)mask)[j]);
        float y[2] = {};
        barrier_wait(full + buffer, t / BUFFERS & 1);
        if (threadIdx.x % 128 == 0) fetch(t + AHEAD);
        const u64 rows = tile_descriptor(shared_address(ring) + buffer * TILE, 16);
#pragma unroll 1
        for (int group = 0; group < groups; ++group) {
            const char *const image = memory + group * IMAGE<N>;
            const u64 queries = tile_descriptor(shared_address(image), 16);
            float sums[N / 2];
            wgmma_hold(sums);
            wgmma_fence();
#pragma unroll
            for (int n = 0; n < D / 16; ++n)
                wgmma_ss<T, N>(sums, further(rows, n / 4 * BOX + n % 4 * 32),
                               further(queries, n / 4 * (N * 128) + n % 4 * 32), n > 0);
            wgmma_commit();
            wgmma_wait<0>();
            wgmma_hold(sums);
            if (group == groups - 1) {
                warpgroup_sync(1 + warpgroup);
                if (threadIdx.x % 128 == 0) barrier_arrive(used + buffer);
            }
            const float *const weights = (const float *)(image + N * D * 2);
            float more[2] = {};  // two chains of sums are half as long
#pragma unroll
            for (int n = 0; n < N / 8; ++n) {
                const float2 w = *(const float2 *)(weights + 8 * n + lane % 4 * 2);
                y[0] = fmaf(w.x, relu(sums[4 * n]), y[0]);
                y[1] = fmaf(w.x, relu(sums[4 * n + 2]), y[1]);
                more[0] = fmaf(w.y, relu(sums[4 * n + 1]), more[0]);
                more[1] = fmaf(w.y, relu(sums[4 * n + 3]), more[1]);
            }
            y[0] += more[0], y[1] += more[1];
        }
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int by = 1; by < 4; by *= 2) y[r] += __shfl_xor_sync(~0u, y[r], by);
        if (waits) begin();
        waits = false;
        if (lane % 4 < 2 && j < a.n_kv)
            ((float *)(a.out + i3 * a.nb_out[1]))[j] = hides(bias) ? bias : (lane % 2 ? y[1] : y[0]) + bias;
    }
#endif
}
