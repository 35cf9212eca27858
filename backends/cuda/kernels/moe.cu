// Expert routing, apart from the products: choosing among groups of experts, weighted sums.
// @kernel hot multi_add<{true|false}>
// @kernel grouped_topk
// @kernel hot route
#include "sort.cuh"

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

// Makes sort keys of n experts that leave only those of the best n_used groups, or all if there are
// no groups. The score of a group is the sum of its n_top best scores.
__device__ __forceinline__ void make_keys(Key* keys, int padded, Key* groups, const float* scores,
                                          int n, int n_group, int n_used, int n_top) {
    const int size = n_group ? n / n_group : n;
    for (int g = threadIdx.x; g < n_group; g += blockDim.x) {
        float score = 0;
        Key last = 0;  // the previous best: the next one is the least key above it
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
        int better = 0;
        if (i < n)
            for (int g = 0; g < n_group; g++) better += groups[g] < groups[i / size];
        bool there = i < n && (n_group == 0 || better < n_used);
        keys[i] = there ? sort_key(scores[i], i, true) : LAST_KEY;
    }
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
    make_keys(keys, padded, groups, scores, n, n_group, n_used, n_top);
    sort_shared(keys, padded, 0);
    for (int i = threadIdx.x; i < out.ne[0]; i += blockDim.x)
        *out.at<int>(i, i1, i2, i3) = (int)(unsigned)keys[i];
}

// The least key of a warp.
__device__ __forceinline__ Key least_key(Key key) {
    const unsigned high = key >> 32, most = __reduce_min_sync(~0u, high);
    return (Key)most << 32 | __reduce_min_sync(~0u, high == most ? (unsigned)key : ~0u);
}

// The whole routing, one warp per token: p = sigmoid(scores) (gate 0), soft_max(scale scores) (1) or
// sqrt(softplus(scores)) (2); ids of the best p (+ bias) unless given; weights = s p[ids] (/ their
// sum, clamped) + b. At most 32 ids. The p of a given id that is no expert is 0.
// Each round takes the least key above the last one. Sorting all keys lost: 64 of them need 21
// stages with a barrier each, and k is about 6.
// Shared memory: n keys, n_group keys, n p and n p + bias.
__global__ void __launch_bounds__(32)
    route(Tensor weights, Tensor ids, Tensor scores, Tensor bias, int n_group, int n_used, int n_top,
          int given, int gate, float scale, int divided, float low, float high, float s, float b) {
    begin();
    extern __shared__ Key keys[];
    const int token = blockIdx.x, lane = threadIdx.x, n = scores.ne[0], k = ids.ne[0];
    Key* groups = keys + n;
    float *p = (float*)(groups + n_group), *chosen = p + n;
    const float infinity = __int_as_float(0x7f800000);
    float most = -infinity, sum = 0, base = 0, factor = 1;
    for (int i = lane; i < n; i += 32) {
        p[i] = *scores.at<float>(i, token, 0, 0) * scale;
        most = fmaxf(most, p[i]);
    }
    if (gate == 1) {
        most = warp_reduce<Max>(most);
        base = most == -infinity ? 0 : most;
        for (int i = lane; i < n; i += 32) sum += p[i] = expf(p[i] - base);
        sum = warp_reduce<Sum>(sum);
        factor = sum == 0 ? 0 : 1 / sum;  // NaN stays NaN
    }
    for (int i = lane; i < n; i += 32) {
        p[i] = gate == 0 ? 1 / (1 + expf(-p[i])) : gate == 1 ? p[i] * factor : sqrtf(softplus(p[i]));
        chosen[i] = bias.data ? p[i] + *bias.at<float>(i, 0, 0, 0) : p[i];
    }
    __syncwarp();
    int id = -1;
    if (given) {
        if (lane < k) id = *ids.at<int>(lane, token, 0, 0);
    } else {
        make_keys(keys, n, groups, chosen, n, n_group, n_used, n_top);
        Key last = 0;  // below every key
        for (int slot = 0; slot < k; slot++) {
            Key best = LAST_KEY;
            for (int i = lane; i < n; i += 32)
                if (keys[i] > last && keys[i] < best) best = keys[i];
            last = least_key(best);
            if (slot == lane) id = (int)(unsigned)last;
        }
    }
    const float mine = id >= 0 && id < n ? p[id] : 0.0f;
    float by = s;
    if (divided) {
        sum = warp_reduce<Sum>(mine);
        by = s / (sum < low ? low : sum > high ? high : sum);  // like Clamp: NaN stays NaN
    }
    if (lane < k) {
        if (!given) *ids.at<int>(lane, token, 0, 0) = id;
        *weights.at<float>(lane, token, 0, 0) = mine * by + b;
    }
}
