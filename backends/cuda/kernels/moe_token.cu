// A feed-forward layer of experts for one token, or for a few, in three launches:
//
//   router   scores of the experts
//   up_gate  up and gate of the shared experts, and beside them of the chosen ones
//   down     their weighted sum through down, that of the shared experts, and what else is added
//
// It was seven launches of 2 us and more for one token, three of which moved a few KB. V2-Lite in
// iq4_nl reads 0.5, 26 and 13 MB. Blocks of up and gate compute 32 rows, so that they leave a group
// of fixed point; else each block of down would have to make 352 of them.
//
// Between the scores and the first expert's weights the memory would idle. So
//   - the router leaves ranks, if an expert's own score decides (best_of in route.cuh), and each block
//     of up_gate and of down chooses experts by them: about 0.1 us for each slot, and a block only
//     chooses until it knows its own. The blocks of down do so before they wait.
//   - the shared experts do not wait for the router. They come first in the grid, and their places
//     are free again when ids are known. `router` fetches their weights into L2, also those of down.
//   - all blocks of up and gate are on the GPU at once, 8 warps each.
//   - the norm in front of one token has no launch (normed.cuh): `norm_router` scores, and its first
//     block leaves the row in fixed point for the chosen experts. The shared experts' blocks, which do
//     not wait for it, make their own.
// Left out: blocks of up_gate that fetch down of their expert into L2 when they end. It changed nothing
// where a second wave left the memory idle. Without one, the first blocks ended at 6.7 us and the last
// at 13.1, with the memory busy all the time: what down reads early, up and gate have to wait for, and
// down cannot compute before.
// Lost: blocks that chose by scores, 16 warps each, of which 264 fit for 354: 16.2 us for up and
// gate, of which a block took 9 (8 and more for those that came later), and 7.1 for down, on an H100.
// Before, the last block of the router chose for all, beside the shared experts: a counter in memory
// between two fences and one more way to ids, 6.9 us where the bytes take 2.3.
//
// A GPU may have a part of the experts. It scores and chooses among all of them, as the others do,
// and a table says which are its own. Hidden rows of these stand in front, so that `down` knows
// where its sum ends; blocks of other experts end at once.
//
// Several tokens: each pair of token and slot reads its expert, neighbors in the grid the same rows
// of all experts; so what two tokens share comes from L2.
// @kernel hot router<{1|8}>
// @kernel hot up_gate<{BLOCKS}>
// @kernel hot up_gate_shared<{BLOCKS}, $1>
// @kernel up_gate_shared<q8_0, {q2_K|q4_K|q6_K|iq4_nl}>
// @kernel hot norm_router<{1|4}, 1, NormedRow>
// @kernel hot norm_router<1, 1, SummedRow>
// @kernel norm_router<4, 2, SummedRow>
// @kernel hot 90a norm_router<4, 2, SummedRow>
// @kernel hot up_gate_normed<{BLOCKS}, $1>
// @kernel up_gate_normed<q8_0, {q2_K|q4_K|q6_K|iq4_nl}>
// @kernel hot up_gate_late<{BLOCKS}, $1>
// @kernel up_gate_late<q8_0, {q2_K|q4_K|q6_K|iq4_nl}>
// @kernel hot down<{BLOCKS}, {Sums|SentSums}>
// @kernel hot down_shared<{BLOCKS}, $1, {Sums|SentSums}>
// @kernel down_shared<q8_0, {q2_K|q4_K|q6_K|iq4_nl}, {Sums|SentSums}>
#include "linear_vec.cuh"
#include "rounds.cuh"
#include "route.cuh"

using namespace tiles;

constexpr int MOST_THREADS = 512, MOST_WARPS = MOST_THREADS / 32, MOST_USED = 32;
// Up and gate: blocks of up to GATE_THREADS that a multiprocessor holds. So V2-Lite's 352 (codes of 4
// bits) and V4's 448 (of 2) are one wave.
constexpr int GATE_THREADS = 256;
template <class F>
constexpr int gate_blocks = F::code_runs || (F::high && !F::grid) ? 3 : 4;
template <class F, class G>
constexpr int least_blocks = gate_blocks<F> < gate_blocks<G> ? gate_blocks<F> : gate_blocks<G>;
// Rounds on their way from memory besides the one that is decoded: two where BLOCKS blocks leave 80
// registers to a thread, and these are enough.
template <class F, int BLOCKS>
constexpr int gate_ahead =
    BLOCKS < 4 && F::code_runs < 2 && !(F::code_runs && (F::super_bytes == 4 || F::high)) ? 2 : 1;
