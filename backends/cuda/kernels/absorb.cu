// What latent attention to one token, or to a few, needs in one launch: the heads' queries
// [W_k^T nope | rope], and the tokens' rows of the cache. Of one token these were four launches:
// rope, products, a copy of the rotated part behind them, the row.
//
// q [n_nope + n_rot, heads, tokens], w [n_nope, n_c, heads], out [n_c + n_rot, tokens, heads]
// grid: blocks of 64 rows of a head's matrix, heads one after another, and a block for each row of
// the cache. A warp takes 8 rows for all tokens; it has all of a row of 128 weights at once, before
// it waits. The last warps of a head's first block rotate, a token each and a lane each pair. Reads
// w: 0.6 MB in V2-Lite; all else is a few KB.
// @kernel absorb<{BLOCKS}, {true|false}, Plain<__half>, 1>
// @kernel hot 90a absorb<{q4_0|q4_K|q6_K|q8_0|iq4_nl}, {true|false}, Plain<__half>, 1>
// @kernel absorb<{q8_0|iq4_nl}, {true|false}, {Plain<__nv_bfloat16>|file::q8_0|void}, 1>
// @kernel absorb<{SOME}, false, Plain<__half>, 8>
#include "latent_row.cuh"
#include "linear_vec.cuh"

using namespace tiles;
template <class T>
using Plain = file::Plain<T>;

struct Absorb {
    const float* q;
    char* out;
    // From head to head and from token to token, in bytes.
    long long q_step, out_step, q_next, out_next;
    const int* pos;
    Rope rope;
    int n_nope, n_c, n_rot, parts, tokens;  // parts: blocks of a head
};

constexpr int WARPS = 8;

// TOKENS: 1, or as many as there are warps.
template <class F, bool NEOX, int TOKENS>
__device__ __forceinline__ void absorb_rows(const Weights<F>& weights, const Absorb& p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
    const int tile = part * 8 + warp, groups = groups_of(weights.w[0]);
    const int own = WARPS - 1 - warp;  // the token that this warp rotates
    const bool turns = part == 0 && own < p.tokens && lane < p.n_rot / 2;
    const double frequency = turns ? frequency_of(lane, p.rope) : 0;  // calls: not with loads behind
    const Table<F> table(0);
    const Row<F> row(weights.w[0], head, min(tile, (p.n_c - 1) / 8), lane % 8);
    auto load = [&](int, int i) { return load_group(row, min(i, groups - 1)); };
    Rounds<F, 1, 1> rounds(load, lane / 8, 4, groups);
    begin();
    const auto q_of = [&](int token) {
        return (const float*)((const char*)p.q + head * p.q_step + token * p.q_next);
    };
    const auto out_of = [&](int token) {
        return (float*)(p.out + head * p.out_step + token * p.out_next);
    };
    extern __shared__ uint4 groups_of_q[];
    constexpr int WORDS = group_bytes<2> / 16;
    for (int token = 0; token < p.tokens; ++token)
        for (int i = threadIdx.x; i < groups * 8; i += 32 * WARPS)
            put_fixed<2>(four_at(q_of(token) + 4 * i).v,
                         (unsigned char*)(groups_of_q + (token * groups + i / 8) * WORDS));
    __syncthreads();
    table.ready();
    float sums[TOKENS] = {};
    rounds.each(table, load, [&](int i, const unsigned(&words)[1][8], const Scale(&scales)[1]) {
#pragma unroll
        for (int token = 0; token < TOKENS; ++token) {
            if (token >= p.tokens) break;
            const uint4* from = groups_of_q + (token * groups + i) * WORDS;
            const Fixed<2> column([&](int j) { return from[j]; });
            sums[token] += dot_group<F, 2>(words[0], scales[0], column);
        }
    });
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        if (token >= p.tokens) break;
        float sum = sums[token];
        sum += __shfl_xor_sync(~0u, sum, 8);
        sum += __shfl_xor_sync(~0u, sum, 16);
        if (lane < 8 && tile * 8 + lane < p.n_c) out_of(token)[tile * 8 + lane] = sum;
    }
    if (!turns) return;
    const float* q = q_of(own);
    float* out = out_of(own);
    turn<NEOX>(
        p.rope, lane, frequency, p.n_nope + p.n_rot, p.pos[own], Tensor{}, [&](int i) { return q[i]; },
        [&](int i, float x) { out[p.n_c - p.n_nope + i] = x; });
}

// B: of the cache, void if another launch writes the rows.
template <class F, bool NEOX, class B, int TOKENS>
__global__ void __launch_bounds__(32 * WARPS)
    absorb(const __grid_constant__ Weights<F> weights, const __grid_constant__ Absorb p,
           const __grid_constant__ LatentRow row) {
    if constexpr (!Same<B, void>::yes) {
        const int token = (int)blockIdx.x - (int)gridDim.x + p.tokens;
        if (token >= 0) {
            write_latent_row<B, NEOX>(row, token);
            return;
        }
    }
    absorb_rows<F, NEOX, TOKENS>(weights, p);
}
