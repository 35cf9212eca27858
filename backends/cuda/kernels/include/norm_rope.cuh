// A norm and a rotation of a row, by a block.
#pragma once
#include "row.cuh"

// The row of a head and a token, normalized and rotated, in `row`.
template <bool NEOX>
__device__ __forceinline__ void rotated_row(float* row, const Tensor& a, const Tensor& w, float eps,
                                            const Rope& r, double frequency, int head, int token,
                                            int position) {
    const int n = a.ne[0];
    float squares = 0;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
        const float x = *a.at<float>(i, head, token, 0);
        row[i] = x, squares += x * x;
    }
    norm_row(row, n, squares, eps, w);
    __syncthreads();
    turn_row<NEOX>(row, n, r, frequency, position);
    __syncthreads();
}

// out = rope(rms_norm(a)), or rope(rms_norm(a) w) if w is present. a, out [n, heads, T], pos [T]
// Dynamic shared memory: n floats.
template <bool NEOX>
__device__ __forceinline__ void norm_rope_head(const Tensor& out, const Tensor& a, const Tensor& w,
                                               const Tensor& pos, float eps, const Rope& r, int head,
                                               int token) {
    const double frequency = threadIdx.x < r.n_dims / 2 ? frequency_of(threadIdx.x, r) : 0;
    begin();
    extern __shared__ float shared[];
    rotated_row<NEOX>(shared, a, w, eps, r, frequency, head, token, *pos.at<int>(token, 0, 0, 0));
    for (int i = threadIdx.x; i < a.ne[0]; i += blockDim.x) *out.at<float>(i, head, token, 0) = shared[i];
}

// The same, into the row of a cache named by the token's id, heads one after another. Ids that are
// not rows write nothing. cache [n heads, rows]
template <class B, bool NEOX>
__device__ __forceinline__ void norm_rope_row(const Tensor& cache, const Tensor& a, const Tensor& w,
                                              const Tensor& pos, const Tensor& ids, float eps,
                                              const Rope& r, int head, int token) {
    const double frequency = threadIdx.x < r.n_dims / 2 ? frequency_of(threadIdx.x, r) : 0;
    if (w.data && threadIdx.x < w.ne[0] / 32) fetch_early(w.at<float>(threadIdx.x * 32, 0, 0, 0));
    begin();
    extern __shared__ float shared[];
    const int n = a.ne[0], id = *ids.at<int>(token, 0, 0, 0);
    if (id < 0 || id >= cache.ne[1]) return;
    rotated_row<NEOX>(shared, a, w, eps, r, frequency, head, token, *pos.at<int>(token, 0, 0, 0));
    constexpr int block = Same<B, file::q8_0>::yes ? 32 : 1;
    store_row<B>(shared, n, cache.at<unsigned char>(head * n / block, id, 0, 0), cache.nb[0]);
}