// Weights that a later launch reads: bytes of a tile in each plane, tiles of a matrix, and those that
// a block fetches; none if they are too many.
struct Ahead {
    const unsigned char* planes[4];
    int tile_bytes[4], tiles, part;
};

// Fetches part `number` of a matrix into L2. By one thread. It asks for too much at both ends, up to
// 16 bytes.
__device__ __forceinline__ void fetch_part(const Ahead& a, int number) {
#if __CUDA_ARCH__ >= 900
    const int first = a.part * number, tiles = max(0, min(a.part, a.tiles - first));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const unsigned bytes = a.tile_bytes[i] * tiles;
        const unsigned char* at = a.planes[i] + (long long)first * a.tile_bytes[i];
        const unsigned before = (size_t)at & 15;
        if (bytes)
            asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(at - before),
                         "r"((before + bytes + 15) & ~15u));
    }
#endif
}

// -- router ---------------------------------------------------------------------------------------

// Scores of experts: w [k, experts] times x [k, tokens], and their ranks as `best_of` takes them, or
// null. bias, gate, scale: of Route; own: of Route, for the next launch.
struct Router {
    Tensor w, x;
    float* scores;
    unsigned* ranks;
    const float* bias;
    const int* own;
    int gate;
    float scale;
};

// grid: experts. up, gate, next: of the shared experts; next is their down.
template <int TOKENS>
__global__ void __launch_bounds__(MOST_THREADS)
    router(const __grid_constant__ Router r, const __grid_constant__ Ahead up,
           const __grid_constant__ Ahead gate, const __grid_constant__ Ahead next) {
    using Four = Pack<float, 4>;
    const int expert = blockIdx.x, k = r.w.ne[0], n = r.w.ne[1], tokens = r.x.ne[1];
    const int warp = threadIdx.x / 32, first = 4 * threadIdx.x;
    const float* row = r.w.row<float>(expert, 0, 0);
    Four w = {};
    if (first < k) w = *(const Four*)(row + first);
    if (threadIdx.x == 0) {
        fetch_part(up, expert), fetch_part(gate, expert);
        if (r.bias) fetch_early(r.bias + expert);
        if (r.own) fetch_early(r.own + expert);
    }
    begin();
    const float bias = r.bias && threadIdx.x < tokens ? r.bias[expert] : 0;
    float sums[TOKENS] = {};
    for (int i = first; i < k; i += 4 * blockDim.x) {
        if (i > first) w = *(const Four*)(row + i);
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            const Four x = four_at(r.x.row<float>(min(t, tokens - 1), 0, 0) + i);
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[t] = fmaf(w.v[j], x.v[j], sums[t]);
        }
    }
    __shared__ float parts[MOST_WARPS][TOKENS];
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
        sums[t] = warp_reduce<Sum>(sums[t]);
        if (threadIdx.x % 32 == 0) parts[warp][t] = sums[t];
    }
    __syncthreads();
    if (threadIdx.x < tokens) {
        float sum = 0;
        for (int i = 0; i < blockDim.x / 32; ++i) sum += parts[i][threadIdx.x];
        const int at = threadIdx.x * n + expert;
        r.scores[at] = sum;
        if (r.ranks) r.ranks[at] = rank_of(gate_of(r.gate, sum * r.scale) + bias);
    }
    if (threadIdx.x == 32) fetch_part(next, expert);
}

