// flash_attn_ext over lists of keys on 9.0: prompts of latent attention with many heads (576/512 or
// 512/512, V is a view of K).
//
// A block takes 64 heads of one query and one split of its list, in pairs of tiles of 64 keys. A
// producer warpgroup gathers the rows, 16 bytes a copy. Warpgroup g computes the scores and the weights
// of the pair's tile g, so that products have 64 keys: with 32, as in attention_latent_hopper.cu,
// they wait for shared memory to deliver the queries. Then each warpgroup sums its half of the 512
// columns over both tiles. The two are half a step apart: while one computes weights, the other
// uses the tensor cores. Row maxima pass from warpgroup 0 to 1 within a pair, and back to 0 for the
// next, so weights of both have the same base in the end; threads exchange weights as fragments,
// through the columns of a tile that are no values, or (512/512) memory of their own.
//
// Two designs lost. All threads gather between products, with two tiles of 64 keys in turn, as in
// attention_latent_hopper.cu: 341 TFLOP/s (2048 queries, 128 heads, 2048 of 32768 rows, H100). This
// kernel, but warpgroup 1 adds tile 0 after its own, so both tiles were free for the producer only
// at the end of a pair: 390. For one token, attention_latent.cu is faster.
// @kernel 90a hot list_hopper<{__half|__nv_bfloat16}, {576|512}>
#include "attention.cuh"

constexpr int DV = 512, M = 64, BN = 64, BOX = BN * 128;
//: Named barriers: all consumers; weights of tile 0 and 1; each warpgroup (two).
enum { CONSUMERS = 1, WEIGHTS = 2, OWN = 4 };

