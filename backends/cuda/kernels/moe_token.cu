// A feed-forward layer of experts for one token, in three launches:
//
//   gate     scores of the router; the block that ends last chooses the experts. Beside it up and
//            gate of the shared experts, whose weights are on their way meanwhile
//   up_gate  up and gate of the chosen experts
//   down     their weighted sum through down, that of the shared experts, and what else is added
//
// It was seven launches of 2 us and more, three of which moved a few KB. V2-Lite in iq4_nl reads 7,
// 19 and 13 MB. Blocks have 4 to 16 warps: two blocks of 16 fill a multiprocessor. A block of up and
// gate computes 32 rows, so that it leaves a group of fixed point; else each block of down would have
// to make 352 of them.
//
// Who comes last is counted in `arrived`, which wraps around to 0 by itself: no launch before has to
// clear it. All scores are read after that, so runs are equal bit by bit.
//
// A GPU may have a part of the experts. It scores and chooses among all of them, as the others do, and
// a table says which are its own. Those come first, so that blocks of the slots behind them have
// nothing to do, wherever a GPU puts them, and `down` knows where its sum ends.
// Lost on paper: each block of up_gate chooses for itself, which is 1.5 us before it can read weights.
// @kernel hot router
// @kernel hot gate<{BLOCKS}>
// @kernel gate<{SOME}, float>
// @kernel hot up_gate<{BLOCKS}>
// @kernel up_gate<{SOME}, float>
// @kernel hot down<{BLOCKS}>
// @kernel hot down_shared<{BLOCKS}, $1>
// @kernel down_shared<q8_0, {q2_K|q4_K|q6_K|iq4_nl}>
#include "linear_vec.cuh"
#include "route.cuh"

using namespace tiles;

constexpr int MOST_THREADS = 512;
// Blocks of MOST_THREADS on a multiprocessor. Up and gate of 5 and 6 bits with scales of scales need
// more registers; their blocks are half as large.
template <class F>
constexpr int gate_blocks = F::code_bytes == 16 && F::high && F::super_bytes ? 1 : 2;

// -- router ---------------------------------------------------------------------------------------

// Scores of experts: w [k, experts] times x [k]. held: experts whose weights are on this GPU.
struct Router {
    Tensor w;
    const float* x;
    float* scores;
    Route route;
    int held;
};

__device__ unsigned arrived;  // blocks of a launch that have left their score

// Puts the experts that are here in front, in their order; -1 follows. By a warp, each lane of which
// has a slot.
__device__ __forceinline__ void put_first(const Router& r, int id, float share) {
    const int lane = threadIdx.x, used = r.route.ids.ne[0];
    const bool here = lane < used && id >= 0 && id < r.held;
    const unsigned all = __ballot_sync(~0u, here), below = (1u << lane) - 1;
    const int slot = here ? __popc(all & below) : __popc(all) + __popc(~all & below);
    if (lane >= used) return;
    *r.route.ids.at<int>(slot, 0, 0, 0) = here ? id : -1;
    *r.route.weights.at<float>(slot, 0, 0, 0) = share;
}

// By all threads of block `expert`. Dynamic shared memory: that of `route_token`.
__device__ __forceinline__ void score_expert(const Router& r, int expert) {
    using Four = Pack<float, 4>;
    const float* row = r.w.row<float>(expert, 0, 0);
    const int k = r.w.ne[0], n = r.w.ne[1], first = 4 * threadIdx.x;
    Four w = {};
    if (first < k) w = *(const Four*)(row + first);
    if (threadIdx.x == 0) {  // the last block reads all of them
        if (r.route.own) fetch_early(r.route.own + expert);
        if (r.route.bias.data) fetch_early(r.route.bias.at<float>(expert, 0, 0, 0));
    }
    begin();
    float sum = 0;
    for (int i = first; i < k; i += 4 * blockDim.x) {
        if (i > first) w = *(const Four*)(row + i);
        const Four x = four_at(r.x + i);
#pragma unroll
        for (int j = 0; j < 4; ++j) sum = fmaf(w.v[j], x.v[j], sum);
    }
    sum = block_reduce<Sum>(sum, 0);
    __shared__ bool last;
    if (threadIdx.x == 0) {
        r.scores[expert] = sum;
        __threadfence();
        last = atomicInc(&arrived, n - 1) == n - 1;
        __threadfence();
    }
    __syncthreads();
    extern __shared__ Key keys[];
    if (last && threadIdx.x < 32)
        route_token(
            r.route, n, 0, keys, [&](int i) { return __ldcg(r.scores + i); },
            [&](int id, float share) { put_first(r, id, share); });
}