// The same of one token whose row a norm has yet to scale. The first block makes it fixed point for
// the chosen experts and writes x + plus to `sum`, if present. A thread takes up to HELD packs. A long
// row that several GPUs add up is read by half as many blocks, each with two experts: all are on the
// GPU at once, and L2 delivers half.
// grid: 1 + experts / EXPERTS.
template <int HELD, int EXPERTS, class X>
__global__ void __launch_bounds__(MOST_THREADS)
    norm_router(const __grid_constant__ Router r, const __grid_constant__ X of,
                unsigned char* fixed, float* sum, const __grid_constant__ Ahead up,
                const __grid_constant__ Ahead gate, const __grid_constant__ Ahead next) {
    using Four = Pack<float, 4>;
    const NormedRow& x = row_of(of);
    const int first = (blockIdx.x - 1) * EXPERTS, n = r.w.ne[1];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const bool scores = blockIdx.x > 0;
    Four w[HELD][EXPERTS], h[HELD] = {};
    FixedEnd ends[HELD];
    auto place = [&](int p) { return 4 * (threadIdx.x + p * (int)blockDim.x); };
    auto each = [&](auto f) {
#pragma unroll
        for (int p = 0; p < HELD; ++p)
            if (place(p) < x.n) f(p, place(p));
    };
    // Calls f for each expert of this block; of an odd number, the last one has no block of its own.
    auto experts = [&](auto f) {
#pragma unroll
        for (int e = 0; e < EXPERTS; ++e)
            if (scores && (EXPERTS == 1 || first + e < n)) f(e, first + e);
    };
    each([&](int p, int i) {
#pragma unroll
        for (int e = 0; e < EXPERTS; ++e) w[p][e] = weights_at(x, i);
        experts([&](int e, int expert) {
            multiply(w[p][e], *(const Four*)(r.w.row<float>(expert, 0, 0) + i));
        });
    });
    if (threadIdx.x == 0)
        experts([&](int, int expert) {
            fetch_part(up, expert), fetch_part(gate, expert);
            if (r.bias) fetch_early(r.bias + expert);
            if (r.own) fetch_early(r.own + expert);
        });
    const unsigned round = round_of(of);
    begin();
    float bias[EXPERTS] = {}, score[EXPERTS] = {}, squares = 0;
    if (r.bias) experts([&](int e, int expert) { bias[e] = r.bias[expert]; });
    decltype(ask(of, round, 0)) asked[HELD];
    each([&](int p, int i) { asked[p] = ask(of, round, i); });
    each([&](int p, int i) { h[p] = values_of(of, asked[p], round, i); });
    each([&](int p, int i) {
        squares += squares_of(h[p]);
        if (!scores && sum) *(Four*)(sum + i) = h[p];
        experts([&](int e, int) {
            Four y = h[p];
            multiply(y, w[p][e]);
            score[e] += y.v[0] + y.v[1] + (y.v[2] + y.v[3]);
        });
        if (!scores) multiply(h[p], w[p][0]);
    });
    if (!scores)
#pragma unroll
        for (int p = 0; p < HELD; ++p) {
            unsigned char* const to = fixed + place(p) / 32 * group_bytes<2>;
            ends[p] = put_levels<2, true>(h[p].v, to, place(p) < x.n);
        }
    __shared__ float parts[1 + EXPERTS][MOST_WARPS];
    squares = warp_reduce<Sum>(squares);
    if (lane == 0) parts[0][warp] = squares;
#pragma unroll
    for (int e = 0; e < EXPERTS; ++e) {
        score[e] = warp_reduce<Sum>(score[e]);
        if (lane == 0) parts[1 + e][warp] = score[e];
    }
    __syncthreads();
    auto total = [&](int i) {
        return warp_reduce<Sum>(lane < blockDim.x / 32 ? parts[i][lane] : 0.0f);
    };
    const float factor = factor_of(x, total(0));
    if (!scores) {
        if (lane % 8 == 0)
            each([&](int p, int i) {
                ends[p].put((float4*)(fixed + i / 32 * group_bytes<2> + 64), factor);
            });
        return;
    }
    experts([&](int e, int expert) {
        const float own = total(1 + e) * factor;
        if (threadIdx.x == 0) {
            r.scores[expert] = own;
            if (r.ranks) r.ranks[expert] = rank_of(gate_of(r.gate, own * r.scale) + bias[e]);
        }
        if (threadIdx.x == 32) fetch_part(next, expert);
    });
}

// What experts are chosen by: scores [experts, tokens], and ranks if the router has written them, of
// up to MOST_RANKED experts. local: experts whose weights are on this GPU.
struct Candidates {
    const float* scores;
    const unsigned* ranks;
    int experts, local;
    Route route;
};

// Of this lane's slot: the id, the expert's number here, -1 if it is not here, and its place among
// those that are.
struct Slot {
    int id, number, place;
};

// Experts whose ranks the router writes, and those that a lane has two of.
constexpr int MOST_RANKED = 256, FEW_RANKED = 64;

