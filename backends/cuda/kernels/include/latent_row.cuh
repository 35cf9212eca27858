// The row of a token in the cache of latent attention: [rms_norm(c) * w | rope(k)], converted.
#pragma once
#include "row.cuh"

// cache [n_c + n_k, rows], c [n_c, T], w [n_c], k [n_k, 1, T], pos [T], ids [T]
struct LatentRow {
    Tensor cache, c, w, k, pos, ids;
    float eps;
    Rope rope;
};

// By all threads of a block. The row is assembled in shared memory, n_c + n_k floats. An id that
// is not a row writes nothing.
template <class B, bool NEOX>
__device__ __forceinline__ void write_latent_row(const LatentRow& p, int token) {
    double frequency = frequency_of(threadIdx.x, p.rope);
    if (threadIdx.x < p.w.ne[0] / 32) fetch_early(p.w.at<float>(threadIdx.x * 32, 0, 0, 0));
    begin();
    extern __shared__ float row[];
    const int n_c = p.c.ne[0], n_k = p.k.ne[0];
    const int position = *p.pos.at<int>(token, 0, 0, 0), id = *p.ids.at<int>(token, 0, 0, 0);
    float squares = 0;
    const auto take = [&](int i, float x) { row[i] = x, squares += x * x; };
    if (p.c.nb[0] == 4 && n_c % 4 == 0) {
#pragma unroll 2
        for (int i = threadIdx.x * 4; i < n_c; i += blockDim.x * 4) {
            const Pack<float, 4> four = four_at(p.c.at<float>(i, token, 0, 0));
#pragma unroll
            for (int j = 0; j < 4; ++j) take(i + j, four.v[j]);
        }  // others normalize these, behind the barriers of the sum
    } else {
        for (int i = threadIdx.x; i < n_c; i += blockDim.x) take(i, *p.c.at<float>(i, token, 0, 0));
    }
    norm_row(row, n_c, squares, p.eps, p.w);
    for (int unit = threadIdx.x; unit < (n_k + 1) / 2; unit += blockDim.x) {
        if (unit >= blockDim.x) frequency = frequency_of(unit, p.rope);
        turn<NEOX>(
            p.rope, unit, frequency, n_k, position, Tensor{},
            [&](int i) { return *p.k.at<float>(i, 0, token, 0); },
            [&](int i, float x) { row[n_c + i] = x; });
    }
    __syncthreads();
    if (id < 0 || id >= p.cache.ne[1]) return;
    store_row<B>(row, n_c + n_k, p.cache.at<unsigned char>(0, id, 0, 0), p.cache.nb[0]);
}
