// Rotary position embedding of one pair.
#pragma once
#include "common.cuh"

struct Rope {
    int n_dims, offset;
    float step;        // freq_base^(-2 / n_dims)
    float freq_scale;
    float magnitude;   // of cos and sin
    float ext_factor;  // 0: no YaRN
    float low, width;  // of its ramp
};

// Angle of a pair, each pair's from the one before, in f32, as ggml does it.
__device__ __forceinline__ float angle_of(int pair, int position, const float* factors,
                                          const Rope& r) {
    float theta = (float)position;
    for (int i = 0; i < pair; i++) theta = __fmul_rn(theta, r.step);
    if (factors) theta /= factors[pair];
    float scaled = theta * r.freq_scale;
    if (r.ext_factor == 0) return scaled;
    float kept = (1 - fminf(fmaxf((pair - r.low) / r.width, 0.0f), 1.0f)) * r.ext_factor;
    return scaled * (1 - kept) + theta * kept;
}

// Unit `unit` of the (n + 1) / 2 of a row: a pair turned, or two elements that stay. NEOX: a pair is
// (i, i + n_dims / 2), else (2 i, 2 i + 1). get(i) reads an element, put(i, x) writes one.
template <bool NEOX, class Get, class Put>
__device__ __forceinline__ void turn(const Rope& r, int unit, int n, int position,
                                     const float* factors, Get get, Put put) {
    const int half = r.n_dims / 2;
    if (unit >= half) {
        int e = 2 * (unit - half);
        if (e >= r.offset) e += r.n_dims;
        for (int k = e; k < e + 2 && k < n; k++) put(k, get(k));
        return;
    }
    float s, c;
    sincosf(angle_of(unit, position, factors, r), &s, &c);
    s *= r.magnitude, c *= r.magnitude;
    const int first = r.offset + (NEOX ? unit : 2 * unit), second = first + (NEOX ? half : 1);
    const float x = get(first), z = get(second);
    put(first, x * c - z * s);
    put(second, x * s + z * c);
}
