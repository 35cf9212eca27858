// What routing of experts takes beside products: choice within groups, weighted sums.
//
// @kernel multi_add<{true|false}>
// @kernel grouped_topk
#include "sort.cuh"

// y[:, t] = sum_e a[:, e, t] b[0, e, t], without b where it is not WEIGHTED; in the order of e.
template <bool WEIGHTED>
__global__ void __launch_bounds__(256) multi_add(Tensor out, Tensor a, Tensor b) {
    int token = blockIdx.x, i = blockIdx.y * 256 + threadIdx.x;
    if (i >= out.ne[0]) return;
    float sum = 0;
    for (int e = 0; e < a.ne[1]; e++) {
        float x = *a.at<float>(i, e, token, 0);
        sum += WEIGHTED ? x * *b.at<float>(0, e, token, 0) : x;
    }
    *out.at<float>(i, token, 0, 0) = sum;
}

// Ids of the k best experts of the best groups: a block for each token.
// Shared memory: `padded` keys (a power of two), n_group keys, n scores.
__global__ void grouped_topk(Tensor out, Tensor a, int padded, int n_group, int n_used, int n_top) {
    extern __shared__ Key keys[];
    Key* groups = keys + padded;
    float* scores = (float*)(groups + n_group);
    int n = a.ne[0], size = n / n_group;
    int i1 = blockIdx.x % a.ne[1], i2 = blockIdx.x / a.ne[1], i3 = blockIdx.y;
    for (int i = threadIdx.x; i < n; i += blockDim.x) scores[i] = *a.at<float>(i, i1, i2, i3);
    __syncthreads();
    for (int g = threadIdx.x; g < n_group; g += blockDim.x) {
        float score = 0;
        Key last = 0;  // the best so far: the next is the least key above it
        for (int t = 0; t < n_top; t++) {
            Key best = LAST_KEY;
            for (int i = g * size; i < (g + 1) * size; i++) {
                Key key = sort_key(scores[i], i, true);
                if ((t == 0 || key > last) && key < best) best = key;
            }
            score += scores[(unsigned)best];
            last = best;
        }
        groups[g] = sort_key(score, g, true);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < padded; i += blockDim.x) {
        int better = n_group;
        if (i < n) {
            better = 0;
            for (int g = 0; g < n_group; g++) better += groups[g] < groups[i / size];
        }
        keys[i] = better < n_used ? sort_key(scores[i], i, true) : LAST_KEY;
    }
    sort_shared(keys, padded, 0);
    for (int i = threadIdx.x; i < out.ne[0]; i += blockDim.x)
        *out.at<int>(i, i1, i2, i3) = (int)(unsigned)keys[i];
}
