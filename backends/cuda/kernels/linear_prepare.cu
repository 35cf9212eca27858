// Steps before and after the products: prepare operands, finish results.
// @kernel to_halves<{float|__half|__nv_bfloat16}, {__half|__nv_bfloat16}>
// @kernel copy_rows<{float|__half|__nv_bfloat16}, {float|__half|__nv_bfloat16}>
// @kernel gate_rows
// @kernel gate_rows_limited
// @kernel put_rows
// @kernel add_splits
#include "linear_common.cuh"

// Prepares a row of b for linear_tile.cu: writes it as H, zero-padded to k_padded, and the factor
// for its results. The row is scaled by a power of two that brings its largest entry to [2^14,
// 2^15), so nothing overflows f16 and little precision is lost. Each run of 16 is in the order of a
// thread's weights: 0 1 4 5 8 9 12 13, 2 3 6 7 10 11 14 15. One block per row; a row of at most
// THREADS * 8 * RUNS values is kept in registers and read only once.
constexpr int THREADS = 128, RUNS = 4;

template <class S, class H>
__global__ void __launch_bounds__(THREADS)
    to_halves(Tensor b, H* out, float* scales, int k_padded) {
    begin();
    const char* row = row_at(b, blockIdx.x);
    const int k = b.ne[0];
    float x[RUNS][8];
    auto load = [&](int base) {
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
            int i = base + (r * THREADS + threadIdx.x) * 8, first = i / 16 * 16 + i % 16 / 4;
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                int at = first + j / 2 * 4 + j % 2;
                x[r][j] = at < k ? to_f32(*(const S*)(row + at * b.nb[0])) : 0.0f;
            }
        }
    };
    float most = 0;
    for (int base = 0; base < k_padded; base += RUNS * THREADS * 8) {
        load(base);
        for (int r = 0; r < RUNS; ++r)
            for (int j = 0; j < 8; ++j)
                if (fabsf(x[r][j]) <= 3.4028235e38f) most = fmaxf(most, fabsf(x[r][j]));  // finite
    }
    most = block_reduce<Max>(most, 0.0f);
    int exponent = most > 0.0f ? min(max(14 - ilogbf(most), -126), 126) : 0;
    if (threadIdx.x == 0) scales[blockIdx.x] = ldexpf(1.0f, -exponent);
    const float by = ldexpf(1.0f, exponent);
    H* to = out + (long long)blockIdx.x * k_padded;
    for (int base = 0; base < k_padded; base += RUNS * THREADS * 8) {
        if (k_padded > RUNS * THREADS * 8) load(base);
#pragma unroll
        for (int r = 0; r < RUNS; ++r) {
            int i = base + (r * THREADS + threadIdx.x) * 8;
            if (i >= k_padded) break;
            Pack<H, 8> run;
            for (int j = 0; j < 8; ++j) run.v[j] = from_f32<H>(x[r][j] * by);
            *(Pack<H, 8>*)(to + i) = run;
        }
    }
}

// Copies any tensor to contiguous rows. grid: pieces of a row, rows.
template <class S, class D>
__global__ void __launch_bounds__(256)
    copy_rows(Tensor in, D* out, unsigned first, unsigned columns) {
    begin();
    long long n = (long long)in.ne[0] * columns;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) {
        unsigned column = i / in.ne[0], i0 = i % in.ne[0];
        out[i] = from_f32<D>(to_f32(*(const S*)(row_at(in, first + column) + i0 * in.nb[0])));
    }
}

// y = act(gate) * y, where the rows of gate are contiguous.
template <class... Limit>
__device__ __forceinline__ void gate_all(const Tensor& y, const float* gate, int act,
                                         unsigned columns, Limit... limit) {
    long long n = (long long)y.ne[0] * columns;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll) {
        float* at = (float*)(row_at(y, i / y.ne[0]) + i % y.ne[0] * y.nb[0]);
        *at = gated(act, gate[i], *at, limit...);
    }
}
__global__ void __launch_bounds__(256)
    gate_rows(Tensor y, const float* gate, int act, unsigned columns) {
    begin();
    gate_all(y, gate, act, columns);
}
__global__ void __launch_bounds__(256)
    gate_rows_limited(Tensor y, const float* gate, int act, unsigned columns, float limit) {
    begin();
    gate_all(y, gate, act, columns, limit);
}

// Adds the sums of all splits of k, [rows, columns, splits], in order.
__global__ void __launch_bounds__(256)
    add_splits(const float* sums, Tensor y, int splits, unsigned columns, int narrow) {
    begin();
    const long long n = (long long)y.ne[0] * columns, i = blockIdx.x * 256ll + threadIdx.x;
    if (i >= n) return;
    float total = 0;
    for (int s = 0; s < splits; ++s) total += sums[s * n + i];
    put(y, row_at(y, i / y.ne[0]), i % y.ne[0], total, narrow);
}

// Writes contiguous rows to the rows of y.
__global__ void __launch_bounds__(256)
    put_rows(const float* product, Tensor y, unsigned first, unsigned columns, int narrow) {
    begin();
    long long n = (long long)y.ne[0] * columns;
    for (long long i = blockIdx.x * 256ll + threadIdx.x; i < n; i += gridDim.x * 256ll)
        put(y, row_at(y, first + i / y.ne[0]), i % y.ne[0], product[i], narrow);
}
