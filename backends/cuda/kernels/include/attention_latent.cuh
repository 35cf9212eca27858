// A block of attention to the latent cache; attention_latent.cu says how it works.
#pragma once
#include "attention.cuh"
#include "attention_q8_0.cuh"

constexpr int DV = 512;

// Shared memory: queries, tiles, weights. With q8_0 there are two raw tiles and one decoded tile.
template <int DK, int M, int BN, bool Q8>
struct LatentShape {
    static constexpr int PITCH = DK * 2, RAW = DK / 32 * 34;
    static constexpr int Q = M * PITCH, TILE = BN * PITCH, P = M * BN * 2,
                         STAGE = Q8 ? BN * RAW : TILE;
    static constexpr int TILES = Q8 ? TILE + 2 * STAGE : 2 * STAGE, BYTES = Q + TILES + P;
};

// Walks the share `part` of a's keys, for the rows of blockIdx.y and .z. All threads of a block call
// it. It waits for the predecessor, as late as it may, and releases the successor.
template <class T, int DK, int MI, int WM, int WN, int BN, bool Q8, bool LIST>
__device__ __forceinline__ void latent_block(const Attention &a, int part) {
    constexpr int WARPS = WM * WN, THREADS = 32 * WARPS;
    constexpr int M = 16 * MI * WM, NT = BN / 8 / WN, NV = DV / 8 / WN;
    constexpr int PITCH_P = BN * 2;
    using Shape = LatentShape<DK, M, BN, Q8>;
    constexpr int PITCH = Shape::PITCH, RAW = Shape::RAW;
    extern __shared__ __align__(128) char memory[];
    __shared__ float factors[M], tops[WN][M], totals[WN][M];
    __shared__ __align__(8) float biases[2][LIST ? BN : 1];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wm = warp / WN, wn = warp % WN;
    const int r0 = blockIdx.y * M;
    const int head_kv = blockIdx.z % a.heads_kv, i3 = blockIdx.z / a.heads_kv;
    const int pitch = a.pitch_of<LIST>(), q0 = r0 / pitch, q1 = (r0 + M - 1) / pitch;
    char *queries = memory, *ring = memory + Shape::Q, *weights = ring + Shape::TILES;
    const auto swizzled = [](int row, int chunk) {
        return row * PITCH + (chunk ^ (row & 7)) * 16;
    };

    if (a.early == NOTHING) wait_for_predecessor();
    const Queries<T, DK, M, WARPS> loaded(a, i3, head_kv, r0, warp, pitch);
    if (a.early == QUERIES) wait_for_predecessor();
    const int live = a.live();
    auto list = list_of<LIST, BN, THREADS>(a, i3, head_kv, r0, live, part);
    const Walk<BN> walk = walk_of<LIST, BN>(a, i3, q0, q1, live, part);
    list.turn(walk.first);
    const char *k = a.k + head_kv * a.nb_k[1] + i3 * a.nb_k[2];
    const auto fetch = [&](int t, int stage) {
        const int j0 = t * BN;
        char *to = ring + (Q8 ? Shape::TILE : 0) + stage * Shape::STAGE;
        if constexpr (LIST) {
            constexpr int PIECE = Q8 ? 4 : 16, COUNT = (Q8 ? RAW : PITCH) / PIECE;
            list.fetch(t, biases[stage], [&](int i, int id) {
                const int j = list.place(i);
                const char *from = k + (id < 0 ? 0 : id * a.nb_k[0]);
#pragma unroll 3
                for (int c = threadIdx.x % 8; c < COUNT; c += 8)
                    if constexpr (Q8)
                        copy4(shared_address(to) + j * RAW + c * 4, from + c * 4, id >= 0);
                    else
                        copy16(shared_address(to) + swizzled(j, c), from + c * 16, id >= 0);
            });
        } else if constexpr (Q8) {
            fetch_raw<BN, RAW>(shared_address(to), k + j0 * a.nb_k[0], a.nb_k[0], live - j0,
                               threadIdx.x, THREADS);
        } else {
            for (int i = threadIdx.x; i < BN * (DK / 8); i += THREADS) {
                const int j = i / (DK / 8), c = i % (DK / 8);
                const bool real = j0 + j < live;
                copy16(shared_address(to) + swizzled(j, c),
                       k + (real ? (j0 + j) * a.nb_k[0] + c * 16 : 0), real);
            }
        }
    };
    int now = walk.alive(walk.first), next = now;
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        if (next < walk.end) fetch(next, s), next = walk.alive(next + 1);
        copies_commit();
    }
    if (a.early == ALL) wait_for_predecessor();
    release_successor();
    loaded.store(a, factors, warp,
                 [&](int r, int i) { return (u32 *)(queries + swizzled(r, i / 8) + i % 8 * 2); });
    __syncthreads();

    const int row0 = wm * MI * 16 + lane / 4;  // this thread's first row in the block
    float sums[MI][NV][4] = {}, m[MI][2], l[MI][2], factor[MI][2], slope[MI][2];
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            m[i][r] = -INF, l[i][r] = 0;
            factor[i][r] = factors[row0 + 16 * i + 8 * r];
            const int row = r0 + row0 + 16 * i + 8 * r;
            if (LIST) slope[i][r] = Row(a, i3, head_kv, row, live, pitch).slope;
        }

    for (int stage = 0; now < walk.end; stage ^= 1) {
        copies_wait<1>();
        __syncthreads();
        const char *tile = ring + (Q8 ? 0 : stage * Shape::STAGE);
        if constexpr (Q8) {
            decode_raw_to<BN, DK>(ring + Shape::TILE + stage * Shape::STAGE, threadIdx.x, THREADS,
                                  [&](int r, int c) { return ring + swizzled(r, c); });
            __syncthreads();
        }
        // Scores of this warp's rows and its NT x 8 keys. Even and odd steps have separate sums.
        float s[MI][NT][4] = {}, odd[MI][NT][4] = {};
        const u32 at_q = shared_address(queries), at_k = shared_address(tile);
#pragma unroll 2
        for (int n = 0; n < DK / 32; ++n) {
            u32 b[NT][4];
#pragma unroll
            for (int i = 0; i < NT; ++i)
                ldmatrix(b[i],
                         at_k + swizzled((wn * NT + i) * 8 + (lane & 7), n * 4 + (lane >> 3)));
#pragma unroll
            for (int i = 0; i < MI; ++i) {
                const int r = (wm * MI + i) * 16 + (lane & 15);
                u32 x[4], y[4];
                ldmatrix(x, at_q + swizzled(r, n * 4 + (lane >> 4)));
                ldmatrix(y, at_q + swizzled(r, n * 4 + 2 + (lane >> 4)));
#pragma unroll
                for (int c = 0; c < NT; ++c) {
                    mma<T>(s[i][c], x, b[c][0], b[c][1]);
                    mma<T>(odd[i][c], y, b[c][2], b[c][3]);
                }
            }
        }
        const int place = wn * NT * 8 + 2 * (lane & 3), key = now * BN + place;
        const bool bias = walk.biased(now), special = bias || a.softcap > 0 || walk.edge(now);
        float left[MI][2];
#pragma unroll
        for (int i = 0; i < MI; ++i) {
#pragma unroll
            for (int c = 0; c < NT; ++c)
#pragma unroll
                for (int e = 0; e < 4; ++e) s[i][c][e] += odd[i][c][e];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                left[i][r] = LIST ? 1 : factor[i][r];
                if constexpr (LIST)
                    listed(a, s[i], 2 * r, factor[i][r], slope[i][r], biases[stage] + place);
                else if (special)
                    left[i][r] =
                        masked(a, Row(a, i3, head_kv, r0 + row0 + 16 * i + 8 * r, live, pitch),
                               s[i], 2 * r, factor[i][r], key, bias);
                float top = -INF;
#pragma unroll
                for (int c = 0; c < NT; ++c)
                    top = fmaxf(top, fmaxf(s[i][c][2 * r], s[i][c][2 * r + 1]));
                top = quad_max(top) * left[i][r];
                if (lane % 4 == 0) tops[wn][row0 + 16 * i + 8 * r] = top;
            }
        }
        __syncthreads();
        // The maximum of each row over all warps; the weights go to shared memory.
        float lost[MI][2];