template <class T, int DK>
__global__ void __launch_bounds__(384, 1) list_hopper(const __grid_constant__ Attention a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    wait_for_predecessor();
    constexpr int TILE = DK / 64 * BOX;
    constexpr int PART = DK == 576 ? 3 : 2, PARTS = DK / 64 / PART;  // boxes, barriers of a tile
    extern __shared__ char unaligned[];
    char *queries = unaligned + (-shared_address(unaligned) & 1023);
    char *ring = queries + TILE;
    __shared__ float factors[M], maxima[2][M], totals[2][M];
    __shared__ __align__(8) float biases[2][BN];
    __shared__ u64 full[2][PARTS], empty[2];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    const int part = blockIdx.x, r0 = blockIdx.y * M;
    const int head_kv = blockIdx.z % a.heads_kv, i3 = blockIdx.z / a.heads_kv, live = a.live();
    if (threadIdx.x == 0) {
        // Arrivals of copies; at a tile's first barrier also those of threads with biases.
        for (int s = 0; s < 2; ++s) {
            for (int p = 0; p < PARTS; ++p) barrier_init(full[s] + p, p ? 128 : 256);
            barrier_init(empty + s, 8);
        }
        fence_barriers();
    }
    const Walk<BN> walk(a, i3, part);
    const int pairs = (walk.end - walk.first + 1) / 2;
    __syncthreads();

    if (group == 2) {
        registers_give<72>();
        const int thread = threadIdx.x - 256, chunk = thread % 8, row = thread / 8;
        Listed<BN, 128> list(a, i3, r0 / a.pitch, walk.first, walk.end, thread);
        list.start([&] { return Row(a, i3, head_kv, r0, live, a.pitch); });
        release_successor();
        const char *k = a.k + head_kv * a.nb_k[1] + i3 * a.nb_k[2] + chunk * 16;
        for (int i = 0; i < 2 * pairs; ++i) {
            const int stage = i & 1;
            if (i > 1) barrier_wait(empty + stage, (i / 2 - 1) & 1);
            const char *from[4];
            bool real[4];
            list.fetch(walk.first + i, biases[stage], [&](int n, int id) {
                real[n] = id >= 0;
                from[n] = k + (id < 0 ? 0 : id * a.nb_k[0]);
            });
            barrier_arrive(full[stage]);
            const u32 to =
                shared_address(ring) + stage * TILE + row * 128 + (chunk ^ (row & 7)) * 16;
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
#pragma unroll
                for (int n = 0; n < 4; ++n)
#pragma unroll
                    for (int c = p * PART; c < p * PART + PART; ++c)
                        copy16(to + c * BOX + n * 16 * 128, from[n] + c * 128, real[n]);
                copies_arrive(full[stage] + p);
            }
        }
        copies_commit();
        copies_wait<0>();
        return;
    }

    registers_take<216>();
    release_successor();
    {
        const Queries<T, DK, M, 8> loaded(a, i3, head_kv, r0, warp, a.pitch);
        loaded.store(a, factors, warp, [&](int r, int i) {
            return (u32 *)(queries + i / 64 * BOX + r * 128 + (i % 64 / 8 ^ (r & 7)) * 16 +
                           i % 8 * 2);
        });
    }
    fence_engines();
    threads_sync(CONSUMERS, 256);

    const int row0 = warp % 4 * 16 + lane / 4;
    const Row rows[2] = {Row(a, i3, head_kv, r0 + row0, live, a.pitch),
                         Row(a, i3, head_kv, r0 + row0 + 8, live, a.pitch)};
    const float factor[2] = {factors[row0], factors[row0 + 8]};
    const u32 at_q = shared_address(queries), at_ring = shared_address(ring);
    // The weights of tile g as fragments, one slot a thread.
    const auto slots = [&](int g) {
        char *at = DK > DV ? ring + g * TILE + (a.v_start ? 0 : DV / 64 * BOX)
                           : ring + 2 * TILE + g * BOX;
        return (uint4 *)at + threadIdx.x % 128;
    };
    float sums[2][64], m[2] = {-INF, -INF}, l[2] = {};
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[0][i] = sums[1][i] = 0;
    const auto scale_sums = [&](const float (&by)[2]) {
        if (!__any_sync(~0u, by[0] != 1 || by[1] != 1)) return;
#pragma unroll
        for (int x = 0; x < 2; ++x)
#pragma unroll
            for (int n = 0; n < 64; n += 4) {
                sums[x][n] *= by[0], sums[x][n + 1] *= by[0];
                sums[x][n + 2] *= by[1], sums[x][n + 3] *= by[1];
            }
    };
    // Starts to add this warpgroup's columns of tile g's values, weighted by p.
    const auto add = [&](const u32 (&p)[4][4], int g) {
        wgmma_hold(sums[0]);
        wgmma_hold(sums[1]);
        const u32 from = at_ring + g * TILE + (a.v_start / 64 + group * 4) * BOX;
        wgmma_fence();
#pragma unroll
        for (int n = 0; n < BN / 16; ++n)
#pragma unroll
            for (int x = 0; x < 2; ++x)
                wgmma_rs<T, 128>(sums[x], p[n],
                                 tile_descriptor(from + x * 2 * BOX + n * 16 * 128, BOX), 1);
        wgmma_commit();
    };
    const auto done = [&] {
        wgmma_wait<0>();
        wgmma_hold(sums[0]);
        wgmma_hold(sums[1]);
    };
    const auto leave = [&](int g) {
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + g);
    };

    for (int i = 0; i < pairs; ++i) {
        const u32 tile = at_ring + group * TILE;
        float flat[32];
        float (&s)[8][4] = reinterpret_cast<float (&)[8][4]>(flat);
        wgmma_hold(flat);
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            barrier_wait(full[group] + p, i & 1);
            fence_engines();
            wgmma_fence();
#pragma unroll
            for (int n = p * PART * 4; n < (p + 1) * PART * 4; ++n)
                wgmma_ss<T, 64>(flat, tile_descriptor(at_q + n / 4 * BOX + n % 4 * 32, 16),
                                tile_descriptor(tile + n / 4 * BOX + n % 4 * 32, 16), n > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(flat);

        float top[2], lost[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            listed(a, s, 2 * r, factor[r], rows[r].slope, biases[group] + 2 * (lane & 3));
            top[r] = -INF;
#pragma unroll
            for (int c = 0; c < 8; ++c) top[r] = fmaxf(top[r], fmaxf(s[c][2 * r], s[c][2 * r + 1]));
            top[r] = quad_max(top[r]);
        }
        u32 weights[4][4], others[4][4];
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
            scale_sums(lost);
        };
        // Turns this group's scores to weights and passes them on; `lost` is for the sums.
        const auto weigh = [&] {
            threads_sync(OWN + group, 128);  // all its warps have used the tile as keys
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                top[r] = fmaxf(top[r], m[r]);
                const float base = finite(top[r]);
                lost[r] = exp2_fast(m[r] - base);
                m[r] = top[r];
                float sum = 0;
#pragma unroll
                for (int c = 0; c < 8; ++c) {
                    const float x = exp2_fast(s[c][2 * r] - base);
                    const float y = exp2_fast(s[c][2 * r + 1] - base);
                    sum += x + y;
                    weights[c / 2][c % 2 * 2 + r] = pack2<T>(x, y);
                }
                l[r] = l[r] * lost[r] + sum;
                if (lane % 4 == 0) maxima[group][row0 + 8 * r] = top[r];
            }
            uint4 *to = slots(group);
#pragma unroll
            for (int n = 0; n < 4; ++n)
                to[n * 128] =
                    make_uint4(weights[n][0], weights[n][1], weights[n][2], weights[n][3]);
            threads_arrive(WEIGHTS + group, 256);
        };
        if (group) {
            take(0);
            add(others, 0);
            weigh();  // while the products run
            done();
            leave(0);
            scale_sums(lost);
            add(weights, 1);
            done();
            leave(1);
        } else {
            weigh();
            scale_sums(lost);
            add(weights, 0);
            done();
            leave(0);
            take(1);
            add(others, 1);
            done();
            leave(1);
        }
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(l[r]);
        if (lane % 4 == 0) totals[group][row0 + 8 * r] = sum;
    }
    threads_sync(CONSUMERS, 256);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (rows[r].query < 0) continue;
        const float total = totals[0][row0 + 8 * r] + totals[1][row0 + 8 * r];
        const End to(a, i3, rows[r], part, m[r], total, group == 0 && lane % 4 == 0);
#pragma unroll
        for (int x = 0; x < 2; ++x)
#pragma unroll
            for (int n = 0; n < 16; ++n)
                to.put(group * 256 + x * 128 + n * 8 + (lane & 3) * 2, sums[x][4 * n + 2 * r],
                       sums[x][4 * n + 2 * r + 1]);
    }
#endif
}
