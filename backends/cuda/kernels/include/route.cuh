// Expert routing of a token: which experts it goes to, and their weights.
#pragma once
#include "sort.cuh"

// Makes sort keys of n experts that leave only those of the best n_used groups, or all if there are
// no groups. The score of a group is the sum of its n_top best scores. By `threads` threads, which
// sync() joins.
template <class Sync>
__device__ __forceinline__ void make_keys(Key* keys, int padded, Key* groups, const float* scores,
                                          int n, int n_group, int n_used, int n_top, int threads,
                                          Sync sync) {
    const int size = n_group ? n / n_group : n;
    for (int g = threadIdx.x; g < n_group; g += threads) {
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
    sync();
    for (int i = threadIdx.x; i < padded; i += threads) {
        int better = 0;
        if (i < n)
            for (int g = 0; g < n_group; g++) better += groups[g] < groups[i / size];
        bool there = i < n && (n_group == 0 || better < n_used);
        keys[i] = there ? sort_key(scores[i], i, true) : LAST_KEY;
    }
}

// The least key of a warp.
__device__ __forceinline__ Key least_key(Key key) {
    const unsigned high = key >> 32, most = __reduce_min_sync(~0u, high);
    return (Key)most << 32 | __reduce_min_sync(~0u, high == most ? (unsigned)key : ~0u);
}

// p of a score (times scale); with gate 1, what p is the soft_max of.
__device__ __forceinline__ float gate_of(int gate, float score) {
    return gate == 0 ? 1 / (1 + expf(-score)) : gate == 2 ? sqrtf(softplus(score)) : score;
}

// p = sigmoid(scores) (gate 0), soft_max(scale scores) (1) or sqrt(softplus(scores)) (2); ids of
// the best p (+ bias) unless given; weights = s p[ids] (/ their sum, clamped) + b. At most 32 ids.
// The p of a given id that is no expert is 0. own: of each expert the number that this device has
// it under, which then takes the place of the chosen id; -1 if another device has it. Null: ids
// stay as they are. ids, weights [k, tokens]: without memory where a block keeps them.
struct Route {
    Tensor weights, ids, bias;
    const int* own;
    int n_group, n_used, n_top, given, gate, divided;
    float scale, low, high, s, b;
};

// What `choose` needs in shared memory: n keys, n_group keys, n p, n p + bias and n numbers of
// `own`, if there is one.
struct Places {
    Key *keys, *groups;
    float *p, *ranked;
    int* own;

    __device__ __forceinline__ Places(const Route& r, int n, Key* memory)
        : keys(memory), groups(keys + n), p((float*)(groups + r.n_group)), ranked(p + n),
          own((int*)(ranked + n)) {}
};

// In lane i the id of slot i, for the first `slots` slots; -1: none. By the first warp of a block,
// with score(i) of n experts.
// Each round takes the least key above the last one. Sorting all keys lost: 64 of them need 21
// stages with a barrier each, and k is about 6.
// All that is read from memory is on its way at once.
template <class Score>
__device__ __forceinline__ int choose(const Route& r, int n, int token, int slots, const Places& to,
                                      Score score) {
    const int lane = threadIdx.x;
    float* p = to.p;
    const float infinity = __int_as_float(0x7f800000);
    float most = -infinity, sum = 0, base = 0, factor = 1;
    constexpr int BATCH = 4;
    for (int first = 0; first < n; first += 32 * BATCH) {  // all lanes come to its end
        float scores[BATCH], biases[BATCH] = {};
        int numbers[BATCH] = {};
        // Several lanes may have the last one.
        auto at = [&](int j) { return min(first + 32 * j + lane, n - 1); };
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            scores[j] = score(at(j)) * r.scale;
            if (r.bias.data) biases[j] = *r.bias.at<float>(at(j), 0, 0, 0);
            if (r.own) numbers[j] = r.own[at(j)];
        }
        __syncwarp();  // or the compiler would wait for the first of them before it reads the last
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            p[at(j)] = scores[j], to.ranked[at(j)] = biases[j];
            if (r.own) to.own[at(j)] = numbers[j];
            most = fmaxf(most, scores[j]);
        }
    }
    __syncwarp();
    if (r.gate == 1) {
        most = warp_reduce<Max>(most);
        base = most == -infinity ? 0 : most;
        for (int i = lane; i < n; i += 32) sum += p[i] = expf(p[i] - base);
        sum = warp_reduce<Sum>(sum);
        factor = sum == 0 ? 0 : 1 / sum;  // NaN stays NaN
    }
    for (int i = lane; i < n; i += 32) {
        p[i] = r.gate == 1 ? p[i] * factor : gate_of(r.gate, p[i]);
        to.ranked[i] += p[i];
    }
    __syncwarp();
    int id = -1;
    if (r.given) {
        if (lane < slots) id = *r.ids.at<int>(lane, token, 0, 0);
        return id;
    }
    make_keys(to.keys, n, to.groups, to.ranked, n, r.n_group, r.n_used, r.n_top, 32,
              [] { __syncwarp(); });
    Key last = 0;  // below every key
    for (int slot = 0; slot < slots; slot++) {
        Key best = LAST_KEY;
        for (int i = lane; i < n; i += 32)
            if (to.keys[i] > last && to.keys[i] < best) best = to.keys[i];
        last = least_key(best);
        if (slot == lane) id = (int)(unsigned)last;
    }
    return id;
}

