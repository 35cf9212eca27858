// Rows of results that only another of our kernels reads, in half the bytes. A short row of n
// numbers is n f16, then room for n further words of 16 bits. A number that f16 cannot hold leaves
// the upper 27 bits of its f32: the sign and 10 bits in an f16 without value, 16 in the further
// word. Only these have a further word, and normally there are none, so memory sees n f16.
//
// Numbers are in units of their column's scale (halves.cuh) and of SHORT_UNIT. A column's largest
// entry is then 2^14 to 2^15, so a result is as exact as f16 from 2^-6 to 2^24. What lies below is
// wrong by at most 2^-17, less than the rounding of that entry alone if its weight is an f16 of
// full precision (2^-14). A result above needs 512 as the sum of a row's weights.
//
// Not taken: bf16 has an error of 3e-6 (NMSE), 1e-6 is what f16 products may have; a scale for 16
// rows of a column would take its warp 3 shuffles for two columns, 1,000 of a tile's 28,000 clocks;
// a bound by norms of weights needs these computed at loading.
#pragma once
#include "halves.cuh"

constexpr float SHORT_UNIT = 256;

// The size of two numbers, in the order of floats as words: NaN is the largest. f16 holds both if
// it is below SHORT_END.
constexpr unsigned SHORT_END = 0x477fe000;  // 65504
__device__ __forceinline__ unsigned size_of(float x, float y) {
    return __float_as_uint(fabsf(x) + fabsf(y));
}
__device__ __forceinline__ bool is_long(unsigned half) { return (half & 0x7c00) == 0x7c00; }

// Whether one of two f16 has a further word.
__device__ __forceinline__ bool have_long(unsigned halves) {
    return ((halves & 0x7c007c00) + 0x04000400 & 0x80008000) != 0;
}

// The f16 of a number, or what stands for it, and its further word above.
__device__ __forceinline__ unsigned to_short(float x) {
    const unsigned half = two_halves<__half>(x, 0.0f), bits = __float_as_uint(x);
    if (!is_long(half)) return half;
    return (bits >> 5) << 16 | (bits >> 16 & 0x8000) | 0x7c00 | (bits >> 21 & 0x3ff);
}
__device__ __forceinline__ float from_short(unsigned half, unsigned further) {
    if (!is_long(half)) return __half2float(__ushort_as_half((unsigned short)half));
    return __uint_as_float((half & 0x8000) << 16 | (half & 0x3ff) << 21 | further << 5);
}

// The unit of gated results: of what they would be if weights were 2^-5 and columns of few large
// numbers. `by` brings such a result to about 2^10.
__device__ __forceinline__ RowScale gated_unit(float column_scale) {
    const int log = (__float_as_int(column_scale) >> 23) - 127 + 14;  // of the largest number
    const int unit = min(max(2 * log - 14, -112), 112);
    return {__int_as_float((127 - unit) << 23), __int_as_float((127 + unit) << 23)};
}

__device__ __forceinline__ float2 two_floats(unsigned halves) {
    const __half2 both = *(const __half2*)&halves;
    return make_float2(__half2float(both.x), __half2float(both.y));
}

// Reads two adjacent numbers of which `halves` are the f16.
__device__ __forceinline__ float2 two_short(unsigned halves, const char* at, int further) {
    if (!have_long(halves)) return two_floats(halves);
    const unsigned more = *(const unsigned*)(at + further);
    return make_float2(from_short(halves & 0xffff, more & 0xffff),
                       from_short(halves >> 16, more >> 16));
}