__global__ void __launch_bounds__(MOST_THREADS) router(const __grid_constant__ Router r) {
    score_expert(r, blockIdx.x);
}

// -- up and gate ----------------------------------------------------------------------------------

// 32 rows of act(gate x) * (up x) as a group of fixed point; w[0] is up, w[1] is gate, x is in fixed
// point. A quarter of the block's warps takes each of 4 tiles. EARLY: all weights are fetched into L2
// at once, because the memory is idle.
template <class F, bool EARLY, class... Limit>
__device__ __forceinline__ void gated_group(const Weights<F>& weights, int matrix, int number,
                                            Groups x, unsigned char* to, int act, Limit... limit) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = blockDim.x / 128;
    const int tile = number * 4 + warp / share, groups = groups_of(weights.w[0]);
    const Table<F> table(0);
    const Row<F> rows[2] = {Row<F>(weights.w[0], matrix, tile, lane % 8),
                            Row<F>(weights.w[1], matrix, tile, lane % 8)};
    auto load = [&](int r, int i) { return load_group(rows[r], min(i, groups - 1)); };
    Rounds<F, 2, 1> rounds(load, warp % share * 4 + lane / 8, 4 * share, groups);
    if (EARLY)
        for (int i = rounds.first + rounds.step; i < groups; i += rounds.step)
            rows[0].fetch(i), rows[1].fetch(i);
    begin();
    asm volatile("" : "+l"(x));  // nothing of it is read before
    table.ready();
    float sums[2] = {};
    rounds.each(table, load, [&](int i, const unsigned(&words)[2][8], const Scale(&scales)[2]) {
        const Fixed<2> column([&](int j) { return load_global(x + i * group_bytes<2> + 16 * j); });
#pragma unroll
        for (int r = 0; r < 2; ++r) sums[r] += dot_group<F, 2>(words[r], scales[r], column);
    });
    __shared__ float parts[MOST_THREADS / 32][2][8];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        sums[r] += __shfl_xor_sync(~0u, sums[r], 8);
        sums[r] += __shfl_xor_sync(~0u, sums[r], 16);
        if (lane < 8) parts[warp][r][lane] = sums[r];
    }
    __syncthreads();
    if (warp) return;
    float up = 0, gate = 0;
    for (int i = lane / 8 * share; i < (lane / 8 + 1) * share; ++i)
        up += parts[i][0][lane % 8], gate += parts[i][1][lane % 8];
    const float value = gated(act, gate, up, limit...);
    float four[4];
    for (int i = 0; i < 4; ++i) four[i] = __shfl_sync(~0u, value, (4 * lane + i) % 32);
    if (lane < 8) put_fixed<2>(four, to);
}

// grid: experts of the router, groups of rows of the shared experts. x: that of `router` in fixed
// point. Dynamic shared memory: that of `route_token`.
template <class F, class... Limit>
__global__ void __launch_bounds__(MOST_THREADS, gate_blocks<F>)
    gate(const __grid_constant__ Router r, const __grid_constant__ Weights<F> weights, Groups x,
         unsigned char* out, int act, Limit... limit) {
    const int group = blockIdx.x - r.w.ne[1];
    if (group < 0)
        score_expert(r, blockIdx.x);
    else
        gated_group<F, true>(weights, 0, group, x, out + group * group_bytes<2>, act, limit...);
}

// grid: groups of rows, slots. The launch before has chosen the experts. What `down` does not read of
// slots without one is not written.
template <class F, class... Limit>
__global__ void __launch_bounds__(MOST_THREADS, gate_blocks<F>)
    up_gate(const __grid_constant__ Weights<F> weights, Groups x, const int* ids, unsigned char* out, int act, Limit... limit) {
    wait_for_predecessor();
    const int id = ids[blockIdx.y];
    if (id < 0) return;
    gated_group<F, false>(weights, id, blockIdx.x, x,
                          out + (blockIdx.y * gridDim.x + blockIdx.x) * group_bytes<2>, act, limit...);
}

