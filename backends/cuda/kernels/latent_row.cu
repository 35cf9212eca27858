// Stores a token in the cache of latent attention in one step: [rms_norm(c) * w | rope(k)],
// converted, goes to the row of the cache named by the token's id. One block per token; the row is
// assembled in shared memory. Ids that are not rows write nothing.
// @kernel hot latent_row<{Plain<__half>|Plain<__nv_bfloat16>|q8_0}, {true|false}>
#include "row.cuh"

using namespace file;

// cache [n_c + n_k, rows], c [n_c, T], w [n_c], k [n_k, 1, T], pos [T], ids [T]
template <class B, bool NEOX>
__global__ void __launch_bounds__(256) latent_row(Tensor cache, Tensor c, Tensor w, Tensor k,
                                                  Tensor pos, Tensor ids, float eps, Rope r) {
    double frequency = frequency_of(threadIdx.x, r);
    if (threadIdx.x < w.ne[0] / 32) fetch_early(w.at<float>(threadIdx.x * 32, 0, 0, 0));
    begin();
    extern __shared__ float row[];
    const int token = blockIdx.x, n_c = c.ne[0], n_k = k.ne[0];
    const int position = *pos.at<int>(token, 0, 0, 0), id = *ids.at<int>(token, 0, 0, 0);
    float squares = 0;
    for (int i = threadIdx.x; i < n_c; i += 256) {
        const float x = *c.at<float>(i, token, 0, 0);
        row[i] = x, squares += x * x;
    }
    norm_row(row, n_c, squares, eps, w);
    for (int unit = threadIdx.x; unit < (n_k + 1) / 2; unit += 256) {
        if (unit >= 256) frequency = frequency_of(unit, r);
        turn<NEOX>(
            r, unit, frequency, n_k, position, Tensor{},
            [&](int i) { return *k.at<float>(i, 0, token, 0); },
            [&](int i, float x) { row[n_c + i] = x; });
    }
    __syncthreads();
    if (id < 0 || id >= cache.ne[1]) return;
    store_row<B>(row, n_c + n_k, cache.at<unsigned char>(0, id, 0, 0), cache.nb[0]);
}