#pragma unroll
        for (int i = 0; i < MI; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int row = row0 + 16 * i + 8 * r;
                float top = m[i][r];
#pragma unroll
                for (int w = 0; w < WN; ++w) top = fmaxf(top, tops[w][row]);
                const float base = finite(top);
                lost[i][r] = exp2_fast(m[i][r] - base);
                m[i][r] = top;
                l[i][r] *= lost[i][r];
#pragma unroll
                for (int c = 0; c < NT; ++c) {
                    const float x = exp2_fast(fmaf(s[i][c][2 * r], left[i][r], -base));
                    const float y = exp2_fast(fmaf(s[i][c][2 * r + 1], left[i][r], -base));
                    l[i][r] += x + y;
                    const int chunk = wn * NT + c;
                    *(u32 *)(weights + row * PITCH_P + (chunk ^ (row & (BN / 8 - 1))) * 16 +
                             (lane & 3) * 4) = pack2<T>(x, y);
                }
            }
        __syncthreads();
        // Sums of this warp's rows and its NV x 8 columns.
#pragma unroll
        for (int i = 0; i < MI; ++i)
#pragma unroll
            for (int c = 0; c < NV; ++c) {
                sums[i][c][0] *= lost[i][0], sums[i][c][1] *= lost[i][0];
                sums[i][c][2] *= lost[i][1], sums[i][c][3] *= lost[i][1];
            }
        const u32 at_p = shared_address(weights);
        const int v_chunk = a.v_start / 8 + wn * NV + (lane >> 4);
