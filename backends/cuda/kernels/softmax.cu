// soft_max_ext: one block per row, 32 scores a thread. Scores of up to 32 * 1024 keys stay in
// registers: each is read once and its exponential computed once. Longer rows take rounds, keep a
// running maximum and are read again to be written. The result may overwrite the scores, also in a
// narrower type with rows as far apart: a round is read before any of it is written. M: the mask's
// type; int: causal, from positions, and then scores that it hides are not read. A NaN or +inf that
// is read makes the whole row NaN: fmaxf ignores NaN, but the sum keeps it.
// Traffic: the seen scores once, the result once; the mask, if any, from L2.
// @kernel hot softmax<{float|__half}, {float|__half|__nv_bfloat16}, 4>
// @kernel hot softmax<int, {__half|__nv_bfloat16}, 4>
// @kernel softmax<{float|__half}, {float|__half|__nv_bfloat16}, 1>
// @kernel softmax<int, {__half|__nv_bfloat16}, 1>
#include "common.cuh"

// A tensor; strides in bytes. window: of a causal mask, how many positions a row sees.
struct Softmax {
    const char *a, *mask, *sinks;
    char *y;
    long long nb_a[4], nb_mask[4], nb_y[3], nb_sinks;
    int n, mask_heads, mask_batch, head0, n_head, window;
    float scale, max_bias;
};

template <class M, class Y, int VEC>
__global__ void __launch_bounds__(1024) softmax(const __grid_constant__ Softmax p) {
    begin();
    constexpr int EACH = 32;
    const float infinity = __int_as_float(0x7f800000);
    const int i = blockIdx.x, h = blockIdx.y, s = blockIdx.z, round = blockDim.x * EACH;
    const char *a = p.a + i * p.nb_a[1] + h * p.nb_a[2] + s * p.nb_a[3];
    const char *mask = p.mask ? p.mask + i * p.nb_mask[1] + h % p.mask_heads * p.nb_mask[2] +
                                    s % p.mask_batch * p.nb_mask[3]
                              : nullptr;
    Y *y = (Y *)(p.y + i * p.nb_y[0] + h * p.nb_y[1] + s * p.nb_y[2]);
    float slope = 1;
    if (p.max_bias > 0) {
        const int power = 1 << (31 - __clz(p.n_head)), g = p.head0 + h;
        slope = exp2f(-p.max_bias * (g < power ? g + 1 : g - power + 0.5f) / power);
    }
    int first = 0, end = p.n;  // the keys that the row sees
    if constexpr (Same<M, int>::yes) {
        const int pos = *(const int *)mask;
        end = pos < p.n ? pos + 1 : p.n, first = pos < p.window ? 0 : pos - p.window + 1;
    }
    const long long step = VEC == 1 ? p.nb_a[0] : 4, mask_step = VEC == 1 ? p.nb_mask[0] : sizeof(M);
    const auto key = [&](int from, int v) {
        return from + (v * (int)blockDim.x + (int)threadIdx.x) * VEC;
    };
    float x[EACH] = {};  // a row that sees no key loads none
    // Loads the thread's scores of a round.
    const auto load = [&](int from) {
#pragma unroll
        for (int v = 0; v < EACH / VEC; ++v) {
            const int j = key(from, v);
            Pack<float, VEC> score = {};
            Pack<M, VEC> bias = {};
            if (j < end && j + VEC > first) {
                score = *(const Pack<float, VEC> *)(a + j * step);
                if (!Same<M, int>::yes && mask) bias = *(const Pack<M, VEC> *)(mask + j * mask_step);
            }
#pragma unroll
            for (int e = 0; e < VEC; ++e) {
                float &z = x[v * VEC + e];
                z = score.v[e] * p.scale;
                if (!Same<M, int>::yes && mask) z += slope * to_f32(bias.v[e]);
                if (j + e >= end || j + e < first) z = -infinity;
            }
        }
    };
    float m = -infinity, l = 0;  // the thread's largest score, and its sum of exponentials
    for (int from = 0; from < end; from += round) {
        load(from);
        float top = m;
#pragma unroll
        for (int e = 0; e < EACH; ++e) top = fmaxf(top, x[e]);
        const float base = top == -infinity ? 0 : top;
        l *= expf(m - base);
#pragma unroll
        for (int e = 0; e < EACH; ++e) l += x[e] = expf(x[e] - base);
        m = top;
    }
    const float sink = p.sinks ? *(const float *)(p.sinks + h * p.nb_sinks) : -infinity;
    const float top = fmaxf(block_reduce<Max>(m, -infinity), sink), base = top == -infinity ? 0 : top;
    const float total = block_reduce<Sum>(l * expf(m - base), 0) + expf(sink - base);
    float factor = total == 0 ? 0 : 1 / total;
    const bool held = p.n <= round;
    if (held && m > -infinity) factor *= expf(m - base);
    for (int from = 0; from < p.n; from += round) {
        if (!held) {
            load(from);
#pragma unroll
            for (int e = 0; e < EACH; ++e) x[e] = expf(x[e] - base);
            __syncthreads();
        }
#pragma unroll
        for (int v = 0; v < EACH / VEC; ++v) {
            const int j = key(from, v);
            if (j >= p.n) continue;
            Pack<Y, VEC> part;
#pragma unroll
            for (int e = 0; e < VEC; ++e) part.v[e] = from_f32<Y>(x[v * VEC + e] * factor);
            *(Pack<Y, VEC> *)(y + j) = part;
        }
    }
}
