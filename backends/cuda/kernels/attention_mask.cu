// causal_mask, where it is not fused into an attention: one block per query writes one row.
// @kernel causal_mask<false>
// @kernel causal_mask<true>
// @kernel causal_mask<false, int>
#include "common.cuh"

// y[j, i] = 0 where at <= pos[i] and pos[i] - at < window, else -inf; at is j, or kv_end[j] - 1.
// Stride: int if a row is for several positions, else nothing; at is the last of them.
template <bool ENDS, class... Stride>
__global__ void __launch_bounds__(256)
causal_mask(Tensor out, Tensor pos, Tensor kv_end, unsigned window, Stride... stride) {
    begin();
    int p = *pos.at<int>(blockIdx.x, 0, 0, 0);
    for (int j = threadIdx.x; j < out.ne[0]; j += 256) {
        int end = ENDS ? *kv_end.at<int>(j, 0, 0, 0) : ((j + 1) * ... * stride);
        bool seen = end > 0 && end - 1 <= p && unsigned(p - (end - 1)) < window;
        *out.at<__half>(j, blockIdx.x, 0, 0) = __ushort_as_half(seen ? 0 : 0xFC00);
    }
}