#pragma unroll
        for (int n = 0; n < BN / 16; ++n) {
            u32 x[MI][4];
#pragma unroll
            for (int i = 0; i < MI; ++i) {
                const int r = (wm * MI + i) * 16 + (lane & 15);
                ldmatrix(x[i],
                         at_p + r * PITCH_P + ((2 * n + (lane >> 4)) ^ (r & (BN / 8 - 1))) * 16);
            }
#pragma unroll
            for (int c = 0; c < NV; c += 2) {
                u32 b[4];
                ldmatrix_trans(b, at_k + swizzled(n * 16 + (lane & 15), v_chunk + c));
#pragma unroll
                for (int i = 0; i < MI; ++i) {
                    mma<T>(sums[i][c], x[i], b[0], b[1]);
                    mma<T>(sums[i][c + 1], x[i], b[2], b[3]);
                }
            }
        }
        __syncthreads();
        now = walk.alive(now + 1);
        if (next < walk.end) fetch(next, stage), next = walk.alive(next + 1);
        copies_commit();
    }

#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float sum = quad_sum(l[i][r]);
            if (lane % 4 == 0) totals[wn][row0 + 16 * i + 8 * r] = sum;
        }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < MI; ++i) {
        bool odd[2] = {};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int index = row0 + 16 * i + 8 * r;
            const Row row(a, i3, head_kv, r0 + index, live, pitch);
            float total = 0;
#pragma unroll
            for (int w = 0; w < WN; ++w) total += totals[w][index];
            l[i][r] = total;
            if (row.query < 0) continue;
            const End to(a, i3, row, part, m[i][r], total, wn == 0 && lane % 4 == 0);
#pragma unroll
            for (int c = 0; c < NV; ++c)
                odd[r] |= to.put((wn * NV + c) * 8 + (lane & 3) * 2, sums[i][c][2 * r],
                                 sums[i][c][2 * r + 1]);
        }
        if constexpr (!LIST)
            repair_rows<NV * 8>(a, i3, head_kv, r0 + (wm * MI + i) * 16, walk.first * BN,
                                walk.end * BN, part, wn * NV * 8, odd, m[i], l[i],
                                latent_source_of<Stored<T, Q8>>(a, i3, head_kv));
    }
}
