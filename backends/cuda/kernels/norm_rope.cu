// A norm and a rotation in one launch. One block per row, which is in shared memory in between.
// @kernel hot norm_rope<{true|false}>
// @kernel hot norm_rope_rows<{Plain<__half>|Plain<__nv_bfloat16>|q8_0}, {true|false}>
#include "norm_rope.cuh"

using namespace file;

// grid: heads, T
template <bool NEOX>
__global__ void __launch_bounds__(256)
norm_rope(Tensor out, Tensor a, Tensor w, Tensor pos, float eps, Rope r) {
    norm_rope_head<NEOX>(out, a, w, pos, eps, r, blockIdx.x, blockIdx.y);
}

template <class B, bool NEOX>
__global__ void __launch_bounds__(256)
norm_rope_rows(Tensor cache, Tensor a, Tensor w, Tensor pos, Tensor ids, float eps, Rope r) {
    norm_rope_row<B, NEOX>(cache, a, w, pos, ids, eps, r, blockIdx.x, blockIdx.y);
}
