// Expert routing, apart from the products: choosing among groups of experts, weighted sums.
// @kernel hot multi_add<{true|false}>
// @kernel grouped_topk
// @kernel hot route<{true|false}>
#include "route.cuh"

// y[:, t] = sum_e a[:, e, t] b[0, e, t] in the order of e, without b if not WEIGHTED. Then
// + c[:, t] and + d[:, t] if present.
template <bool WEIGHTED>
__global__ void __launch_bounds__(256) multi_add(Tensor out, Tensor a, Tensor b, Tensor c, Tensor d) {
    begin();
    int token = blockIdx.x, i = blockIdx.y * 256 + threadIdx.x;
    if (i >= out.ne[0]) return;
    float sum = 0;
    for (int e = 0; e < a.ne[1]; e++) {
        float x = *a.at<float>(i, e, token, 0);
        sum += WEIGHTED ? x * *b.at<float>(0, e, token, 0) : x;
    }
    if (c.data) sum += *c.at<float>(i, token, 0, 0);
    if (d.data) sum += *d.at<float>(i, token, 0, 0);
    *out.at<float>(i, token, 0, 0) = sum;
}

// Ids of the k best experts of the best groups. One block per token.
// Shared memory: `padded` keys (a power of two), n_group keys, n scores.
__global__ void grouped_topk(Tensor out, Tensor a, int padded, int n_group, int n_used, int n_top) {
    begin();
    extern __shared__ Key keys[];
    Key* groups = keys + padded;
    float* scores = (float*)(groups + n_group);
    int n = a.ne[0], i1 = blockIdx.x % a.ne[1], i2 = blockIdx.x / a.ne[1], i3 = blockIdx.y;
    for (int i = threadIdx.x; i < n; i += blockDim.x) scores[i] = *a.at<float>(i, i1, i2, i3);
    __syncthreads();
    make_keys(keys, padded, groups, scores, n, n_group, n_used, n_top, blockDim.x,
              [] { __syncthreads(); });
    sort_shared(keys, padded, 0);
    for (int i = threadIdx.x; i < out.ne[0]; i += blockDim.x)
        *out.at<int>(i, i1, i2, i3) = (int)(unsigned)keys[i];
}

// The scores of a token: sums over splits (linear_exact.cu), n of each, `step` bytes from one to the
// next. By a warp.
__device__ __forceinline__ void add_scores(float* to, const char* from, int n, int splits,
                                           long long step) {
    constexpr int ROWS = 2, AHEAD = 8;
    for (int first = threadIdx.x; first < n; first += 32 * ROWS) {
        float sums[ROWS] = {};
        for (int start = 0; start < splits; start += AHEAD) {
            float parts[AHEAD][ROWS];
#pragma unroll
            for (int s = 0; s < AHEAD; ++s)
#pragma unroll
                for (int i = 0; i < ROWS; ++i) {
                    const bool there = start + s < splits && first + 32 * i < n;
                    const float* const at = (const float*)(from + (start + s) * step) + first;
                    parts[s][i] = there ? at[32 * i] : 0;
                }
#pragma unroll
            for (int s = 0; s < AHEAD; ++s)
#pragma unroll
                for (int i = 0; i < ROWS; ++i) sums[i] += parts[s][i];
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
            if (first + 32 * i < n) to[first + 32 * i] = sums[i];
    }
    __syncwarp();
}

// The whole routing, one warp per token. Shared memory: as `Places` says; if SPLIT, then n scores,
// which are the sums of those of all splits [n, tokens, splits].
template <bool SPLIT>
__global__ void __launch_bounds__(32) route(const __grid_constant__ Route r, Tensor scores) {
    begin();
    extern __shared__ Key memory[];
    const int token = blockIdx.x, n = scores.ne[0], k = r.ids.ne[0], slot = threadIdx.x;
    const Places at(r, n, memory);
    float* const sums = at.ranked + (r.own ? 2 : 1) * n;
    if constexpr (SPLIT)
        add_scores(sums, scores.row<char>(token, 0, 0), n, scores.ne[2], scores.nb[2]);
    const int id = choose(r, n, token, k, at, [&](int i) {
        return SPLIT ? sums[i] : *scores.at<float>(i, token, 0, 0);
    });
    const float weight = weight_of(r, n, at, id);
    if (slot >= k) return;
    if (!r.given) *r.ids.at<int>(slot, token, 0, 0) = number_of(r, n, at, id);
    *r.weights.at<float>(slot, token, 0, 0) = weight;
}
