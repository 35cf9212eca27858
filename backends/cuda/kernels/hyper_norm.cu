// Between two sublayers with hyper-connections, for a few tokens: the streams after one (`post`),
// the maps of the next, its input and that one's norm. Two launches in place of seven or eight.
// @kernel hot hyper_mix<{2|4}, {true|false}>
// @kernel hot hyper_norm<{2|4}, {1|2|4}, {true|false}>
#include "fixed_point.cuh"
#include "sinkhorn.cuh"

constexpr int MIX_THREADS = 64;
// Sums of a block of `hyper_mix`: one for each mix and one of squares, padded.
constexpr int SUMS = 32;

// The streams before a sublayer. `experts`, `plus` and `plus2` make the result of the sublayer
// before, or x is that if `experts` is absent:  x = sum_e experts[:, e] shares[e] + plus + plus2
// out[:, d] = post[d] x + sum_s comb[d, s] old[:, s]
struct Streams {
    Tensor out, old, x, experts, shares, plus, plus2, post, comb;
};

// Sums of a warp: lane l ends up with x[0] = sum l. Half of the sums go to the other lane each time.
template <int HALF>
__device__ __forceinline__ void spread(float (&x)[SUMS], int lane) {
    const bool upper = lane & HALF;
#pragma unroll
    for (int k = 0; k < HALF; k++) {
        const float away = upper ? x[k] : x[k + HALF];
        x[k] = (upper ? x[k + HALF] : x[k]) + __shfl_xor_sync(~0u, away, HALF);
    }
    if constexpr (HALF > 1) spread<HALF / 2>(x, lane);
}

// Sums of products with fn, whose rows are as long as all streams of a token, n HC, and of squares:
// sums [SUMS, blocks, T]. Of POST, the streams are computed and stored before, else they are s.old.
// A thread has an element of each stream. It reads each weight as soon as its warp may, all at
// once: 1.5 MB from 64 multiprocessors take less time than a launch.
// grid: n in blocks of MIX_THREADS, T.
template <int HC, bool POST>
__global__ void __launch_bounds__(MIX_THREADS)
hyper_mix(float* sums, Tensor fn, const __grid_constant__ Streams s) {
    constexpr int MIXES = (2 + HC) * HC;
    static_assert(MIXES < SUMS);
    const int n = s.old.ne[0], i = blockIdx.x * MIX_THREADS + threadIdx.x, t = blockIdx.y;
    // A line of 128 bytes is 32 elements.
    for (int line = threadIdx.x; line < MIXES * HC * (MIX_THREADS / 32); line += MIX_THREADS) {
        const int at = blockIdx.x * MIX_THREADS + line % (MIX_THREADS / 32) * 32;
        const int row = line / (MIX_THREADS / 32);
        if (at < n) fetch_early(fn.at<float>(row % HC * n + at, row / HC, 0, 0));
    }
    begin();
    float mine[SUMS] = {};
    if (i < n) {
        float stream[HC];
#pragma unroll
        for (int h = 0; h < HC; h++) stream[h] = *s.old.at<float>(i, h, t, 0);
        if constexpr (POST) {
            float x = 0;
            if (s.experts.data) {
                for (int e = 0; e < s.experts.ne[1]; e++)
                    x += *s.experts.at<float>(i, e, t, 0) * *s.shares.at<float>(0, e, t, 0);
                if (s.plus.data) x += *s.plus.at<float>(i, t, 0, 0);
                if (s.plus2.data) x += *s.plus2.at<float>(i, t, 0, 0);
            } else {
                x = *s.x.at<float>(i, t, 0, 0);
            }
            float next[HC];
#pragma unroll
            for (int d = 0; d < HC; d++) {
                next[d] = *s.post.at<float>(d, t, 0, 0) * x;
#pragma unroll
                for (int h = 0; h < HC; h++) next[d] += *s.comb.at<float>(d, h, t, 0) * stream[h];
                *s.out.at<float>(i, d, t, 0) = next[d];
            }
#pragma unroll
            for (int d = 0; d < HC; d++) stream[d] = next[d];
        }
#pragma unroll
        for (int m = 0; m < MIXES; m++)
#pragma unroll
            for (int h = 0; h < HC; h++) mine[m] += *fn.at<float>(h * n + i, m, 0, 0) * stream[h];
#pragma unroll
        for (int h = 0; h < HC; h++) mine[MIXES] += stream[h] * stream[h];
    }
    const int lane = threadIdx.x % 32;
    spread<SUMS / 2>(mine, lane);
    __shared__ float parts[MIX_THREADS / 32][SUMS];
    parts[threadIdx.x / 32][lane] = mine[0];
    __syncthreads();
    if (threadIdx.x >= SUMS) return;
    float total = 0;
    for (int warp = 0; warp < MIX_THREADS / 32; warp++) total += parts[warp][lane];
    sums[((long long)t * gridDim.x + blockIdx.x) * SUMS + lane] = total;
}