// Chooses the first `slots` slots of a token, a lane each. By the first warp of a block.
__device__ __forceinline__ Slot slot_of(const Candidates& c, int token, int slots, const Places& at) {
    const int n = c.experts, first = token * n;
    int id, number;
    if (c.ranks) {
        id = n <= FEW_RANKED ? best_of<FEW_RANKED / 32>(c.route, c.ranks + first, n, slots)
                             : best_of<MOST_RANKED / 32>(c.route, c.ranks + first, n, slots);
        number = c.route.own && id >= 0 ? c.route.own[id] : id;
    } else {
        id = choose(c.route, n, token, slots, at, [&](int i) { return c.scores[first + i]; });
        number = number_of(c.route, n, at, id);
    }
    const bool here = number >= 0 && number < c.local;
    const unsigned all = __ballot_sync(~0u, here), below = (1u << threadIdx.x) - 1;
    return {id, here ? number : -1, __popc(all & below)};
}

// The weight of this lane's slot, whose id is `id`; all slots have been chosen.
__device__ __forceinline__ float share_of(const Candidates& c, int token, int id, const Places& at) {
    const int n = c.experts;
    if (!c.ranks) return weight_of(c.route, n, at, id);
    const float* scores = c.scores + token * n;
    return weight_of(c.route, n <= FEW_RANKED ? p_of<FEW_RANKED / 32>(c.route, scores, n, id)
                                              : p_of<MOST_RANKED / 32>(c.route, scores, n, id));
}

// -- up and gate ----------------------------------------------------------------------------------

// x [k, tokens] and the result are in fixed point. act(min(gate, limit)) * clamp(up, -limit,
// limit).
struct Gated {
    const unsigned char* x;
    unsigned char* out;
    int act;
    float limit;
};

// The expert of a block, its group of rows, and where it is in the result: row `place` of `slots` of
// the token. In shared memory they hold no registers.
struct Task {
    int expert, number, place, slots;
    Gated p;
};
__device__ __forceinline__ Task& task() {
    __shared__ Task task;
    return task;
}

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// Makes a row fixed point for this block alone. The sum of its squares is that of `squares`, of each
// warp.
__device__ __forceinline__ void own_groups(const NormedRow& x, unsigned char* groups,
                                           float (&squares)[MOST_WARPS]) {
    float sum = 0;
    for (int i = 4 * threadIdx.x; i / 128 * 128 < x.n; i += 4 * blockDim.x) {  // by whole warps
        const bool real = i < x.n;
        const Pack<float, 4> w = weights_at(x, real ? i : 0);
        Pack<float, 4> h = values_at(x, real ? i : 0);
        if (real) sum += squares_of(h);
        multiply(h, w);
        put_fixed<2, true>(h.v, groups + i / 32 * group_bytes<2>, real);
    }
    sum = warp_reduce<Sum>(sum);
    if (threadIdx.x % 32 == 0) squares[threadIdx.x / 32] = sum;
    __syncthreads();
}

// In its place: the block waits for the launch before, which has left the row.
struct Late {};
__device__ __forceinline__ void own_groups(const Late&, unsigned char*, float (&)[MOST_WARPS]) {
    begin();
}

// The rows of a warp in group `number` of the first expert's, and the group of this lane that comes
// first. A quarter of the block's warps, one or two, takes each of 4 tiles. Made before the wait, so
// that few instructions are between the choice of an expert and its first weights.
template <class F>
struct GatedRows {
    Row<F> rows[2];
    int first;

    __device__ __forceinline__ GatedRows(const Weights<F>& weights, int number) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = blockDim.x / 128;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            rows[r] = Row<F>(weights.w[r], 0, number * 4 + (warp >> (share - 1)), lane % 8);
            if (!F::grid) rows[r].pin();  // they have no registers to spare
        }
        first = (warp & (share - 1)) * 4 + lane / 8;
    }
};

// 32 rows of up and gate (w[0] and w[1]) of token blockIdx.y as a group of fixed point: that of
// `task`. `own`: the row that the block makes
// fixed point itself, if there is one.
template <class F, int BLOCKS, class... Own>
__device__ __forceinline__ void gated_group(const Weights<F>& weights, GatedRows<F> at,
                                            const Own*... own) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, share = blockDim.x / 128;
    const int groups = groups_of(weights.w[0]);
    const Groups all = task().p.x + blockIdx.y * groups * group_bytes<2>;
    const Table<F> table(0);
