// Normalization of rows: one block per row.
// @kernel hot rms_norm<{1|4}, {0|1|2|4}, {true|false}, PLAIN>
// @kernel hot rms_norm<4, {1|2|4}, true, {FIXED|HALVES}>
// @kernel hot layer_norm<{1|4}, {0|1|2|4}>
#include "fixed_point.cuh"
#include "halves.cuh"

// What a norm writes besides the result: groups of fixed point, or rows of f16 and their scales, of
// whole runs of 16.
enum Also { PLAIN, FIXED, HALVES };

// x = a, or a + plus if present; x is stored in `total` if present.
// y = x / sqrt(mean(x^2) + eps). WEIGHTED: times the row w.
// A thread takes V adjacent elements at a time; the result may overwrite `a` or `plus`. A thread
// keeps its HELD packs of the row in registers; longer rows are read twice (HELD 0).
template <int V, int HELD, bool WEIGHTED, Also ALSO>
__global__ void __launch_bounds__(1024) rms_norm(Tensor out, Tensor a, Tensor w, float eps,
                                                 Tensor plus, Tensor total, unsigned char* also,
                                                 float* scales) {
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
    float scale = sqrtf(block_reduce<Sum>(sum, 0) / n + eps), most = 0;
    const long long row = i1 + (long long)out.ne[1] * (i2 + (long long)out.ne[2] * i3);
#pragma unroll
    for (int p = 0; p < (HELD ? HELD : 1); p++)
        for (int i = (threadIdx.x + p * blockDim.x) * V; i < n; i += blockDim.x * V) {
            if (!HELD) held[p] = load(i);
            if (WEIGHTED && HELD != 1) factors = weight(i);
#pragma unroll
            for (int k = 0; k < V; k++) {
                held[p].v[k] /= scale;
                if (WEIGHTED) held[p].v[k] *= factors.v[k];
                if (ALSO == HALVES) most = finite_most(most, held[p].v[k]);
            }
            *(Pack<float, V>*)(y + i * out.nb[0]) = held[p];
            if constexpr (ALSO == FIXED)  // whole groups: 8 neighboring lanes are all here, or none
                put_fixed<2>(held[p].v, also + (row * (n / 32) + i / 32) * group_bytes<2>);
            if (HELD) break;
        }
    if constexpr (ALSO == HALVES) {
        const RowScale by = row_scale(block_reduce<Max>(most, 0.0f));
        if (threadIdx.x == 0) scales[row] = by.back;
#pragma unroll
        for (int p = 0; p < HELD; p++) {
            const int i = (threadIdx.x + p * blockDim.x) * V;
            if (i >= n) break;
            unsigned* to = (unsigned*)also + (row * n + i / 16 * 16) / 2 + i % 16 / 4;
            to[0] = two_halves<__half>(held[p].v[0] * by.by, held[p].v[1] * by.by);
            to[4] = two_halves<__half>(held[p].v[2] * by.by, held[p].v[3] * by.by);
        }
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
