// causal_mask, where it is not fused into an attention: one block per query writes one row.
// @kernel causal_mask
#include "common.cuh"

// y[j, i] = 0 where j <= pos[i] and pos[i] - j < window, else -inf.
__global__ void __launch_bounds__(256) causal_mask(Tensor out, Tensor pos, unsigned window) {
    begin();
    int p = *pos.at<int>(blockIdx.x, 0, 0, 0);
    for (int j = threadIdx.x; j < out.ne[0]; j += 256) {
        bool seen = j <= p && unsigned(p - j) < window;
        *out.at<__half>(j, blockIdx.x, 0, 0) = __ushort_as_half(seen ? 0 : 0xFC00);
    }
}