#pragma unroll
    for (int r = 0; r < 2; ++r) at.rows[r].skip(weights.w[r], task().expert);
    auto load = [&](int r, int i) { return load_group(at.rows[r], min(i, groups - 1)); };
    using C = Codes<F, F::table && F::super_bytes == 0>;  // 80 registers
    Rounds<F, 2, gate_ahead<F, BLOCKS>, true, C> rounds(load, at.first, 4 * share, groups);
    __shared__ float squares[MOST_WARPS];
    ((own ? own_groups(*own, (unsigned char*)all, squares) : void()), ...);
    table.ready();
    float sums[2] = {};
    rounds.each(table, load, [&](int i, const C(&codes)[2], const Scale(&scales)[2]) {
        const Groups x = all + i * group_bytes<2>;
        const Fixed<2> column([&](int j) {
            if constexpr (sizeof...(Own) == 0) return load_global(x + 16 * j);
            return *(const uint4*)(x + 16 * j);  // may be in shared memory
        });
#pragma unroll
        for (int r = 0; r < 2; ++r) sums[r] += dot_group(codes[r], scales[r], column);
    });
    __shared__ float parts[MOST_WARPS][2][8];
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
    auto scale = [&](const auto* x) {
        if constexpr (!same<decltype(x), const Late*>) {
            float sum = 0;
            for (int i = 0; i < blockDim.x / 32; ++i) sum += squares[i];
            const float factor = factor_of(*x, sum);
            up *= factor, gate *= factor;
        }
    };
    ((own ? scale(own) : void()), ...);
    const Gated& p = task().p;
    const float value = gated(p.act, gate, up, p.limit);
    float four[4];
    for (int i = 0; i < 4; ++i) four[i] = __shfl_sync(~0u, value, (4 * lane + i) % 32);
    const long long row = blockIdx.y * task().slots + task().place, parts_of_row = rows_of(weights.w[0]) / 32;
    unsigned char* const to = p.out + (row * parts_of_row + task().number) * group_bytes<2>;
    put_fixed<2, true>(four, to, lane < 8);
}

// Makes the expert of slot blockIdx.x the task. number: of the group of rows.
__device__ __forceinline__ void choose_task(const Candidates& c, const Gated& p, int number) {
    extern __shared__ Key memory[];
    begin();
    if (threadIdx.x < 32) {
        const Places at(c.route, c.experts, memory);
        const Slot slot = slot_of(c, blockIdx.y, blockIdx.x + 1, at);
        if (threadIdx.x == blockIdx.x) task() = {slot.number, number, slot.place, (int)gridDim.x, p};
    }
}

// grid: slots, tokens, groups of rows.
template <class F>
__global__ void __launch_bounds__(GATE_THREADS, gate_blocks<F>)
    up_gate(const __grid_constant__ Weights<F> weights, const __grid_constant__ Gated p,
            const __grid_constant__ Candidates c) {
    if constexpr (F::grid && F::scale_bytes == 1) {  // no registers for rows before the choice
        choose_task(c, p, blockIdx.z);
        __syncthreads();
        if (task().expert >= 0) gated_group<F, gate_blocks<F>>(weights, {weights, (int)blockIdx.z});
    } else {
        const GatedRows<F> rows(weights, blockIdx.z);
        choose_task(c, p, blockIdx.z);
        __syncthreads();
        if (task().expert >= 0) gated_group<F, gate_blocks<F>>(weights, rows);
    }
}

// The same behind `first` layers of blocks for the groups of rows of the shared experts. x and
// weights are older than the launch before. Where all weights have one type, all blocks run the same
// instructions: those that wait for the router find them in the caches.
// normed: the shared experts' blocks make this row fixed point themselves, because only the launch
// before does it for all; or they wait for that one. Such a layer's blocks have no token but one.
template <class F, class G, class... Own>
__device__ __forceinline__ void up_gate_of_both(const Weights<F>& weights, const Gated& p,
                                                const Candidates& c, const Weights<G>& shared,
                                                const Gated& own, int first, const Own*... normed) {
    constexpr int BLOCKS = least_blocks<F, G>;
    const bool chosen = blockIdx.z >= first;
    const int number = chosen ? blockIdx.z - first : blockIdx.z * gridDim.x + blockIdx.x;
    const Weights<F>* all = &weights;
    if constexpr (same<F, G>) all = chosen ? &weights : &shared;
    const GatedRows<F> rows(*all, number);
    if (chosen) {
        choose_task(c, p, number);
    } else if (threadIdx.x == 0) {
        task() = {number < rows_of(shared.w[0]) / 32 ? 0 : -1, number, 0, 1, own};
        extern __shared__ Key memory[];
        if ((same<Own, NormedRow> || ...)) task().p.x = (Groups)memory;
    }
    __syncthreads();
    if (task().expert >= 0) {
        if constexpr (same<F, G>)
            gated_group<F, BLOCKS>(*all, rows, (chosen ? nullptr : normed)...);
        else if (chosen)
            gated_group<F, BLOCKS>(weights, rows);
        else
            gated_group<G, BLOCKS>(shared, GatedRows<G>(shared, number), normed...);
    }
    if (!chosen) begin();
}

