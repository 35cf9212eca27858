// A row that a norm has yet to scale, for kernels that multiply by it without a launch for the norm.
//
// rms_norm(x) * weight = factor * (weight * x), and neither fixed point nor a product depends on a
// factor. So a kernel makes weight * x fixed point, or multiplies by it, while it adds up squares,
// and what waits for the sum is one multiplication of the result.
#pragma once
#include "fixed_point.cuh"

// Weights are so much smaller that products of finite numbers do not overflow. Where only the sum of
// squares does, the factor is 0 and the row is, too, as that of rms_norm.
constexpr float SMALL = 1.0f / 65536;

// x, plus `plus` if present, of n elements; all rows have adjacent elements. part: 1 / n.
struct NormedRow {
    const float *x, *plus, *weight;
    float eps, part;
    int n;
};

__device__ __forceinline__ Pack<float, 4> weights_at(const NormedRow& r, int i) {
    Pack<float, 4> w = four_at(r.weight + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) w.v[j] *= SMALL;
    return w;
}
__device__ __forceinline__ Pack<float, 4> values_at(const NormedRow& r, int i) {
    Pack<float, 4> own = four_at(r.x + i);
    if (r.plus) {
        const Pack<float, 4> part = four_at(r.plus + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) own.v[j] += part.v[j];
    }
    return own;
}
__device__ __forceinline__ float factor_of(const NormedRow& r, float squares) {
    return rsqrtf(fmaf(squares, r.part, r.eps)) / SMALL;
}
__device__ __forceinline__ float squares_of(const Pack<float, 4>& x) {
    return fmaf(x.v[0], x.v[0], fmaf(x.v[1], x.v[1], fmaf(x.v[2], x.v[2], x.v[3] * x.v[3])));
}
__device__ __forceinline__ void multiply(Pack<float, 4>& x, const Pack<float, 4>& by) {
#pragma unroll
    for (int j = 0; j < 4; ++j) x.v[j] *= by.v[j];
}
