// Between two sublayers with hyper-connections, for a few tokens: the streams after one (`post`),
// the maps of the next, its input and that one's norm. Two launches in place of seven or eight.
// @kernel hot hyper_mix<{2|4}, {STREAMS|RESULT|EXPERTS}, {1|4}>
// @kernel hot hyper_norm<{2|4}, {1|2|4}, {true|false}>
#include "fixed_point.cuh"
#include "sinkhorn.cuh"

// A block of `hyper_mix` has packs of adjacent elements, of all streams, and parts of the mixes: a
// thread for each pack, stream and part.
constexpr int PACKS = 8, PARTS = 4;
// Sums of a token: one for each mix and one of squares, padded. Of a thread: of its mixes, and one
// of squares, padded.
constexpr int SUMS = 32, OWN = 8;
static_assert(OWN == PACKS);  // a lane of a part ends up with one of them

// What `hyper_mix` reads before the wait, because the launch before does not write it: nothing, fn,
// or old, post and comb too.
enum MixEarly { NONE, FN, OLD };

// The streams before a sublayer: they are `old`, or come from the result x of the sublayer before,
// or from experts, `plus` and `plus2` of it:  x = sum_e experts[:, e] shares[e] + plus + plus2
// out[:, d] = post[d] x + sum_s comb[d, s] old[:, s]
enum Origin { STREAMS, RESULT, EXPERTS };
struct Streams {
    Tensor out, old, x, experts, shares, plus, plus2, post, comb;
    int early;  // MixEarly
};

// Sums of 8 neighboring lanes: lane l ends up with x[0] = sum l. Half of the sums go to the other
// lane each time.
template <int HALF>
__device__ __forceinline__ void spread(float (&x)[OWN], int lane) {
    const bool upper = lane & HALF;
#pragma unroll
    for (int k = 0; k < HALF; k++) {
        const float away = upper ? x[k] : x[k + HALF];
        x[k] = (upper ? x[k + HALF] : x[k]) + __shfl_xor_sync(~0u, away, HALF);
    }
    if constexpr (HALF > 1) spread<HALF / 2>(x, lane);
}

// The pack from element i of x = sum_e experts[:, e] shares[e] + plus + plus2. The loads of 8 experts
// do not wait for each other.
template <class Numbers>
__device__ __forceinline__ Numbers sum_of_experts(const Streams& s, int i, int t) {
    constexpr int V = sizeof(Numbers) / 4, FLIGHT = 8;
    const int used = s.experts.ne[1];
    Numbers x = {}, plus = {}, plus2 = {};
    if (s.plus.data) plus = *s.plus.at<Numbers>(i, t, 0, 0);
    if (s.plus2.data) plus2 = *s.plus2.at<Numbers>(i, t, 0, 0);
#pragma unroll 1
    for (int first = 0; first < used; first += FLIGHT) {
        Numbers y[FLIGHT];
        float share[FLIGHT];
#pragma unroll
        for (int e = 0; e < FLIGHT; e++) {
            const int there = min(first + e, used - 1);  // a condition would be a branch
            y[e] = *s.experts.at<Numbers>(i, there, t, 0);
            share[e] = *s.shares.at<float>(0, there, t, 0);
        }
        __syncwarp();  // the assembler moves no load across; it had 4 in flight
#pragma unroll
        for (int e = 0; e < FLIGHT; e++)
#pragma unroll
            for (int k = 0; k < V; k++)
                if (first + e < used) x.v[k] += y[e].v[k] * share[e];
    }
#pragma unroll
    for (int k = 0; k < V; k++) x.v[k] = x.v[k] + plus.v[k] + plus2.v[k];
    return x;
}