template <class F, class G>
__global__ void __launch_bounds__(GATE_THREADS, least_blocks<F, G>)
    up_gate_shared(const __grid_constant__ Weights<F> weights, const __grid_constant__ Gated p,
                   const __grid_constant__ Candidates c, const __grid_constant__ Weights<G> shared,
                   const __grid_constant__ Gated own, int first) {
    up_gate_of_both(weights, p, c, shared, own, first);
}

template <class F, class G>
__global__ void __launch_bounds__(GATE_THREADS, least_blocks<F, G>)
    up_gate_normed(const __grid_constant__ Weights<F> weights, const __grid_constant__ Gated p,
                   const __grid_constant__ Candidates c, const __grid_constant__ Weights<G> shared,
                   const __grid_constant__ Gated own, int first,
                   const __grid_constant__ NormedRow normed) {
    up_gate_of_both(weights, p, c, shared, own, first, &normed);
}

// As up_gate_shared, where the launch before makes x: a row that several GPUs add up has come by then,
// and the weights are in registers.
template <class F, class G>
__global__ void __launch_bounds__(GATE_THREADS, least_blocks<F, G>)
    up_gate_late(const __grid_constant__ Weights<F> weights, const __grid_constant__ Gated p,
                 const __grid_constant__ Candidates c, const __grid_constant__ Weights<G> shared,
                 const __grid_constant__ Gated own, int first) {
    const Late late;
    up_gate_of_both(weights, p, c, shared, own, first, &late);
}

// -- down -----------------------------------------------------------------------------------------

// out = sum + plus + plus2, a row for each token; what is absent is null.
struct Sums {
    Tensor out, plus, plus2;
};
// The same of one token, as this GPU's part of a row that several add up: it also goes to them.
struct SentSums {
    Sums sums;
    Round sum;
};
__device__ __forceinline__ const Sums& sums_of(const Sums& s) { return s; }
__device__ __forceinline__ const Sums& sums_of(const SentSums& s) { return s.sums; }
__device__ __forceinline__ unsigned round_of(const Sums&) { return 0; }
__device__ __forceinline__ unsigned round_of(const SentSums& s) { return round_of(s.sum); }
__device__ __forceinline__ void send(const Sums&, unsigned, int, float) {}
__device__ __forceinline__ void send(const SentSums& s, unsigned round, int row, float value) {
    send(s.sum, round, row, value);
}

// Whether the groups of all rows are one after another.
template <class Source>
constexpr bool numbered = false;
template <>
constexpr bool numbered<Packed> = true;

