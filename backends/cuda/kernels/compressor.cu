// A row of a compressor (models/compressor.py) for a few tokens in one launch: its ring of states,
// gates, sum, norm, rotation and the cache. As ops of their own these take 14 launches of a few
// kilobytes each.
// @kernel hot compressed_row<{Plain<__half>|Plain<__nv_bfloat16>|q8_0}, {true|false}>
#include "compressor.cuh"

using namespace file;

__device__ unsigned arrived;

template <class B, bool NEOX>
__global__ void __launch_bounds__(1024) compressed_row(const __grid_constant__ Compressor p) {
    compressed_row_part<B, NEOX>(p, blockIdx.x, gridDim.x, &arrived);
}