// Sums of products with fn, whose rows are as long as all streams of a token, n HC, and of squares:
// sums [blocks, SUMS, T]. The streams are stored if they are new.
// A thread has V adjacent elements of a stream and a part of the mixes. Its weights, at most 24, are
// in registers before it waits: 1.5 MB that are fetched while the launch before ends. Blocks are
// small, so that they start beside its blocks. All threads of an element compute what they need of
// its streams; loads beyond the first come from L1. With a thread for each element and all 96
// weights, the compiler had 16 loads in flight: six round trips to L2 behind the wait, 7 us in all.
// grid: n in blocks of PACKS V, T. block: PACKS PARTS HC.
template <int HC, Origin FROM, int V>
__global__ void __launch_bounds__(PACKS * PARTS * HC, FROM == EXPERTS ? 4 : 8)
hyper_mix(float* sums, Tensor fn, const __grid_constant__ Streams s) {
    constexpr int MIXES = (2 + HC) * HC, EACH = (MIXES + PARTS - 1) / PARTS;
    static_assert(MIXES < SUMS && EACH < OWN);
    using Numbers = Pack<float, V>;
    const int unit = threadIdx.x / PACKS, part = unit % PARTS, own = unit / PARTS;
    const int n = s.old.ne[0], t = blockIdx.y, at = (blockIdx.x * PACKS + threadIdx.x % PACKS) * V;
    const bool there = at < n;
    const int i = min(at, n - V);  // behind the end, it reads the last pack and adds nothing
    if (s.early < FN) begin();
    Numbers weights[EACH] = {};
#pragma unroll
    for (int m = 0; m < EACH; m++)
        if (part * EACH + m < MIXES)
            weights[m] = *fn.at<Numbers>(own * n + i, part * EACH + m, 0, 0);
    if (s.early == FN) begin();
    Numbers old[HC] = {};
    float post = 0, comb[HC] = {};
#pragma unroll
    for (int h = 0; h < HC; h++) {
        if (FROM != STREAMS || h == own) old[h] = *s.old.at<Numbers>(i, h, t, 0);
        if (FROM != STREAMS) comb[h] = *s.comb.at<float>(own, h, t, 0);
    }
    if (FROM != STREAMS) post = *s.post.at<float>(own, t, 0, 0);
    if (s.early == OLD) begin();
    Numbers stream = {};
    if constexpr (FROM != STREAMS) {
        Numbers x;
        if constexpr (FROM == EXPERTS) x = sum_of_experts<Numbers>(s, i, t);
        else x = *s.x.at<Numbers>(i, t, 0, 0);
#pragma unroll
        for (int k = 0; k < V; k++) {
            stream.v[k] = post * x.v[k];
#pragma unroll
            for (int h = 0; h < HC; h++) stream.v[k] += comb[h] * old[h].v[k];
        }
        if (there && part == 0) *s.out.at<Numbers>(i, own, t, 0) = stream;
    } else {
#pragma unroll
        for (int h = 0; h < HC; h++)
            if (h == own) stream = old[h];
    }
    float mine[OWN] = {};
#pragma unroll
    for (int k = 0; k < V; k++) {
        if (!there) break;
#pragma unroll
        for (int m = 0; m < EACH; m++) mine[m] += weights[m].v[k] * stream.v[k];
        mine[EACH] += stream.v[k] * stream.v[k];
    }
    spread<OWN / 2>(mine, threadIdx.x);
    __shared__ float parts[HC][PARTS][OWN];
    parts[own][part][threadIdx.x % OWN] = mine[0];
    __syncthreads();
    if (threadIdx.x > MIXES) return;
    const bool square = threadIdx.x == MIXES;
    float total = 0;
#pragma unroll
    for (int h = 0; h < HC; h++)
        total += parts[h][square ? 0 : threadIdx.x / EACH][square ? EACH : threadIdx.x % EACH];
    sums[((long long)t * SUMS + threadIdx.x) * gridDim.x + blockIdx.x] = total;
}

// maps: as of `dsv4_hc_maps`;  out = rms_norm(sum_h pre[h] streams[:, h]) w, also as fixed-point
// groups if FIXED. A block for each token computes out, pre and post, and another one comb: 20
// iterations take one warp longer than the rest, and 32 warps that all computed them took 10 us. A
// thread has HELD packs of 4 adjacent elements; of one, its streams arrive beside the sums. Weights
// and what the maps are made of were there before `hyper_mix`, so they are read before the wait.
// grid: T, 2. Blocks of whole warps.
struct HyperNorm {
    Tensor out, maps, streams, scale, base, w;
    const float* sums;
    unsigned char* fixed;
    float flat_eps, eps, norm_eps;
    int n_iter, n_sums;
};

