// Normalization of a row by a block, shared by rms_norm (norm.cu) and sums over GPUs (peer_sum.cu).
#pragma once
#include "fixed_point.cuh"
#include "halves.cuh"

// What a norm writes besides the result: groups of fixed point, or rows of f16 and their scales, of
// whole runs of 16.
enum Also { PLAIN, FIXED, HALVES };

// y = x / sqrt(mean(x^2) + eps); row (i1, i2, i3) of `out`. load(i): V adjacent elements of x from
// element i; x is stored in `total` if present. WEIGHTED: times the row w. A thread keeps its HELD
// packs of the row in registers; longer rows are read twice (HELD 0). The result may overwrite what
// load reads; with HALVES, `out` may be null.
template <int V, int HELD, bool WEIGHTED, Also ALSO, class Load>
__device__ __forceinline__ void normalize(const Tensor& out, const Tensor& w, float eps,
                                          const Tensor& total, unsigned char* also, float* scales,
                                          int i1, int i2, int i3, Load load) {
    const int n = out.ne[0];
    char *y = out.row<char>(i1, i2, i3), *sums = total.row<char>(i1, i2, i3);
    auto weight = [&](int i) { return *(const Pack<float, V>*)(w.data + i * w.nb[0]); };
    Pack<float, V> held[HELD ? HELD : 1], factors;
    float sum = 0;
#pragma unroll
    for (int p = 0; p < (HELD ? HELD : 1); p++)
        for (int i = (threadIdx.x + p * blockDim.x) * V; i < n; i += blockDim.x * V) {
            held[p] = load(i);
            if (WEIGHTED && HELD == 1) factors = weight(i);  // not behind the reduction
            if (total.data) *(Pack<float, V>*)(sums + i * total.nb[0]) = held[p];
#pragma unroll
            for (int k = 0; k < V; k++) sum += held[p].v[k] * held[p].v[k];
            if (HELD) break;
        }
    float scale = sqrtf(block_reduce<Sum>(sum, 0) / n + eps), most = 0;
    const long long row = i1 + (long long)out.ne[1] * (i2 + (long long)out.ne[2] * i3);
#pragma unroll
    for (int p = 0; p < (HELD ? HELD : 1); p++)
        for (int i = (threadIdx.x + p * blockDim.x) * V; i < n; i += blockDim.x * V) {
            if (!HELD) held[p] = load(i);
            if (WEIGHTED && HELD != 1) factors = weight(i);
#pragma unroll
            for (int k = 0; k < V; k++) {
                held[p].v[k] /= scale;
                if (WEIGHTED) held[p].v[k] *= factors.v[k];
                if (ALSO == HALVES) most = finite_most(most, held[p].v[k]);
            }
            if (ALSO != HALVES || out.data) *(Pack<float, V>*)(y + i * out.nb[0]) = held[p];
            if constexpr (ALSO == FIXED)  // whole groups: 8 neighboring lanes are all here, or none
                put_fixed<2>(held[p].v, also + (row * (n / 32) + i / 32) * group_bytes<2>);
            if (HELD) break;
        }
    if constexpr (ALSO == HALVES) {
        const RowScale by = row_scale(block_reduce<Max>(most, 0.0f));
        if (threadIdx.x == 0) scales[row] = by.back;
#pragma unroll
        for (int p = 0; p < HELD; p++) {
            const int i = (threadIdx.x + p * blockDim.x) * V;
            if (i >= n) break;
            unsigned* to = (unsigned*)also + (row * n + i / 16 * 16) / 2 + i % 16 / 4;
            to[0] = two_halves<__half>(held[p].v[0] * by.by, held[p].v[1] * by.by);
            to[4] = two_halves<__half>(held[p].v[2] * by.by, held[p].v[3] * by.by);
        }
    }
}

// -- rows in registers: a thread has eight adjacent elements --------------------------------------------

constexpr int EACH = 8;
struct alignas(16) EightFloats {
    float v[EACH];
};
// Elements i to i + 7 of a row, adjacent and at a multiple of 16 bytes; 0 if there is no tensor. Nobody
// reads them again: they leave L2 first.
__device__ __forceinline__ EightFloats eight_of(const Tensor& x, int row, int i) {
    if (!x.data) return {};
    const float4* const at = (const float4*)(x.row<float>(row, 0, 0) + i);
    const float4 a = __ldcs(at), b = __ldcs(at + 1);
    return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
// SOON: whether others read them soon.
template <bool SOON = true>
__device__ __forceinline__ void put_eight(const Tensor& x, int row, int i, const float (&v)[EACH]) {
#pragma unroll
    for (int k = 0; k < EACH; k += 4) {
        float4* const to = (float4*)(x.row<float>(row, 0, 0) + i + k);
        const float4 own = make_float4(v[k], v[k + 1], v[k + 2], v[k + 3]);
        if (SOON) *to = own;
        else __stcs(to, own);
    }
}

// What a norm leaves: y = x / sqrt(mean(x^2) + eps) * w, as rows of f16 and their scales (halves.cuh),
// and as f32 if `y` is present.
struct Normed {
    Tensor y, w;
    float eps;
    unsigned* halves;
    float* scales;
};

__device__ __forceinline__ void put_normed(const Normed& norm, float (&x)[EACH], int n, int token,
                                           int i) {
    float squares = 0, most = 0, weights[EACH] = {};
#pragma unroll
    for (int k = 0; k < EACH; ++k) squares += x[k] * x[k];
    if (i < n)
#pragma unroll
        for (int v = 0; v < EACH; v += 4)
            *(float4*)(weights + v) = *(const float4*)(norm.w.data + 4 * (i + v));
    const float factor = 1.0f / sqrtf(block_reduce<Sum>(squares, 0) / n + norm.eps);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        x[k] = x[k] * factor * weights[k];
        most = finite_most(most, x[k]);
    }
    const RowScale by = row_scale(block_reduce<Max>(most, 0.0f));
    if (threadIdx.x == 0) norm.scales[token] = by.back;
    if (i >= n) return;
    if (norm.y.data) put_eight(norm.y, token, i, x);
    // Pairs of a run of 16 are in the order 0 2 4 6 1 3 5 7.
    unsigned* const to = norm.halves + (token * (long long)n + i / 16 * 16) / 2 + i % 16 / 4;
    const auto pair = [&](int k) { return two_halves<__half>(x[k] * by.by, x[k + 1] * by.by); };
    *(uint2*)to = make_uint2(pair(0), pair(4));
    *(uint2*)(to + 4) = make_uint2(pair(2), pair(6));
}
