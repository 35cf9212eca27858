// The matrices of hyper-connections, whose rows and columns sum to 1.
#pragma once
#include "common.cuh"

// A matrix is in the registers of `lanes_of` lanes: one lane for each source stream, with a number
// for each target. So one launch does all iterations: a sum over targets stays in a thread, and one
// over sources takes a few shuffles. One thread for each number of the matrix needs shuffles for
// both.
template <int HC>
constexpr int lanes_of = HC <= 1 ? 1 : HC <= 2 ? 2 : HC <= 4 ? 4 : HC <= 8 ? 8 : HC <= 16 ? 16 : 32;

// Makes a matrix of its logits c[target], as `dsv4_hc_comb` defines it. All lanes of a warp call it;
// those that are not `there` have no source: their numbers are 0 and stay 0, so they add nothing.
template <int HC>
__device__ __forceinline__ void sinkhorn(float (&c)[HC], bool there, float eps, int n_iter) {
    constexpr int LANES = lanes_of<HC>;
    // Divides by the sum over targets.
    // Exact division is a subroutine; 160 of them in a row would be most of the kernel's time.
    auto by_source = [&](float extra) {
        float sum = 0;
#pragma unroll
        for (int d = 0; d < HC; d++) sum += c[d];
        sum += extra;
#pragma unroll
        for (int d = 0; d < HC; d++)
            if (there) c[d] = __fdividef(c[d], sum);
    };
    auto by_target = [&] {
#pragma unroll
        for (int d = 0; d < HC; d++) {
            float sum = c[d];
#pragma unroll
            for (int lane = LANES / 2; lane; lane /= 2) sum += __shfl_xor_sync(~0u, sum, lane);
            if (there) c[d] = __fdividef(c[d], sum + eps);
        }
    };
    if (there) {
        float top = __int_as_float(0xFF800000);  // -inf
#pragma unroll
        for (int d = 0; d < HC; d++) top = fmaxf(top, c[d]);
        const bool none = top == __int_as_float(0xFF800000);
#pragma unroll
        for (int d = 0; d < HC; d++) c[d] = expf(c[d] - (none ? 0 : top));
        if (!none) by_source(0);
#pragma unroll
        for (int d = 0; d < HC; d++) c[d] += eps;
    }
    by_target();
    for (int i = 1; i < n_iter; i++) {
        by_source(eps);
        by_target();
    }
}

// 1 / x; 0 and less than 2^-126 give infinity.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDACC__
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1 / x;
#endif
}

// The same for few streams, of which every lane computes all, since that needs no shuffle: factors u
// of rows and v of columns of k[target][source], a softmax over targets plus eps. The matrix is
// u[d] k[d][s] v[s], and a division by sums plus eps is  1 / u[d] <- sum over s of k[d][s] v[s], +
// eps / u[d]. So an iteration is 2 HC quotients in place of 2 HC^2.
template <int HC>
__device__ __forceinline__ void sinkhorn_factors(const float (&k)[HC][HC], float (&u)[HC],
                                                 float (&v)[HC], float eps, int n_iter) {
    float rows[HC], columns[HC];  // 1 / u and 1 / v
#pragma unroll
    for (int s = 0; s < HC; s++) v[s] = rows[s] = columns[s] = 1;
#pragma unroll 1
    for (int i = 0;; i++) {
#pragma unroll
        for (int d = 0; d < HC; d++) {
            rows[d] *= eps;
#pragma unroll
            for (int s = 0; s < HC; s++) rows[d] = fmaf(k[d][s], v[s], rows[d]);
            u[d] = reciprocal(rows[d]);
        }
        if (i >= n_iter - 1) break;
#pragma unroll
        for (int s = 0; s < HC; s++) {
            columns[s] *= eps;
#pragma unroll
            for (int d = 0; d < HC; d++) columns[s] = fmaf(k[d][s], u[d], columns[s]);
            v[s] = reciprocal(columns[s]);
        }
    }
}