// maps: as of `dsv4_hc_maps`;  out = rms_norm(sum_h pre[h] streams[:, h]) w, also as fixed-point
// groups if FIXED. A block for each token computes out, pre and post, and another one comb, whose
// iterations take as long. A thread has HELD packs of 4 adjacent elements.
// grid: T, 2. Blocks of whole warps.
struct HyperNorm {
    Tensor out, maps, streams, scale, base, w;
    const float* sums;
    unsigned char* fixed;
    float flat_eps, eps, norm_eps;
    int n_iter, n_sums;
};

template <int HC, int HELD, bool FIXED>
__global__ void __launch_bounds__(1024) hyper_norm(const __grid_constant__ HyperNorm p) {
    constexpr int MIXES = (2 + HC) * HC;
    using Four = Pack<float, 4>;
    const int n = p.out.ne[0], t = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x * 4 < n) fetch_early(p.w.at<float>(threadIdx.x * 4, 0, 0, 0));
    begin();
    __shared__ float parts[32][SUMS];
    float sum = 0;
    for (int i = warp; i < p.n_sums; i += blockDim.x / 32)
        sum += p.sums[((long long)t * p.n_sums + i) * SUMS + lane];
    parts[warp][lane] = sum;
    __syncthreads();
    sum = 0;
    for (int i = 0; i < blockDim.x / 32; i++) sum += parts[i][lane];
    // Each warp has all sums, lane l sum l.
    const float mean = __shfl_sync(~0u, sum, MIXES) / (HC * n);
    const float mix = sum / sqrtf(mean + p.flat_eps);
    const int kind = lane < HC ? 0 : lane < 2 * HC ? 1 : 2;
    float logit = 0;
    if (lane < MIXES)
        logit = *p.scale.at<float>(kind, 0, 0, 0) * mix + *p.base.at<float>(lane, 0, 0, 0);
    if (blockIdx.y == 1) {
        const bool there = lane < HC;
        float c[HC] = {};
#pragma unroll
        for (int d = 0; d < HC; d++) {
            const float x = __shfl_sync(~0u, logit, (2 * HC + d + HC * lane) % 32);
            if (there) c[d] = x;
        }
        sinkhorn<HC>(c, there, p.eps, p.n_iter);
        if (there && warp == 0)
#pragma unroll
            for (int d = 0; d < HC; d++) *p.maps.at<float>(d, lane + 2, t, 0) = c[d];
        return;
    }
    const float weight = (1 + kind) / (1 + expf(-logit)) + (kind == 0 ? p.eps : 0);
    if (warp == 0 && lane < 2 * HC) *p.maps.at<float>(lane % HC, kind, t, 0) = weight;
    float pre[HC];
#pragma unroll
    for (int h = 0; h < HC; h++) pre[h] = __shfl_sync(~0u, weight, h);
    Four held[HELD];
    float squares = 0;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int i = (threadIdx.x + k * blockDim.x) * 4;
        held[k] = Four{};
        if (i >= n) continue;
#pragma unroll
        for (int h = 0; h < HC; h++) {
            const Four part = *p.streams.at<Four>(i, h, t, 0);
#pragma unroll
            for (int e = 0; e < 4; e++) held[k].v[e] += part.v[e] * pre[h];
        }
#pragma unroll
        for (int e = 0; e < 4; e++) squares += held[k].v[e] * held[k].v[e];
    }
    const float scale = sqrtf(block_reduce<Sum>(squares, 0) / n + p.norm_eps);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int i = (threadIdx.x + k * blockDim.x) * 4;
        if (i >= n) continue;
        const Four factors = *p.w.at<Four>(i, 0, 0, 0);
#pragma unroll
        for (int e = 0; e < 4; e++) held[k].v[e] = held[k].v[e] / scale * factors.v[e];
        *p.out.at<Four>(i, t, 0, 0) = held[k];
        if constexpr (FIXED)  // whole groups: 8 neighboring lanes are all here, or none is
            put_fixed<2>(held[k].v, p.fixed + ((long long)t * (n / 32) + i / 32) * group_bytes<2>);
    }
}
