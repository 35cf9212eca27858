// Rows that products on the tensor cores read: f16 or bf16, scaled by a power of two that brings a
// row's largest entry to [2^14, 2^15), so nothing overflows f16 and little precision is lost. Each
// run of 16 is in the order of a thread's weights: 0 1 4 5 8 9 12 13, 2 3 6 7 10 11 14 15.
#pragma once
#include "common.cuh"

template <class H>
__device__ __forceinline__ unsigned two_halves(float x, float y) {
    if constexpr (Same<H, __half>::yes) {
        const __half2 both = __floats2half2_rn(x, y);
        return *(const unsigned*)&both;
    } else {
        const __nv_bfloat162 both = __floats2bfloat162_rn(x, y);
        return *(const unsigned*)&both;
    }
}

// Where element i of a row is, in elements.
__device__ __forceinline__ int place_in_row(int i) {
    const int pair = i % 16 / 2;
    return i / 16 * 16 + pair % 2 * 8 + pair / 2 * 2 + i % 2;
}

// The largest magnitude so far; infinity and NaN do not count.
__device__ __forceinline__ float finite_most(float most, float x) {
    return fabsf(x) <= 3.4028235e38f ? fmaxf(most, fabsf(x)) : most;
}

// The factor of a row whose largest entry is `most`, and that of its results.
struct RowScale {
    float by, back;
};
__device__ __forceinline__ RowScale row_scale(float most) {
    // Exponents of floats: that of `most` is 127 + its logarithm, or 0 below 2^-126.
    const int log = (__float_as_int(most) >> 23) - 127;
    const int exponent = most > 0.0f ? min(max(14 - log, -126), 126) : 0;
    return {__int_as_float((127 + exponent) << 23), __int_as_float((127 - exponent) << 23)};
}
