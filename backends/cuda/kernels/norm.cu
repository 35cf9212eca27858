// Normalization of rows: one block per row.
// @kernel hot rms_norm<{1|4}, {0|1|2|4}, {true|false}, PLAIN>
// @kernel hot rms_norm<4, {1|2|4}, true, {FIXED|HALVES}>
// @kernel hot layer_norm<{1|4}, {0|1|2|4}>
#include "rms.cuh"

// x = a, or a + plus if present; the rest is said at `normalize`. A thread takes V adjacent elements
// at a time; the result may overwrite `a` or `plus`.
template <int V, int HELD, bool WEIGHTED, Also ALSO>
__global__ void __launch_bounds__(1024) rms_norm(Tensor out, Tensor a, Tensor w, float eps,
                                                 Tensor plus, Tensor total, unsigned char* also,
                                                 float* scales) {
    if (WEIGHTED && threadIdx.x * V < out.ne[0]) fetch_early(w.data + threadIdx.x * V * w.nb[0]);
    begin();
    int i1 = blockIdx.x % out.ne[1], i2 = blockIdx.x / out.ne[1], i3 = blockIdx.y;
    const char *x = a.row<char>(i1, i2, i3), *more = plus.row<char>(i1, i2, i3);
    normalize<V, HELD, WEIGHTED, ALSO>(out, w, eps, total, also, scales, i1, i2, i3, [&](int i) {
        Pack<float, V> pack = *(const Pack<float, V>*)(x + i * a.nb[0]);
        if (plus.data) {
            Pack<float, V> part = *(const Pack<float, V>*)(more + i * plus.nb[0]);
#pragma unroll
            for (int k = 0; k < V; k++) pack.v[k] += part.v[k];
        }
        return pack;
    });
}

// y = (x - mean) / sqrt(var + eps), times the row w and plus the row b if these are present.
// The mean of f32 is off by its rounding. One reduction gives it; the next gives the mean of x -
// mean, which corrects it, together with the variance. So a constant row is exactly 0 without a
// third reduction. Rows, packs and HELD as in rms_norm.
template <int V, int HELD>
__global__ void __launch_bounds__(1024)
layer_norm(Tensor out, Tensor a, Tensor w, Tensor b, float eps) {
    begin();
    int i1 = blockIdx.x % out.ne[1], i2 = blockIdx.x / out.ne[1], i3 = blockIdx.y, n = out.ne[0];
    const char* x = a.row<char>(i1, i2, i3);
    char* y = out.row<char>(i1, i2, i3);
    auto pack_at = [](const char* row, long long nb, int i) { return *(const Pack<float, V>*)(row + i * nb); };
    Pack<float, V> held[HELD ? HELD : 1];
    // Calls f(pack, i) for each pack of this thread.
    auto each = [&](auto f) {
#pragma unroll
        for (int p = 0; p < (HELD ? HELD : 1); p++)
            for (int i = (threadIdx.x + p * blockDim.x) * V; i < n; i += blockDim.x * V) {
                f(held[p], i);
                if (HELD) break;
            }
    };
    float sum = 0;
    each([&](Pack<float, V>& pack, int i) {
        pack = pack_at(x, a.nb[0], i);
#pragma unroll
        for (int k = 0; k < V; k++) sum += pack.v[k];
    });
    float mean = block_reduce<Sum>(sum, 0) / n, rest = 0, squares = 0;
    each([&](Pack<float, V>& pack, int i) {
        if (!HELD) pack = pack_at(x, a.nb[0], i);
#pragma unroll
        for (int k = 0; k < V; k++) {
            float d = pack.v[k] - mean;
            rest += d;
            squares += d * d;
        }
    });
    rest = block_reduce<Sum>(rest, 0) / n;
    float var = block_reduce<Sum>(squares, 0) / n - rest * rest;
    float scale = sqrtf((var < 0 ? 0 : var) + eps);
    if (scale == 0) scale = 1;
    each([&](Pack<float, V>& pack, int i) {
        if (!HELD) pack = pack_at(x, a.nb[0], i);
#pragma unroll
        for (int k = 0; k < V; k++) pack.v[k] = (pack.v[k] - mean - rest) / scale;
        if (w.data) {
            Pack<float, V> part = pack_at(w.data, w.nb[0], i);
#pragma unroll
            for (int k = 0; k < V; k++) pack.v[k] *= part.v[k];
        }
        if (b.data) {
            Pack<float, V> part = pack_at(b.data, b.nb[0], i);
#pragma unroll
            for (int k = 0; k < V; k++) pack.v[k] += part.v[k];
        }
        *(Pack<float, V>*)(y + i * out.nb[0]) = pack;
    });
}
