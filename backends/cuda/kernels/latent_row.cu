// Stores a token in the cache of latent attention in one step: [rms_norm(c) * w | rope(k)],
// converted, goes to the row of the cache named by the token's id. One block per token; the row is
// assembled in shared memory. Ids that are not rows write nothing.
// @kernel hot latent_row<{Plain<__half>|Plain<__nv_bfloat16>|q8_0}, {true|false}>
#include "encode.cuh"
#include "rope.cuh"

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
    float sum = 0;
    for (int i = threadIdx.x; i < n_c; i += 256) {
        const float x = *c.at<float>(i, token, 0, 0);
        row[i] = x, sum += x * x;
    }
    const float scale = sqrtf(block_reduce<Sum>(sum, 0) / n_c + eps);
    for (int i = threadIdx.x; i < n_c; i += 256) row[i] = row[i] / scale * *w.at<float>(i, 0, 0, 0);
    for (int unit = threadIdx.x; unit < (n_k + 1) / 2; unit += 256) {
        if (unit >= 256) frequency = frequency_of(unit, r);
        turn<NEOX>(
            r, unit, frequency, n_k, position, Tensor{},
            [&](int i) { return *k.at<float>(i, 0, token, 0); },
            [&](int i, float x) { row[n_c + i] = x; });
    }
    __syncthreads();
    if (id < 0 || id >= cache.ne[1]) return;
    unsigned char* to = cache.at<unsigned char>(0, id, 0, 0);
    if constexpr (Same<B, q8_0>::yes) {
        for (int block = threadIdx.x / 32; block < (n_c + n_k) / 32; block += 8)
            Encoder<B>::put(row[block * 32 + threadIdx.x % 32], to + block * cache.nb[0],
                            threadIdx.x % 32);
    } else {
        for (int i = threadIdx.x; i < n_c + n_k; i += 256)
            *(typename B::Type*)(to + i * cache.nb[0]) = from_f32<typename B::Type>(row[i]);
    }
}
