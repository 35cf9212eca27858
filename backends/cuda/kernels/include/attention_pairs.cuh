// The loop of latent attention by the warpgroups of 9.0, over pairs of tiles of 64 keys: all keys
// (attention_latent_hopper.cu) or those of lists (attention_list_hopper.cu).
//
// A block has 64 rows. Warpgroup g computes the scores and the weights of the pair's tile g, so that
// products have 64 keys: with 32 they wait for shared memory to deliver the queries (3 KB in 16
// clocks). Then each warpgroup sums its half of the 512 columns over both tiles. The two are half a
// step apart: while one computes weights, the other uses the tensor cores. Row maxima pass from
// warpgroup 0 to 1 within a pair, and back to 0 for the next, so weights of both have the same base in
// the end; threads exchange weights as fragments, through the columns of a tile that are no values, or
// (512/512) memory of their own.
#pragma once
#include "attention.cuh"

constexpr int DV = 512, M = 64, BN = 64, BOX = BN * 128;
//: Named barriers: all that compute; weights of tile 0 and 1; each warpgroup (two).
enum { WORKERS = 1, WEIGHTS = 2, OWN = 4 };

// What a warpgroup sums: its half of the columns for two rows a thread, and of these the maximum of
// scores and its share of the weights.
struct PairSums {
    float sums[2][64], m[2] = {-INF, -INF}, l[2] = {};

    __device__ __forceinline__ PairSums() {
#pragma unroll
        for (int i = 0; i < 64; ++i) sums[0][i] = sums[1][i] = 0;
    }
    __device__ __forceinline__ void scale(const float (&by)[2]) {
        if (!__any_sync(~0u, by[0] != 1 || by[1] != 1)) return;
#pragma unroll
        for (int x = 0; x < 2; ++x)
#pragma unroll
            for (int n = 0; n < 64; n += 4) {
                sums[x][n] *= by[0], sums[x][n + 1] *= by[0];
                sums[x][n + 2] *= by[1], sums[x][n + 3] *= by[1];
            }
    }
    __device__ __forceinline__ void hold() {
        wgmma_hold(sums[0]);
        wgmma_hold(sums[1]);
    }
};

// One pair of tiles, the i-th, by a thread of warpgroup `group`. Queries are at `queries`, tiles
// and room for weights behind them; maxima[g] are those of rows up to tile g.
// both            false: there is no tile 1
// ready(g, p)     waits for the p-th of the parts of tile g
// score(g, s, left)  turns products to scores but for factors, left[2] of the thread's rows
// leave(g)        this warp needs tile g no more; it may have read or written weights there
template <class T, int DK, class Ready, class Score, class Leave>
__device__ __forceinline__ void add_pair(const Attention &a, PairSums &to, char *queries,
                                         float (&maxima)[2][M], int group, bool both, Ready ready,
                                         Score score, Leave leave) {
    constexpr int TILE = DK / 64 * BOX;
    constexpr int PART = DK == 576 ? 3 : 2, PARTS = DK / 64 / PART;  // boxes, barriers of a tile
    char *ring = queries + TILE;
    const int lane = threadIdx.x % 32, row0 = threadIdx.x / 32 % 4 * 16 + lane / 4;
    const u32 at_q = shared_address(queries), at_ring = shared_address(ring);
    float (&m)[2] = to.m, (&l)[2] = to.l;
    float flat[32], top[2], left[2], lost[2];
    float (&s)[8][4] = reinterpret_cast<float (&)[8][4]>(flat);
    u32 weights[4][4], others[4][4];
    // The weights of tile g as fragments, one slot a thread.
    const auto slots = [&](int g) {
        char *at = DK > DV ? ring + g * TILE + (a.v_start ? 0 : DV / 64 * BOX)
                           : ring + 2 * TILE + g * BOX;
        return (uint4 *)at + threadIdx.x % 128;
    };
    // Starts to add this warpgroup's columns of tile g's values, weighted by p.
    const auto add = [&](const u32 (&p)[4][4], int g) {
        to.hold();
        const u64 from =
            tile_descriptor(at_ring + g * TILE + (a.v_start / 64 + group * 4) * BOX, BOX);
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < BN / 16; ++n)
#pragma unroll
            for (int x = 0; x < 2; ++x)
                wgmma_rs<T, 128>(to.sums[x], p[n], further(from, x * 2 * BOX + n * 16 * 128), 1);
        wgmma_commit();
    };
    const auto done = [&] {
        wgmma_wait<0>();
        to.hold();
    };
    // The scores of tile g, and the maxima of rows there.
    const auto multiply = [&](int g) {
        const u64 from_q = tile_descriptor(at_q, 16);
        const u64 from = tile_descriptor(at_ring + g * TILE, 16);
        wgmma_hold(flat);
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            ready(g, p);
            wgmma_fence();
#pragma unroll
            for (int n = p * PART * 4; n < (p + 1) * PART * 4; ++n)
                wgmma_ss<T, 64>(flat, further(from_q, n / 4 * BOX + n % 4 * 32),
                                further(from, n / 4 * BOX + n % 4 * 32), n > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(flat);
        score(g, s, left);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            top[r] = -INF;
#pragma unroll
            for (int c = 0; c < 8; ++c)
                top[r] = fmaxf(top[r], fmaxf(s[c][2 * r], s[c][2 * r + 1]));
            top[r] = quad_max(top[r]) * left[r];
        }
    };
    // Turns scores of tile g to weights and passes them on; `lost` is for the sums.
    const auto weigh = [&](int g) {
        threads_sync(OWN + g, 128);  // all its warps have used the tile as keys
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            top[r] = fmaxf(top[r], m[r]);
            const float base = finite(top[r]);
            lost[r] = exp2_fast(m[r] - base);
            m[r] = top[r];
            float sum = 0;
#pragma unroll
            for (int c = 0; c < 8; ++c) {
                const float x = exp2_fast(fmaf(s[c][2 * r], left[r], -base));
                const float y = exp2_fast(fmaf(s[c][2 * r + 1], left[r], -base));
                sum += x + y;
                weights[c / 2][c % 2 * 2 + r] = pack2<T>(x, y);
            }
            l[r] = l[r] * lost[r] + sum;
            if (lane % 4 == 0) maxima[g][row0 + 8 * r] = top[r];
        }
        uint4 *at = slots(g);
#pragma unroll
        for (int n = 0; n < 4; ++n)
            at[n * 128] = make_uint4(weights[n][0], weights[n][1], weights[n][2], weights[n][3]);
        threads_arrive(WEIGHTS + g, 256);
    };
    // Takes the maxima and the weights of tile g and rescales the sums to them.
    const auto take = [&](int g) {
        threads_sync(WEIGHTS + g, 256);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float now = maxima[g][row0 + 8 * r];
            lost[r] = exp2_fast(m[r] - finite(now));
            l[r] *= lost[r];
            m[r] = now;
        }
        const uint4 *from = slots(g);
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            const uint4 x = from[n * 128];
            others[n][0] = x.x, others[n][1] = x.y, others[n][2] = x.z, others[n][3] = x.w;
        }
        to.scale(lost);
    };
    if (group == 0 || both) multiply(group);
    if (group == 0) {
        weigh(0);
        to.scale(lost);
        add(weights, 0);
        done();
        leave(0);
        if (both) {
            take(1);
            add(others, 1);
            done();
            leave(1);
        }
    } else if (both) {
        take(0);
        add(others, 0);
        weigh(1);  // while the products run
        done();
        leave(0);
        to.scale(lost);
        add(weights, 1);
        done();
        leave(1);
    } else {
        take(0);
        add(others, 0);
        done();
    }
}
