// Encodes f32 to blocks of 32, by the same f32 operations as the NumPy codecs: one warp per block,
// one lane per weight.
#pragma once
#include "blocks.cuh"

namespace file {

// A single store: every block type that can be written has an even size. (Written as two bytes, the
// low one came out as zero on an H200 with NVRTC 13.0.)
__device__ __forceinline__ void put_half(unsigned char* p, float x) { *(__half*)p = __float2half_rn(x); }
__device__ __forceinline__ float warp_max(float x) { return warp_reduce<Max>(x); }
__device__ __forceinline__ float inverse(float d) { return d == 0 ? 0 : __fdiv_rn(1, d); }

// The entry of largest magnitude, with its sign; the first one among equals.
__device__ __forceinline__ float warp_largest(float x) {
    unsigned top = __ballot_sync(~0u, fabsf(x) == warp_max(fabsf(x)));
    return __shfl_sync(~0u, x, (__ffs(top) - 1) & 31);
}
// Stores the 4-bit codes of a warp's lanes: 16 low nibbles, then 16 high ones.
__device__ __forceinline__ void put_nibbles(unsigned char* field, int q, int lane) {
    int high = __shfl_down_sync(~0u, q, 16);
    if (lane < 16) field[lane] = (q & 15) | (high & 15) << 4;
}

template <class B>
struct Encoder;

// d = max|x| / 127, q = x / d rounded to nearest, ties away from zero.
template <>
struct Encoder<q8_0> {
    static __device__ __forceinline__ void put(float x, unsigned char* p, int lane) {
        float d = __fdiv_rn(warp_max(fabsf(x)), 127);
        p[2 + lane] = (unsigned char)(signed char)roundf(times(x, inverse(d)));
        if (lane == 0) put_half(p, d);
    }
};

// q4_0, q5_0: d = (the largest x) / -2^(BITS-1). q4_1, q5_1: d = (max - min) / (2^BITS - 1).
template <int BITS, bool AFFINE>
struct Encoder<Linear<BITS, AFFINE>> {
    static __device__ __forceinline__ void put(float x, unsigned char* p, int lane) {
        constexpr int MOST = (1 << BITS) - 1, MIDDLE = 1 << (BITS - 1), BYTES = Linear<BITS, AFFINE>::BYTES;
        float d, low = 0;
        if (AFFINE) {
            low = -warp_max(-x);
            d = __fdiv_rn(__fsub_rn(warp_max(x), low), MOST);
        } else {
            d = __fdiv_rn(warp_largest(x), -MIDDLE);
        }
        float scaled = times(__fsub_rn(x, low), inverse(d));
        int q = min(MOST, max(0, (int)__fadd_rn(scaled, AFFINE ? 0.5f : MIDDLE + 0.5f)));
        put_nibbles(p + BYTES - 16, q, lane);
        unsigned fifth = __ballot_sync(~0u, q >> 4);
        if (BITS == 5 && lane < 4) p[BYTES - 20 + lane] = fifth >> 8 * lane & 255;
        if (lane == 0) {
            put_half(p, d);
            if (AFFINE) put_half(p + 2, low);
        }
    }
};

// The code of the level nearest to v; ties go up.
__device__ __forceinline__ int nearest_level(float v) {
    int code = 0;
    for (int k = 1; k < 16; k++) code += v >= (IQ4_LEVELS[k] + IQ4_LEVELS[k - 1]) * 0.5f;
    return code;
}
// Adds the lanes' values one after the other, as the NumPy codec does: rounding decides ties.
__device__ __forceinline__ float warp_chain(float x) {
    float sum = __shfl_sync(~0u, x, 0);
    for (int k = 1; k < 32; k++) sum = __fadd_rn(sum, __shfl_sync(~0u, x, k));
    return sum;
}
// Tries 16 scales: one maps the largest entry to +127, the others map it near -127. Each gives
// codes and the best d for them; the best of all wins.
template <>
struct Encoder<iq4_nl> {
    static __device__ __forceinline__ void put(float x, unsigned char* p, int lane) {
        float largest = warp_largest(x), w = times(x, x), d = 0, best = 0;
        if (fabsf(largest) < 1e-15f) largest = 0;
        for (int trial = 0; trial < 16 && largest != 0; trial++) {
            float scale = __fdiv_rn(trial ? trial - 135.0f : 127.0f, largest);
            float level = IQ4_LEVELS[nearest_level(times(x, scale))], product = times(w, level);
            float lx = warp_chain(times(product, x)), ll = warp_chain(times(level, product));
            if (trial == 0 || times(lx, lx) > times(best, ll)) d = __fdiv_rn(lx, ll), best = times(d, lx);
        }
        put_nibbles(p + 2, nearest_level(times(x, inverse(d))), lane);
        if (lane == 0) put_half(p, d);
    }
};

}  // namespace file