// -- down -----------------------------------------------------------------------------------------

// The chosen experts: of slot s the weights shares[s] and the groups of fixed point s. Slots without
// one come last.
struct Chosen {
    const unsigned char* x;
    const int* ids;
    const float* shares;
    int used;
};

// out = sum + plus + plus2; what is absent is null.
struct Sums {
    float* out;
    const float *plus, *plus2;
};

// A tile of rows: `before` adds up other products, once the launch before has ended. This lane's
// groups are first, first + step, .. of all slots.
template <class F, class Before>
__device__ __forceinline__ void sum_experts(const Weights<F>& weights, const Chosen& p, const Sums& to,
                                            int first, int step, Before before) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, tile = blockIdx.x;
    const bool here = lane < p.used && p.ids[lane] >= 0;
    const int groups = groups_of(weights.w[0]), n = groups * __popc(__ballot_sync(~0u, here));
    const Table<F> table(0);
    auto load = [&](int, int i) {
        i = max(0, min(i, n - 1));
        const int slot = i / groups;
        const Row<F> row(weights.w[0], max(0, p.ids[slot]), tile, lane % 8);
        return load_group(row, i - slot * groups);
    };
    Rounds<F, 1, F::code_runs == 2 ? 1 : 2> rounds(load, first, step, n);
    begin();
    Groups x = p.x;
    asm volatile("" : "+l"(x));
    const int i = tile * 8 + threadIdx.x;
    const bool mine = threadIdx.x < 8 && i < rows_of(weights.w[0]);
    float rest = 0;
    if (mine && to.plus) rest = to.plus[i];
    if (mine && to.plus2) rest += to.plus2[i];
    table.ready();
    float sum = before();
    rounds.each(table, load, [&](int i, const unsigned(&words)[1][8], const Scale(&scales)[1]) {
        const Fixed<2> column([&](int j) { return load_global(x + i * group_bytes<2> + 16 * j); });
        sum = fmaf(p.shares[i / groups], dot_group<F, 2>(words[0], scales[0], column), sum);
    });
    __shared__ float parts[MOST_THREADS / 32][8];
    sum += __shfl_xor_sync(~0u, sum, 8);
    sum += __shfl_xor_sync(~0u, sum, 16);
    if (lane < 8) parts[warp][lane] = sum;
    __syncthreads();
    if (!mine) return;
    float total = 0;
    for (int w = 0; w < blockDim.x / 32; ++w) total += parts[w][lane];
    to.out[i] = total + rest;
}

// grid: tiles of rows
template <class F>
__global__ void __launch_bounds__(MOST_THREADS, 2)
    down(const __grid_constant__ Weights<F> weights, Chosen p, Sums to) {
    const int own = threadIdx.x / 32 * 4 + threadIdx.x % 32 / 8;
    sum_experts(weights, p, to, own, blockDim.x / 8, [] { return 0.0f; });
}

// With the shared experts, whose groups come first: their weights do not depend on ids.
template <class F, class G>
__global__ void __launch_bounds__(MOST_THREADS, 2)
    down_shared(const __grid_constant__ Weights<F> weights, Chosen p, Sums to,
                const __grid_constant__ Weights<G> shared, Groups x) {
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 4 + lane / 8, step = blockDim.x / 8;
    const int groups = groups_of(shared.w[0]);
    const Table<G> table(0);
    const Row<G> row(shared.w[0], 0, blockIdx.x, lane % 8);
    auto load = [&](int, int i) { return load_group(row, min(i, groups - 1)); };
    Rounds<G, 1, 1> rounds(load, own, step, groups);
    const int turns = own < groups ? (groups - own + step - 1) / step : 0;
    sum_experts(weights, p, to, own + turns * step - groups, step, [&] {
        table.ready();
        float sum = 0;
        rounds.each(table, load, [&](int i, const unsigned(&words)[1][8], const Scale(&scales)[1]) {
            const Fixed<2> column([&](int j) { return load_global(x + i * group_bytes<2> + 16 * j); });
            sum += dot_group<G, 2>(words[0], scales[0], column);
        });
        return sum;
    });
}
