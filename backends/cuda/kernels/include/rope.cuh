// Rotary position embedding of one pair.
#pragma once
#include "common.cuh"

struct Rope {
    double step;  // freq_base^(-2 / n_dims)
    double freq_scale;
    double ext_factor;  // 0: no YaRN
    double low, width;  // of the YaRN ramp
    float magnitude;    // factor on cos and sin
    int n_dims, offset;
};

// Half turns of a pair per position. Two designs for angles. (a) A chain of f32 products, each
// pair's angle from the previous one, as in ggml. Its error grows with the position (NMSE of the
// result 2.7e-6 at 163,840, 9e-5 at 1,000,000), and the sine of a large f32 is slow. (b) A few
// products in f64: accurate at every position, and no chain as long as the pair's number: taken.
// Products and the quotient in f64 are slow one by one. But only the last product needs the
// position; call this before waiting for the predecessor.
__device__ __forceinline__ double frequency_of(int pair, const Rope& r) {
    double frequency = 0.31830988618379067154, step = r.step;  // 1 / pi
    for (int i = pair; i; i /= 2, step *= step)
        if (i % 2) frequency *= step;
    double scale = r.freq_scale;
    if (r.ext_factor != 0) {
        const double kept = (1 - fmin(fmax((pair - r.low) / r.width, 0.0), 1.0)) * r.ext_factor;
        scale = scale * (1 - kept) + kept;
    }
    frequency *= scale;
    asm volatile("" : "+d"(frequency));  // keep it before the wait
    return frequency;
}
// The angle of a pair in half turns, without whole turns. factors: divide the frequencies; data is
// null if absent.
__device__ __forceinline__ float angle_of(int pair, double frequency, int position,
                                          const Tensor& factors) {
    double halves = position * frequency;
    if (factors.data) halves /= *factors.at<float>(pair, 0, 0, 0);
    return halves - 2 * rint(halves / 2);
}

// Computes unit `unit` of the (n + 1) / 2 units of a row: rotates a pair, or copies two elements
// outside the rotated part, which are the last units. NEOX: the pair is (i, i + n_dims / 2), else (2 i, 2 i + 1). frequency:
// `frequency_of` the unit; get(i) reads an element, put(i, x) writes one.
template <bool NEOX, class Get, class Put>
__device__ __forceinline__ void turn(const Rope& r, int unit, double frequency, int n, int position,
                                     const Tensor& factors, Get get, Put put) {
    const int half = r.n_dims / 2;
    if (unit >= half) {
        int e = 2 * (unit - half);
        if (e >= r.offset) e += r.n_dims;
        for (int k = e; k < e + 2 && k < n; k++) put(k, get(k));
        return;
    }
    float s, c;
    sincospif(angle_of(unit, frequency, position, factors), &s, &c);
    s *= r.magnitude, c *= r.magnitude;
    const int first = r.offset + (NEOX ? unit : 2 * unit), second = first + (NEOX ? half : 1);
    const float x = get(first), z = get(second);
    put(first, x * c - z * s);
    put(second, x * s + z * c);
}
