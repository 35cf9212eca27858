// What latent attention to one token, or to a few, needs in one launch: the heads' queries
// [W_k^T nope | rope], and the tokens' rows of the cache. Of one token these were four launches:
// rope, products, a copy of the rotated part behind them, the row.
//
// q [n_nope + n_rot, heads, tokens], w [n_nope, n_c, heads], out [n_c + n_rot, tokens, heads]
// grid: blocks of 64 rows of a head's matrix, heads one after another, and a block for each row of
// the cache. A warp takes 8 rows for all tokens; it has all of their weights, decoded, before it
// waits. The last warps of a head's first block rotate, a token each and a lane each pair, while the
// first ones make the column fixed point, a token each. Reads w: 0.6 MB in V2-Lite; all else is a few
// KB.
// @kernel absorb<{BLOCKS}, {true|false}, Plain<__half>, 1, 1>
// @kernel hot 90a absorb<{q4_0|q4_K|q6_K|q8_0|iq4_nl}, {true|false}, Plain<__half>, 1, 1>
// @kernel absorb<{q8_0|iq4_nl}, {true|false}, {Plain<__nv_bfloat16>|file::q8_0|void}, 1, 1>
// @kernel absorb<{SOME}, false, Plain<__half>, {8, 1|1, 2|8, 2}>
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

// TOKENS: 1, or as many as there are warps. ROUNDS of 4 groups are a row of w.
template <class F, bool NEOX, int TOKENS, int ROUNDS>
__device__ __forceinline__ void absorb_rows(const Weights<F>& weights, const Absorb& p) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int head = blockIdx.x / p.parts, part = blockIdx.x % p.parts;
    const int tile = part * 8 + warp, groups = groups_of(weights.w[0]);
    const int own = WARPS - 1 - warp;  // the token that this warp rotates
    const bool turns = part == 0 && own < p.tokens && lane < p.n_rot / 2;
    const double frequency = turns ? frequency_of(lane, p.rope) : 0;  // calls: not with loads behind
    const Table<F> table(0);
    const Row<F> row(weights.w[0], head, min(tile, (p.n_c - 1) / 8), lane % 8);
    RawGroup<F> raw[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) raw[r] = load_group(row, min(lane / 8 + 4 * r, groups - 1));
    table.ready();
    Codes<F, false> codes[ROUNDS];  // decoded before the wait
    Scale scales[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        codes[r] = Codes<F, false>(table, raw[r]);
        scales[r] = F::scale(raw[r].scale.own, raw[r].scale.shared);
    }
    const auto q_of = [&](int token) {
        return (const float*)((const char*)p.q + head * p.q_step + token * p.q_next);
    };
    const auto out_of = [&](int token) {
        return (float*)(p.out + head * p.out_step + token * p.out_next);
    };
    extern __shared__ uint4 groups_of_q[];
    constexpr int WORDS = group_bytes<2> / 16;
    begin();
    if (warp < p.tokens)
#pragma unroll
        for (int r = 0; r < ROUNDS; ++r) {  // a token each
            const int i = lane + 32 * r;
            const bool real = i < 8 * groups;
            Pack<float, 4> four = {};
            if (real) four = four_at(q_of(warp) + 4 * i);
            put_fixed<2, true>(four.v, (unsigned char*)(groups_of_q + (warp * groups + i / 8) * WORDS),
                               real);
        }
    if (part == 0 && own < p.tokens) {
        const int half = p.rope.n_dims / 2, first = NEOX ? lane : 2 * lane;
        const float* q = q_of(own) + p.rope.offset + first;
        float* out = out_of(own) + p.n_c - p.n_nope + p.rope.offset + first;
        const int step = NEOX ? half : 1;
        const int position = turns ? p.pos[own] : 0;
        const float x = turns ? q[0] : 0, z = turns ? q[step] : 0;
        float s, c;
        sincospif(angle_of(lane, frequency, position, Tensor{}), &s, &c);
        s *= p.rope.magnitude, c *= p.rope.magnitude;
        if (turns) out[0] = x * c - z * s, out[step] = x * s + z * c;
    }
    __syncthreads();
#pragma unroll
    for (int token = 0; token < TOKENS; ++token) {
        if (token >= p.tokens) break;
        float sum = 0;
#pragma unroll
        for (int r = 0; r < ROUNDS; ++r) {
            const int i = min(lane / 8 + 4 * r, groups - 1);
            const uint4* from = groups_of_q + (token * groups + i) * WORDS;
            const Fixed<2> column([&](int j) { return from[j]; });
            const float y = dot_group(codes[r], scales[r], column);
            if (lane / 8 + 4 * r < groups) sum += y;
        }
        sum += __shfl_xor_sync(~0u, sum, 8);
        sum += __shfl_xor_sync(~0u, sum, 16);
        if (lane < 8 && tile * 8 + lane < p.n_c) out_of(token)[tile * 8 + lane] = sum;
    }
}

