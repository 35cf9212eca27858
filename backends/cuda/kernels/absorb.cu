// What latent attention to one token needs, in one launch: the heads' queries [W_k^T nope | rope], and
// the token's row of the cache. Four launches did this before: rope, products, a copy of the rotated
// part behind them, the row.
//
// q [n_nope + n_rot, heads], w [n_nope, n_c, heads], out [n_c + n_rot, heads]
// grid: blocks of 64 rows of a head's matrix, heads one after another, and one block for the row. A
// warp takes 8 rows; it has all of a row of 128 weights at once, before it waits. The last warp of a
// head's first block rotates, a lane each pair. Reads w: 0.6 MB in V2-Lite; all else is a few KB.
// @kernel absorb<{BLOCKS}, {true|false}, Plain<__half>>
// @kernel hot 90a absorb<{q4_0|q4_K|q6_K|q8_0|iq4_nl}, {true|false}, Plain<__half>>
// @kernel absorb<{q8_0|iq4_nl}, {true|false}, {Plain<__nv_bfloat16>|file::q8_0|void}>
#include "latent_row.cuh"
#include "linear_vec.cuh"

using namespace tiles;
template <class T>
using Plain = file::Plain<T>;

struct Absorb {
    const float* q;
    char* out;
    long long q_step, out_step;  // from head to head, in bytes
    const int* pos;
    Rope rope;
    int n_nope, n_c, n_rot, parts;  // parts: blocks of a head
};

template <class F, bool NEOX>
__device__ __forceinline__ void absorb_rows(const Weights<F>& weights, const Absorb& p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
    const int tile = part * 8 + warp, groups = groups_of(weights.w[0]);
    const bool turns = part == 0 && warp == 7 && lane < p.n_rot / 2;
    const double frequency = turns ? frequency_of(lane, p.rope) : 0;  // calls: not with loads behind
    const Table<F> table(0);
    const Row<F> row(weights.w[0], head, min(tile, (p.n_c - 1) / 8), lane % 8);
    auto load = [&](int, int i) { return load_group(row, min(i, groups - 1)); };
    Rounds<F, 1, 1> rounds(load, lane / 8, 4, groups);
    begin();
    const float* q = (const float*)((const char*)p.q + head * p.q_step);
    float* out = (float*)(p.out + head * p.out_step);
    extern __shared__ uint4 groups_of_q[];
    constexpr int WORDS = group_bytes<2> / 16;
    for (int i = threadIdx.x; i < groups * 8; i += 256) {
        put_fixed<2>(four_at(q + 4 * i).v, (unsigned char*)(groups_of_q + i / 8 * WORDS));
    }
    __syncthreads();
    table.ready();
    float sum = 0;
    rounds.each(table, load, [&](int i, const unsigned(&words)[1][8], const Scale(&scales)[1]) {
        const Fixed<2> column([&](int j) { return groups_of_q[i * WORDS + j]; });
        sum += dot_group<F, 2>(words[0], scales[0], column);
    });
    sum += __shfl_xor_sync(~0u, sum, 8);
    sum += __shfl_xor_sync(~0u, sum, 16);
    if (lane < 8 && tile * 8 + lane < p.n_c) out[tile * 8 + lane] = sum;
    if (turns)
        turn<NEOX>(
            p.rope, lane, frequency, p.n_nope + p.n_rot, *p.pos, Tensor{}, [&](int i) { return q[i]; },
            [&](int i, float x) { out[p.n_c - p.n_nope + i] = x; });
}

// B: of the cache, void if another launch writes the row.
template <class F, bool NEOX, class B>
__global__ void __launch_bounds__(256)
    absorb(const __grid_constant__ Weights<F> weights, const __grid_constant__ Absorb p,
           const __grid_constant__ LatentRow row) {
    if constexpr (!Same<B, void>::yes)
        if (blockIdx.x == gridDim.x - 1) {
            write_latent_row<B, NEOX>(row, 0);
            return;
        }
    absorb_rows<F, NEOX>(weights, p);
}
