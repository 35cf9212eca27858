// Normalization of rows: one block per row.
// @kernel hot rms_norm<{1|4}, {0|1|2|4}, {true|false}, false>
// @kernel hot rms_norm<4, {1|2|4}, true, true>
// @kernel hot layer_norm<{1|4}, {0|1|2|4}>
#include "fixed_point.cuh"

// x = a, or a + plus if present; x is stored in `total` if present.
// y = x / sqrt(mean(x^2) + eps). WEIGHTED: times the row w. FIXED: also stored as fixed-point
// groups.
// A thread takes V adjacent elements at a time; the result may overwrite `a` or `plus`. A thread
// keeps its HELD packs of the row in registers; longer rows are read twice (HELD 0).
template <int V, int HELD, bool WEIGHTED, bool FIXED>
__global__ void __launch_bounds__(1024) rms_norm(Tensor out, Tensor a, Tensor w, float eps,
                                                 Tensor plus, Tensor total, unsigned char* fixed) {
    const int n = out.ne[0];
    if (WEIGHTED && threadIdx.x * V < n) fetch_early(w.data + threadIdx.x * V * w.nb[0]);
    begin();
    int i1 = blockIdx.x % out.ne[1], i2 = blockIdx.x / out.ne[1], i3 = blockIdx.y;
    const char *x = a.row<char>(i1, i2, i3), *more = plus.row<char>(i1, i2, i3);
    char *y = out.row<char>(i1, i2, i3), *sums = total.row<char>(i1, i2, i3);
    auto load = [&](int i) {
        Pack<float, V> pack = *(const Pack<float, V>*)(x + i * a.nb[0]);
        if (plus.data) {
            Pack<float, V> part = *(const Pack<float, V>*)(more + i * plus.nb[0]);
#pragma unroll
            for (int k = 0; k < V; k++) pack.v[k] += part.v[k];
        }
        return pack;
    };
    auto weight = [&](int i) { return *(const Pack<float, V>*)(w.data + i * w.nb[0]); };
    Pack<float, V> held[HELD ? HELD : 1], factors;
    float sum = 0;
#pragma unroll
    for (int p = 0; p < (HELD ? HELD : 1); p++)
        for (int i = (threadIdx.x + p * blockDim.x) * V; i < n; i += blockDim.x * V) {
            held[p] = load(i);
            if (WEIGHTED && HELD == 1) factors = weight(i);  // not behind the reduction
            if (total.data) *(Pack<float, V>*)(sums + i * total.nb[0]) = held[p];
#pragma unroll
            for (int k = 0; k < V; k++) sum += held[p].v[k] * held[p].v[k];
            if (HELD) break;
        }
    float scale = sqrtf(block_reduce<Sum>(sum, 0) / n + eps);
#pragma unroll
    for (int p = 0; p < (HELD ? HELD : 1); p++)
        for (int i = (threadIdx.x + p * blockDim.x) * V; i < n; i += blockDim.x * V) {
            if (!HELD) held[p] = load(i);
            if (WEIGHTED && HELD != 1) factors = weight(i);
#pragma unroll
            for (int k = 0; k < V; k++) {
                held[p].v[k] /= scale;
                if (WEIGHTED) held[p].v[k] *= factors.v[k];
            }
            *(Pack<float, V>*)(y + i * out.nb[0]) = held[p];
            if constexpr (FIXED) {  // whole groups: 8 neighboring lanes are all here, or none is
                long long row = i1 + (long long)out.ne[1] * (i2 + (long long)out.ne[2] * i3);
                put_fixed<2>(held[p].v, fixed + (row * (n / 32) + i / 32) * group_bytes<2>);
            }
            if (HELD) break;
        }
}

// y = (x - mean) / sqrt(var + eps), times the row w and plus the row b if these are present.
// The mean of f32 is off by its rounding. One reduction gives it; the next gives the mean of x -
// mean, which corrects it, together with the variance. So a constant row is exactly 0 without a
// third reduction. Rows, packs and HELD as above.
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