template <int HC, int HELD, bool FIXED>
__global__ void __launch_bounds__(1024, 1) hyper_norm(const __grid_constant__ HyperNorm p) {
    constexpr int MIXES = (2 + HC) * HC;
    using Four = Pack<float, 4>;
    const int n = p.out.ne[0], t = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int kind = lane < HC ? 0 : lane < 2 * HC ? 1 : 2;
    float scale = 0, base = 0;
    if (lane < MIXES) {
        scale = *p.scale.at<float>(kind, 0, 0, 0);
        base = *p.base.at<float>(lane, 0, 0, 0);
    }
    auto weight = [&](int i) { return *p.w.at<Four>(i, 0, 0, 0); };
    auto stream = [&](int i, int h) { return *p.streams.at<Four>(i, h, t, 0); };
    Four factors = {}, streams[HELD == 1 ? HC : 1] = {};
    const bool early = HELD == 1 && blockIdx.y == 0 && threadIdx.x * 4 < n;
    if (early) factors = weight(threadIdx.x * 4);
    begin();
    if (early)
#pragma unroll
        for (int h = 0; h < HC; h++) streams[HELD == 1 ? h : 0] = stream(threadIdx.x * 4, h);
    __shared__ float totals[SUMS];
#pragma unroll 1
    for (int m = warp; m <= MIXES; m += blockDim.x / 32) {
        const float* row = p.sums + ((long long)t * SUMS + m) * p.n_sums;
        float sum = 0;
#pragma unroll 1
        for (int first = lane; first < p.n_sums; first += 128) {
            float x[4];
#pragma unroll
            for (int k = 0; k < 4; k++) x[k] = first + 32 * k < p.n_sums ? row[first + 32 * k] : 0;
            sum += x[0] + x[1] + (x[2] + x[3]);
        }
        sum = warp_reduce<Sum>(sum);
        if (lane == 0) totals[m] = sum;
    }
    __syncthreads();
    // Each warp has all sums, lane l sum l.
    const float mean = __fdividef(totals[MIXES], HC * n);
    const float logit = lane < MIXES ? scale * (totals[lane] * rsqrtf(mean + p.flat_eps)) + base : 0;
    if (blockIdx.y == 1) {
        if (warp > 0) return;
        // Lane 2 HC + d + HC s has the logit of target d and source s; its neighbors, all targets.
        const int place = max(0, lane - 2 * HC), d = place % HC, s = place / HC;
        float top = __int_as_float(0xFF800000), sum = 0;  // -inf
#pragma unroll
        for (int k = 0; k < HC; k++)
            top = fmaxf(top, __shfl_sync(~0u, logit, 2 * HC + k + HC * s));
        const bool none = top == __int_as_float(0xFF800000);
        const float e = expf(logit - (none ? 0 : top));
#pragma unroll
        for (int k = 0; k < HC; k++) sum += __shfl_sync(~0u, e, 2 * HC + k + HC * s);
        const float own = (none ? e : __fdividef(e, sum)) + p.eps;
        float k[HC][HC], u[HC], v[HC], row = 0, column = 0;
#pragma unroll
        for (int i = 0; i < HC; i++)
#pragma unroll
            for (int j = 0; j < HC; j++) k[i][j] = __shfl_sync(~0u, own, 2 * HC + i + HC * j);
        sinkhorn_factors<HC>(k, u, v, p.eps, p.n_iter);
#pragma unroll
        for (int i = 0; i < HC; i++) {
            if (d == i) row = u[i];
            if (s == i) column = v[i];
        }
        if (lane >= 2 * HC && lane < MIXES)
            *p.maps.at<float>(d, 2 + s, t, 0) = own * row * column;
        return;
    }
    const float share = __fdividef(1 + kind, 1 + expf(-logit)) + (kind == 0 ? p.eps : 0);
    if (warp == 0 && lane < 2 * HC) *p.maps.at<float>(lane % HC, kind, t, 0) = share;
    float pre[HC];
#pragma unroll
    for (int h = 0; h < HC; h++) pre[h] = __shfl_sync(~0u, share, h);
    Four held[HELD];
    float squares = 0;
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int i = (threadIdx.x + k * blockDim.x) * 4;
        held[k] = Four{};
        if (i >= n) continue;
#pragma unroll
        for (int h = 0; h < HC; h++) {
            const Four part = HELD == 1 ? streams[HELD == 1 ? h : 0] : stream(i, h);
#pragma unroll
            for (int e = 0; e < 4; e++) held[k].v[e] += part.v[e] * pre[h];
        }
#pragma unroll
        for (int e = 0; e < 4; e++) squares += held[k].v[e] * held[k].v[e];
    }
    const float inverse = rsqrtf(__fdividef(block_reduce<Sum>(squares, 0), n) + p.norm_eps);
#pragma unroll
    for (int k = 0; k < HELD; k++) {
        const int i = (threadIdx.x + k * blockDim.x) * 4;
        if (i >= n) continue;
        if (HELD > 1) factors = weight(i);
#pragma unroll
        for (int e = 0; e < 4; e++) held[k].v[e] = held[k].v[e] * inverse * factors.v[e];
        *p.out.at<Four>(i, t, 0, 0) = held[k];
        if constexpr (FIXED)  // whole groups: 8 neighboring lanes are all here, or none is
            put_fixed<2>(held[k].v, p.fixed + ((long long)t * (n / 32) + i / 32) * group_bytes<2>);
    }
}
