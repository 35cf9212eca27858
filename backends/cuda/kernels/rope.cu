// Rotary position embedding: a thread for each pair, and for each two elements that stay.
//
// @kernel rope<{float|__half}, {true|false}>
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
__device__ __forceinline__ float angle_of(int pair, int position, const float* factors, const Rope& r) {
    float theta = (float)position;
    for (int i = 0; i < pair; i++) theta = __fmul_rn(theta, r.step);
    if (factors) theta /= factors[pair];
    float scaled = theta * r.freq_scale;
    if (r.ext_factor == 0) return scaled;
    float kept = (1 - fminf(fmaxf((pair - r.low) / r.width, 0.0f), 1.0f)) * r.ext_factor;
    return scaled * (1 - kept) + theta * kept;
}

// NEOX: a pair is (i, i + n_dims / 2), else (2 i, 2 i + 1). The result may lie where `a` lies.
template <class T, bool NEOX>
__global__ void __launch_bounds__(256)
    rope(Tensor out, Tensor a, Tensor pos, const float* factors, Rope r) {
    int half = r.n_dims / 2, units = (out.ne[0] + 1) / 2;
    int i = blockIdx.y * 256 + threadIdx.x;
    if (i >= units * out.ne[1]) return;
    int unit = i % units, head = i / units, token = blockIdx.x, i3 = blockIdx.z;
    if (unit >= half) {
        int e = 2 * (unit - half);
        if (e >= r.offset) e += r.n_dims;
        for (int k = e; k < e + 2 && k < out.ne[0]; k++)
            *out.at<T>(k, head, token, i3) = *a.at<T>(k, head, token, i3);
        return;
    }
    float s, c, angle = angle_of(unit, *pos.at<int>(token, 0, 0, 0), factors, r);
    sincosf(angle, &s, &c);
    s *= r.magnitude, c *= r.magnitude;
    int first = r.offset + (NEOX ? unit : 2 * unit), second = first + (NEOX ? half : 1);
    float x = to_f32(*a.at<T>(first, head, token, i3)), z = to_f32(*a.at<T>(second, head, token, i3));
    *out.at<T>(first, head, token, i3) = from_f32<T>(x * c - z * s);
    *out.at<T>(second, head, token, i3) = from_f32<T>(x * s + z * c);
}