constexpr int MOST_C = 1024;  // elements of a row of c

// Writes a token's row of the cache, as `write_latent_row` does, but to have one row soon, not many.
// The 256 threads ask at once for all that they read. Every warp rotates the first 32 pairs while it
// waits for sums, so that no branch puts the one before the other; one warp stores them. For q8_0 the
// row is put together in shared memory, n_c + n_k floats.
template <class B, bool NEOX>
__device__ __forceinline__ void absorb_row(const LatentRow& p, int token) {
    constexpr int HELD = MOST_C / 256;
    constexpr bool BLOCKS = Same<B, file::q8_0>::yes;
    extern __shared__ float row[];
    __shared__ float parts[8];
    const int n_c = p.c.ne[0], n_k = p.k.ne[0], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int half = p.rope.n_dims / 2, pairs = min(half, 32);
    const int first = p.rope.offset + (NEOX ? lane : 2 * lane), second = first + (NEOX ? half : 1);
    const double frequency = frequency_of(lane, p.rope);
    begin();
    const int position = *p.pos.at<int>(token, 0, 0, 0), id = *p.ids.at<int>(token, 0, 0, 0);
    float x[HELD], w[HELD], squares = 0;
#pragma unroll
    for (int n = 0; n < HELD; ++n) {
        const int i = threadIdx.x + 256 * n;
        x[n] = i < n_c ? *p.c.at<float>(i, token, 0, 0) : 0;
        w[n] = i < n_c ? *p.w.at<float>(i, 0, 0, 0) : 0;
    }
    const float a = lane < pairs ? *p.k.at<float>(first, 0, token, 0) : 0;
    const float b = lane < pairs ? *p.k.at<float>(second, 0, token, 0) : 0;
#pragma unroll
    for (int n = 0; n < HELD; ++n) squares += x[n] * x[n];
    squares = warp_reduce<Sum>(squares);
    if (lane == 0) parts[warp] = squares;
    float s, c;
    sincospif(angle_of(lane, frequency, position, Tensor{}), &s, &c);
    s *= p.rope.magnitude, c *= p.rope.magnitude;
    __syncthreads();
    squares = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) squares += parts[i];
    const float inverse = rsqrtf(__fdividef(squares, n_c) + p.eps);
    const bool real = id >= 0 && id < p.cache.ne[1];
    unsigned char* const to = p.cache.at<unsigned char>(0, real ? id : 0, 0, 0);
    const auto put = [&](int i, float value) {
        if constexpr (BLOCKS) row[i] = value;
        else if (real) *(typename B::Type*)(to + i * p.cache.nb[0]) = from_f32<typename B::Type>(value);
    };
#pragma unroll
    for (int n = 0; n < HELD; ++n) {
        const int i = threadIdx.x + 256 * n;
        if (i < n_c) put(i, x[n] * inverse * w[n]);
    }
    if (warp == 0 && lane < pairs)
        put(n_c + first, a * c - b * s), put(n_c + second, a * s + b * c);
    for (int unit = pairs + threadIdx.x; unit < (n_k + 1) / 2; unit += 256)
        turn<NEOX>(
            p.rope, unit, frequency_of(unit, p.rope), n_k, position, Tensor{},
            [&](int i) { return *p.k.at<float>(i, 0, token, 0); },
            [&](int i, float value) { put(n_c + i, value); });
    if constexpr (BLOCKS) {
        __syncthreads();
        if (real) store_row<B>(row, n_c + n_k, to, p.cache.nb[0]);
    }
}

// B: of the cache, void if another launch writes the rows.
template <class F, bool NEOX, class B, int TOKENS, int ROUNDS>
__global__ void __launch_bounds__(32 * WARPS)
    absorb(const __grid_constant__ Weights<F> weights, const __grid_constant__ Absorb p,
           const __grid_constant__ LatentRow row) {
    if constexpr (!Same<B, void>::yes) {
        const int token = (int)blockIdx.x - (int)gridDim.x + p.tokens;
        if (token >= 0) {
            absorb_row<B, NEOX>(row, token);
            return;
        }
    }
    absorb_rows<F, NEOX, TOKENS, ROUNDS>(weights, p);
}
