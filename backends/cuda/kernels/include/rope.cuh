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

// The angle of a pair in half turns, without whole turns. Two designs. (a) A chain of f32 products,
// each pair's angle from the previous one, as in ggml. Its error grows with the position (NMSE of
// the result 2.7e-6 at 163,840, 9e-5 at 1,000,000), and the sine of a large f32 is slow. (b) A few
// products in f64: accurate at every position, and no chain as long as the pair's number: taken.
// factors: divide the frequencies; data is null if absent.
__device__ __forceinline__ float angle_of(int pair, int position, const Tensor& factors,
                                          const Rope& r) {
    double theta = position, step = r.step;
    for (int i = pair; i; i /= 2, step *= step)
        if (i % 2) theta *= step;
    if (factors.data) theta /= *factors.at<float>(pair, 0, 0, 0);
    double angle = theta * r.freq_scale;
    if (r.ext_factor != 0) {
        const double kept = (1 - fmin(fmax((pair - r.low) / r.width, 0.0), 1.0)) * r.ext_factor;
        angle = angle * (1 - kept) + theta * kept;
    }
    const double halves = angle * 0.31830988618379067154;  // 1 / pi
    return halves - 2 * rint(halves / 2);
}

// Computes unit `unit` of the (n + 1) / 2 units of a row: rotates a pair, or copies two elements
// outside the rotated part. NEOX: the pair is (i, i + n_dims / 2), else (2 i, 2 i + 1). get(i)
// reads an element, put(i, x) writes one.
template <bool NEOX, class Get, class Put>
__device__ __forceinline__ void turn(const Rope& r, int unit, int n, int position,
                                     const Tensor& factors, Get get, Put put) {
    const int half = r.n_dims / 2;
    if (unit >= half) {
        int e = 2 * (unit - half);
        if (e >= r.offset) e += r.n_dims;
        for (int k = e; k < e + 2 && k < n; k++) put(k, get(k));
        return;
    }
    float s, c;
    sincospif(angle_of(unit, position, factors, r), &s, &c);
    s *= r.magnitude, c *= r.magnitude;
    const int first = r.offset + (NEOX ? unit : 2 * unit), second = first + (NEOX ? half : 1);
    const float x = get(first), z = get(second);
    put(first, x * c - z * s);
    put(second, x * s + z * c);
}