// A tile of rows of the chosen experts: x [groups, slots, tokens] in fixed point. `before` adds up
// other products, once the launch before has ended. This lane's groups are first, first + step, ..
// of all slots. Chooses before it waits: the launch before has not written scores.
template <class F, class S, class Before>
__device__ __forceinline__ void sum_experts(const Weights<F>& weights, Groups x, const Candidates& c,
                                            const S& to, int first, int step, Before before) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, token = blockIdx.x, tile = blockIdx.y;
    const int groups = groups_of(weights.w[0]), used = c.route.ids.ne[0];
    // Of each slot that is here: what makes the number of a group among those of all slots that among
    // all in memory. Of rows of a file, which have no such number: the expert.
    extern __shared__ Key memory[];
    __shared__ int origins[MOST_USED], here;
    __shared__ float shares[MOST_USED];
    if (warp == 0) {
        const Places at(c.route, c.experts, memory);
        const Slot slot = slot_of(c, token, used, at);
        const float share = share_of(c, token, slot.id, at);
        if (slot.number >= 0) {
            const int first = (slot.number * (int)gridDim.y + tile - slot.place) * groups;
            origins[slot.place] = numbered<typename F::Source> ? first : slot.number;
            shares[slot.place] = share;
        }
        if (lane == 31) {
            const int all = slot.place + (slot.number >= 0);
            here = all;
            if (all == 0) origins[0] = 0;  // read early even then
        }
    }
    __syncthreads();
    const int n = here * groups;
    const Table<F> table(0);
    const unsigned by = 0x80000000u / groups + 1;  // 2^31 exceeds the groups of slots times groups
    auto slot_at = [&](int i) { return __umulhi(2 * i, by); };  // i / groups
    const Row<F> first_row(weights.w[0], 0, 0, lane % 8);
    auto load = [&](int, int i) {
        i = max(0, min(i, n - 1));
        const int slot = slot_at(i), origin = origins[slot];
        if constexpr (numbered<typename F::Source>) return load_group(first_row, origin + i);
        return load_group(Row<F>(weights.w[0], origin, tile, lane % 8), i - slot * groups);
    };
    Rounds<F, 1, F::code_runs == 2 ? 1 : 2> rounds(load, first, step, n);
    const unsigned round = round_of(to);
    begin();
    x += (long long)token * used * groups * group_bytes<2>;
    asm volatile("" : "+l"(x));  // nothing of it is read before
    const int row = tile * 8 + threadIdx.x;
    const bool mine = threadIdx.x < 8 && row < rows_of(weights.w[0]);
    float rest = 0;
    const Sums& sums = sums_of(to);
    if (mine && sums.plus.data) rest = sums.plus.row<float>(token, 0, 0)[row];
    if (mine && sums.plus2.data) rest += sums.plus2.row<float>(token, 0, 0)[row];
    table.ready();
    float sum = before();
    rounds.each(table, load, [&](int i, const CodesFor<F>(&codes)[1], const Scale(&scales)[1]) {
        const Fixed<2> column([&](int j) { return load_global(x + i * group_bytes<2> + 16 * j); });
        sum = fmaf(shares[slot_at(i)], dot_group(codes[0], scales[0], column), sum);
    });
    __shared__ float parts[MOST_WARPS][8];
    sum += __shfl_xor_sync(~0u, sum, 8);
    sum += __shfl_xor_sync(~0u, sum, 16);
    if (threadIdx.x % 32 < 8) parts[threadIdx.x / 32][threadIdx.x % 32] = sum;
    __syncthreads();
    if (!mine) return;
    float total = 0;
    for (int w = 0; w < blockDim.x / 32; ++w) total += parts[w][threadIdx.x];
    sums.out.row<float>(token, 0, 0)[row] = total + rest;
    send(to, round, row, total + rest);
}

// grid: tokens, tiles of rows
template <class F, class S>
__global__ void __launch_bounds__(MOST_THREADS, 2)
    down(const __grid_constant__ Weights<F> weights, Groups x, const __grid_constant__ Candidates c,
         const __grid_constant__ S to) {
    const int own = threadIdx.x / 32 * 4 + threadIdx.x % 32 / 8;
    sum_experts(weights, x, c, to, own, blockDim.x / 8, [] { return 0.0f; });
}

// With the shared experts, whose groups come first: their weights do not depend on ids.
template <class F, class G, class S>
__global__ void __launch_bounds__(MOST_THREADS, 2)
    down_shared(const __grid_constant__ Weights<F> weights, Groups x, const __grid_constant__ Candidates c,
                const __grid_constant__ S to, const __grid_constant__ Weights<G> shared,
                Groups shared_x) {
    const int lane = threadIdx.x % 32, own = threadIdx.x / 32 * 4 + lane / 8, step = blockDim.x / 8;
    const int groups = groups_of(shared.w[0]);
    const Table<G> table(0);
    const Row<G> row(shared.w[0], 0, blockIdx.y, lane % 8);
    auto load = [&](int, int i) { return load_group(row, min(i, groups - 1)); };
    Rounds<G, 1, 1> rounds(load, own, step, groups);
    shared_x += (long long)blockIdx.x * groups * group_bytes<2>;
    const int turns = own < groups ? (groups - own + step - 1) / step : 0;
    sum_experts(weights, x, c, to, own + turns * step - groups, step, [&] {
        asm volatile("" : "+l"(shared_x));  // nothing of it is read before
        table.ready();
        float sum = 0;
        rounds.each(table, load, [&](int i, const CodesFor<G>(&codes)[1], const Scale(&scales)[1]) {
            const Groups from = shared_x + i * group_bytes<2>;
            const Fixed<2> column([&](int j) { return load_global(from + 16 * j); });
            sum += dot_group(codes[0], scales[0], column);
        });
        return sum;
    });
}
