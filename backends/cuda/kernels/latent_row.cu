// Stores tokens in the cache of latent attention in one step: norm, rope, concat, conversion. One
// block per token. Of a few tokens, absorb.cu does it beside their queries.
// @kernel hot latent_row<{Plain<__half>|Plain<__nv_bfloat16>|q8_0}, {true|false}>
#include "latent_row.cuh"

using namespace file;

template <class B, bool NEOX>
__global__ void __launch_bounds__(256) latent_row(const __grid_constant__ LatentRow p) {
    write_latent_row<B, NEOX>(p, blockIdx.x);
}
