// soft_max_ext: one block per row. The first pass finds the largest score and the sum of
// exponentials (online); the second writes the result and finds the row in a cache. It may
// overwrite its source. A NaN or +inf in a row makes the whole row NaN: fmaxf ignores NaN, but the
// sum keeps it.
// @kernel hot softmax<{float|__half}, {1|4}>
#include "common.cuh"

// A tensor; strides in bytes.
struct Softmax {
    const char *a, *mask, *sinks;
    char *y;
    long long nb_a[4], nb_mask[4], nb_y[3], nb_sinks;
    int n, mask_heads, mask_batch, head0, n_head;
    float scale, max_bias;
};

template <class M, int VEC>
__global__ void __launch_bounds__(256) softmax(const __grid_constant__ Softmax p) {
    begin();
    const int i = blockIdx.x, h = blockIdx.y, s = blockIdx.z, t = threadIdx.x;
    const char *a = p.a + i * p.nb_a[1] + h * p.nb_a[2] + s * p.nb_a[3];
    const char *mask = p.mask ? p.mask + i * p.nb_mask[1] + h % p.mask_heads * p.nb_mask[2] +
                                    s % p.mask_batch * p.nb_mask[3]
                              : nullptr;
    float *y = (float *)(p.y + i * p.nb_y[0] + h * p.nb_y[1] + s * p.nb_y[2]);
    const float infinity = __int_as_float(0x7f800000);
    float slope = 1;
    if (p.max_bias > 0) {
        const int power = 1 << (31 - __clz(p.n_head)), g = p.head0 + h;
        slope = exp2f(-p.max_bias * (g < power ? g + 1 : g - power + 0.5f) / power);
    }
    // Loads VEC scores, starting at element j.
    const auto scores = [&](int j, float (&x)[VEC]) {
        if constexpr (VEC == 4) {
            const float4 v = *(const float4 *)(a + j * 4ll);
            x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
        } else {
            x[0] = *(const float *)(a + j * p.nb_a[0]);
        }
        M bias[VEC];
        if (mask) {
            if constexpr (VEC == 4 && sizeof(M) == 4)
                *(float4 *)bias = *(const float4 *)(mask + j * 4ll);
            else if constexpr (VEC == 4)
                *(float2 *)bias = *(const float2 *)(mask + j * 2ll);
            else
                bias[0] = *(const M *)(mask + j * p.nb_mask[0]);
        }
#pragma unroll
        for (int e = 0; e < VEC; ++e) {
            x[e] *= p.scale;
            if (mask) x[e] += slope * to_f32(bias[e]);
        }
    };
    float m = -infinity, l = 0;
    for (int j = t * VEC; j < p.n; j += 256 * VEC) {
        float x[VEC], top = m;
        scores(j, x);
#pragma unroll
        for (int e = 0; e < VEC; ++e) top = fmaxf(top, x[e]);
        const float base = top == -infinity ? 0 : top;
        l *= expf(m - base);
#pragma unroll
        for (int e = 0; e < VEC; ++e) l += expf(x[e] - base);
        m = top;
    }
    __shared__ float tops[8], totals[8];
    const auto join = [&](float m1, float l1) {
        const float top = fmaxf(m, m1), base = top == -infinity ? 0 : top;
        l = l * expf(m - base) + l1 * expf(m1 - base), m = top;
    };
#pragma unroll
    for (int d = 16; d; d /= 2) join(__shfl_xor_sync(~0u, m, d), __shfl_xor_sync(~0u, l, d));
    if (t % 32 == 0) tops[t / 32] = m, totals[t / 32] = l;
    __syncthreads();
    m = -infinity, l = 0;
#pragma unroll
    for (int w = 0; w < 8; ++w) join(tops[w], totals[w]);
    if (p.sinks) join(*(const float *)(p.sinks + h * p.nb_sinks), 1);
    const float factor = l == 0 ? 0 : 1 / l, base = m == -infinity ? 0 : m;
    for (int j = t * VEC; j < p.n; j += 256 * VEC) {
        float x[VEC];
        scores(j, x);
#pragma unroll
        for (int e = 0; e < VEC; ++e) x[e] = expf(x[e] - base) * factor;
        if constexpr (VEC == 4)
            *(float4 *)(y + j) = make_float4(x[0], x[1], x[2], x[3]);
        else
            y[j] = x[0];
    }
}
