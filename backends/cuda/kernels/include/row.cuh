// A row in shared memory: normalized, rotated, stored in a cache. By all threads of a block.
#pragma once
#include "encode.cuh"
#include "rope.cuh"

// row[i] /= sqrt(mean(row^2) + eps), times w[i] if w is present. squares: of this thread's elements.
// The row is whole afterwards for the threads that wrote it; others need a barrier.
__device__ __forceinline__ void norm_row(float* row, int n, float squares, float eps, const Tensor& w) {
    const float scale = sqrtf(block_reduce<Sum>(squares, 0) / n + eps);
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        row[i] /= scale;
        if (w.data) row[i] *= *w.at<float>(i, 0, 0, 0);
    }
}

// Rotates the row. frequency: `frequency_of` this thread's number.
template <bool NEOX>
__device__ __forceinline__ void turn_row(float* row, int n, const Rope& r, double frequency, int position) {
    for (int unit = threadIdx.x; unit < r.n_dims / 2; unit += blockDim.x) {
        if (unit >= blockDim.x) frequency = frequency_of(unit, r);
        turn<NEOX>(
            r, unit, frequency, n, position, Tensor{}, [&](int i) { return row[i]; },
            [&](int i, float x) { row[i] = x; });
    }
}

// Stores the row at `to`, encoded as B, `step` bytes from element or block to the next.
template <class B>
__device__ __forceinline__ void store_row(const float* row, int n, unsigned char* to, long long step) {
    if constexpr (Same<B, file::q8_0>::yes) {
        const int lane = threadIdx.x % 32;
        for (int block = threadIdx.x / 32; block < n / 32; block += blockDim.x / 32)
            file::Encoder<B>::put(row[block * 32 + lane], to + block * step, lane);
    } else {
        using T = typename B::Type;
        for (int i = threadIdx.x; i < n; i += blockDim.x) *(T*)(to + i * step) = from_f32<T>(row[i]);
    }
}