// What `best_of` compares of an expert: its p + bias, or its score if that decides. The least is that
// of the best. It is below ~0u.
__device__ __forceinline__ unsigned rank_of(float ranked) { return ~order_of(ranked); }
__device__ __forceinline__ float ranked_by(unsigned rank) {
    const int bits = ~rank ^ 0x80000000u;
    return __int_as_float(bits ^ ((bits >> 31) & 0x7FFFFFFF));
}

// Leaves experts of the best groups. Group j is own[j] of the lanes; its score is the sum of its best
// one or two.
template <int EACH>
__device__ __forceinline__ void leave_groups(const Route& r, unsigned (&own)[EACH]) {
    const int lane = threadIdx.x % 32;
    unsigned scores[EACH], mine = ~0u;
    int better = 0;
#pragma unroll
    for (int j = 0; j < EACH; ++j) {
        const unsigned best = __reduce_min_sync(~0u, own[j]);
        float score = ranked_by(best);
        if (r.n_top == 2) {
            const bool first = lane == __ffs(__ballot_sync(~0u, own[j] == best)) - 1;
            score += ranked_by(__reduce_min_sync(~0u, first ? ~0u : own[j]));
        }
        scores[j] = j < r.n_group ? rank_of(score) : ~0u;
        if (lane == j) mine = scores[j];
    }
#pragma unroll
    for (int j = 0; j < EACH; ++j)
        better += scores[j] < mine || (scores[j] == mine && j < lane);
    const unsigned left = __ballot_sync(~0u, better < r.n_used);
#pragma unroll
    for (int j = 0; j < EACH; ++j)
        if (!(left >> j & 1)) own[j] = ~0u;
}

// The ids of `choose` for up to 32 * EACH experts, if groups are of 32 experts. `choose` does it for
// any number and takes 2 to 5 us, half of which are instructions that it reads for the first time;
// this takes 100 to 170 clocks a slot.
template <int EACH>
__device__ __forceinline__ int best_of(const Route& r, const unsigned* ranks, int n, int slots) {
    const int lane = threadIdx.x % 32;
    unsigned own[EACH];
#pragma unroll
    for (int j = 0; j < EACH; ++j) own[j] = 32 * j + lane < n ? ranks[32 * j + lane] : ~0u;
    if (r.n_group) leave_groups(r, own);
    int id = -1;
#pragma unroll 1
    for (int slot = 0; slot < slots; ++slot) {
        unsigned least = own[0], at = ~0u;
#pragma unroll
        for (int j = 1; j < EACH; ++j) least = min(least, own[j]);
        const unsigned best = __reduce_min_sync(~0u, least);
#pragma unroll
        for (int j = EACH - 1; j >= 0; --j) at = own[j] == best ? 32 * j + lane : at;
        at = __reduce_min_sync(~0u, at);
#pragma unroll
        for (int j = 0; j < EACH; ++j) own[j] = at == 32 * j + lane ? ~0u : own[j];
        if (slot == lane) id = at;
    }
    return id;
}

// p of this lane's id (-1: 0) among up to 32 * EACH scores.
template <int EACH>
__device__ __forceinline__ float p_of(const Route& r, const float* scores, int n, int id) {
    const int lane = threadIdx.x % 32;
    const float infinity = __int_as_float(0x7f800000);
    float all[EACH], most = -infinity, sum = 0;
    if (r.gate == 1) {
#pragma unroll
        for (int j = 0; j < EACH; ++j)
            all[j] = 32 * j + lane < n ? scores[32 * j + lane] * r.scale : -infinity;
#pragma unroll
        for (int j = 0; j < EACH; ++j) most = fmaxf(most, all[j]);
        most = warp_reduce<Max>(most);
        if (most == -infinity) most = 0;
#pragma unroll
        for (int j = 0; j < EACH; ++j) sum += expf(all[j] - most);
        sum = warp_reduce<Sum>(sum);
    }
    if (id < 0) return 0;
    const float mine = scores[id] * r.scale;
    if (r.gate != 1) return gate_of(r.gate, mine);
    return expf(mine - most) * (sum == 0 ? 0 : 1 / sum);  // NaN stays NaN
}

// The weight of the slot in this lane, whose expert has this p (none: 0); all slots have been chosen.
__device__ __forceinline__ float weight_of(const Route& r, float p) {
    float by = r.s;
    if (r.divided) {
        const float sum = warp_reduce<Sum>(p);
        by = r.s / (sum < r.low ? r.low : sum > r.high ? r.high : sum);  // like Clamp: NaN stays NaN
    }
    return p * by + r.b;
}
__device__ __forceinline__ float weight_of(const Route& r, int n, const Places& at, int id) {
    return weight_of(r, id >= 0 && id < n ? at.p[id] : 0.0f);
}

// The number that this device has an expert under.
__device__ __forceinline__ int number_of(const Route& r, int n, const Places& at, int id) {
    return r.own && id >= 0 && id < n ? at.own[id] : id;
}
