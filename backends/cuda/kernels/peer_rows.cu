// Sums of large parts of two GPUs (sent_row.cuh), and the norm behind them. A block has a row.
// @kernel hot peer_rows
// @kernel hot peer_rows_norm<{256|512|1024}>
#include "sent_row.cuh"

__global__ void __launch_bounds__(1024, 1)
peer_rows(float* out, const float* part, int n, const __grid_constant__ Peers peers,
          unsigned long long at) {
    begin();
    SentRow row(peers, at, blockIdx.x, n);
    const int i = EACH * threadIdx.x;
    const size_t first = (size_t)blockIdx.x * n + i;
    float x[EACH] = {};
    if (i < n)
#pragma unroll
        for (int k = 0; k < EACH; k += 4) *(float4*)(x + k) = *(const float4*)(part + first + k);
    row.add_other(x, i);
    if (i < n)
#pragma unroll
        for (int k = 0; k < EACH; k += 4) *(float4*)(out + first + k) = *(const float4*)(x + k);
    __syncthreads();
    if (threadIdx.x == 0) row.end();
}

// x = sum + plus, which goes to `total` if present, and its norm.
template <int THREADS>
__global__ void __launch_bounds__(THREADS, blocks_of(48, THREADS))
peer_rows_norm(Tensor total, const float* part, Tensor plus, const __grid_constant__ Normed norm,
               const __grid_constant__ Peers peers, unsigned long long at) {
    const int n = total.ne[0], i = EACH * threadIdx.x;
    if (i < n) fetch_early(norm.w.data + 4 * i);
    begin();
    SentRow row(peers, at, blockIdx.x, n);
    float x[EACH] = {};
    if (i < n)
#pragma unroll
        for (int k = 0; k < EACH; k += 4)
            *(float4*)(x + k) = *(const float4*)(part + (size_t)blockIdx.x * n + i + k);
    finish_row(row, x, plus, total, norm, blockIdx.x, i);
}
