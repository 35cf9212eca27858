// flash_attn_ext of the latent cache on 9.0: design (a) of attention_latent.cu.
//
// A block takes 64 rows and one split of the keys, in tiles of 64; two tiles are in flight or in
// use. Each tile arrives as 9 or 8 boxes of 64 columns: all are keys, 8 of them also values. The
// products of a tile start as soon as its first boxes arrive. Each of two warpgroups sums half of
// the 512 columns.
//
// `latent_hopper` is for few tiles a block. For the scores, each warpgroup takes half of a tile's
// keys. They exchange maxima and weights through shared memory.
//
// `latent_pairs` is for many (attention_pairs.cuh); a thread of its own fetches tiles. 512 queries of 16
// heads, 4,096 keys, H100: 254 TFLOP/s, where the other has 204. But it starts when two tiles are
// there, and until then L2 has to deliver 295 KB to every block: one query of 128 heads takes 21.3 us
// of 4,096 keys in place of 19.9, 31.2 of 16,384 in place of 27.7, 60.5 of 65,536 in place of 62.1.
// Lost: blocks of one query of 128 heads as a cluster, where the copy engine writes each tile to both, so
// that L2 delivers a third less: 29.5 us of 16,384 keys, where the others take 26.8 and 28.1.
// @kernel 90a hot latent_hopper<{__half|__nv_bfloat16}, {576|512}>
// @kernel 90a hot latent_pairs<{__half|__nv_bfloat16}, {576|512}>
#include "attention_pairs.cuh"
#include "staged.cuh"

// As in attention_hopper.cu: parameters start at 0x210, maps must be 64-byte aligned.
struct LatentArgument {
    u64 pad[6];
    TensorMap map;
    Attention a;
};

// The end of both kernels: the warpgroups add up their weights and write the parts, or the result.
// meet()  waits until all threads that compute are here
template <class T, class Meet>
__device__ __forceinline__ void leave_rows(const Attention &a, int i3, int head_kv, int r0, int part,
                                           int live, const Walk<BN> &walk, const Row (&rows)[2],
                                           const float (&sums)[2][64], const float (&m)[2],
                                           float (&l)[2], float (&totals)[2][M], char *ring,
                                           bool &damaged, Meet meet) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    const int row0 = warp % 4 * 16 + lane / 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(l[r]);
        if (lane % 4 == 0) totals[group][row0 + 8 * r] = sum;
    }
    const Staged<DV> staged{ring};
    float spoilt = 0;
    meet();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        l[r] = totals[0][row0 + 8 * r] + totals[1][row0 + 8 * r];
#pragma unroll
        for (int x = 0; x < 2; ++x)
#pragma unroll
            for (int n = 0; n < 16; ++n) {
                const float one = sums[x][4 * n + 2 * r], two = sums[x][4 * n + 2 * r + 1];
                spoilt = spoilt_by(spoilt_by(spoilt, one), two);
                staged.put(row0 + 8 * r, group * 256 + x * 128 + n * 8 + (lane & 3) * 2, one, two);
            }
    }
    if (spoilt != 0) damaged = true;
    fence_engines();
    meet();
    if (!damaged && (a.splits > 1 || !a.out)) {
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (group == 0 && lane % 4 == 0 && rows[r].query >= 0)
                *part_stats(a, part_index(a, i3, rows[r].query, rows[r].head, part)) =
                    make_float2(m[r], l[r]);
        if (threadIdx.x < M)
            staged.send(a, i3, Row(a, i3, head_kv, r0 + threadIdx.x, live), threadIdx.x, part);
        return;
    }
    bool odd[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (rows[r].query < 0) continue;
        const End to(a, i3, rows[r], part, m[r], l[r], group == 0 && lane % 4 == 0);
#pragma unroll
        for (int x = 0; x < 2; ++x)
#pragma unroll
            for (int n = 0; n < 16; ++n) {
                const int column = group * 256 + x * 128 + n * 8 + (lane & 3) * 2;
                odd[r] |= to.put(column, sums[x][4 * n + 2 * r], sums[x][4 * n + 2 * r + 1]);
            }
    }
    repair_rows<256>(a, i3, head_kv, r0 + row0 - lane / 4, walk.first * BN, walk.end * BN, part, group * 256,
                     odd, m, l, latent_source_of<T>(a, i3, head_kv));
}

template <class T, int DK>
__global__ void __launch_bounds__(256, 1)
    latent_hopper(const __grid_constant__ LatentArgument argument) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    bool waits = argument.a.early == ALL;  // later on
    if (!waits) wait_for_predecessor();
    constexpr int TILE = DK / 64 * BOX;
    constexpr int PART = DK == 576 ? 3 : 2, PARTS = DK / 64 / PART;  // boxes, barriers of a tile
    const Attention &a = argument.a;
    extern __shared__ char unaligned[];
    char *queries = unaligned + (-shared_address(unaligned) & 1023);
    char *ring = queries + TILE, *weights = ring + 2 * TILE;
    __shared__ float factors[M], tops[2][M], totals[2][M];
    __shared__ u64 full[2][PARTS];
    __shared__ bool damaged;  // a sum is not finite
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    const int part = blockIdx.x, r0 = blockIdx.y * M;
    const int head_kv = blockIdx.z % a.heads_kv, i3 = blockIdx.z / a.heads_kv;
    const int ratio = a.ratio(), live = a.live(), q0 = r0 / ratio, q1 = (r0 + M - 1) / ratio;
    if (threadIdx.x == 0) {
        damaged = false;
        for (int s = 0; s < 2 * PARTS; ++s) barrier_init(&full[0][0] + s, 1);
        fence_barriers();
    }
    const Queries<T, DK, M, 8> loaded(a, i3, head_kv, r0, warp);
    const Walk<BN> walk(a, i3, q0, q1, live, part);
    const auto fetch = [&](int t, int stage) {
        if (threadIdx.x) return;
        for (int c = 0; c < DK / 64; ++c) {
            u64 *b = full[stage] + c / PART;
            if (c % PART == 0) barrier_expect(b, PART * BOX);
            tensor_copy(ring + stage * TILE + c * BOX, &argument.map, b, c * 64, t * BN, head_kv,
                        i3);
        }
    };
    int now = walk.alive(walk.first), next = now;
    for (int s = 0; s < 2; ++s)
        if (next < walk.end) fetch(next, s), next = walk.alive(next + 1);
    if (!waits) release_successor();
    loaded.store(a, factors, warp, [&](int r, int i) {
        return (u32 *)(queries + i / 64 * BOX + r * 128 + (i % 64 / 8 ^ (r & 7)) * 16 + i % 8 * 2);
    });
    fence_engines();
    __syncthreads();

    const int row0 = warp % 4 * 16 + lane / 4;
    const float factor[2] = {factors[row0], factors[row0 + 8]};
    const Row rows[2] = {Row(a, i3, head_kv, r0 + row0, live),
                         Row(a, i3, head_kv, r0 + row0 + 8, live)};
    const u32 at_q = shared_address(queries), at_p = shared_address(weights);
    float sums[2][64], m[2] = {-INF, -INF}, l[2] = {};
#pragma unroll
    for (int i = 0; i < 64; ++i) sums[0][i] = sums[1][i] = 0;

    for (int i = 0; now < walk.end; ++i) {
        const int stage = i & 1, parity = i >> 1 & 1;
        const u32 tile = shared_address(ring) + stage * TILE;
        float flat[16];
        float (&s)[4][4] = reinterpret_cast<float (&)[4][4]>(flat);
        wgmma_hold(flat);
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            barrier_wait(full[stage] + p, parity);
            wgmma_fence();
#pragma unroll
            for (int n = p * PART * 4; n < (p + 1) * PART * 4; ++n)
                wgmma_ss<T, 32>(
                    flat, tile_descriptor(at_q + n / 4 * BOX + n % 4 * 32, 16),
                    tile_descriptor(tile + n / 4 * BOX + group * 32 * 128 + n % 4 * 32, 16), n > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(flat);

        const int key = now * BN + group * 32 + 2 * (lane & 3);
        const bool bias = walk.biased(now);
        float left[2] = {factor[0], factor[1]}, lost[2];
        if (bias || a.softcap > 0 || walk.edge(now)) {
            left[0] = masked(a, rows[0], s, 0, factor[0], key, bias);
            left[1] = masked(a, rows[1], s, 2, factor[1], key, bias);
        }
        float top[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            top[r] = -INF;
#pragma unroll
            for (int c = 0; c < 4; ++c) top[r] = fmaxf(top[r], fmaxf(s[c][2 * r], s[c][2 * r + 1]));
            top[r] = quad_max(top[r]) * left[r];
            if (lane % 4 == 0) tops[group][row0 + 8 * r] = top[r];
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = row0 + 8 * r;
            top[r] = fmaxf(m[r], fmaxf(top[r], tops[group ^ 1][row]));
            const float base = finite(top[r]);
            lost[r] = exp2_fast(m[r] - base);
            m[r] = top[r];
            l[r] *= lost[r];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const float x = exp2_fast(fmaf(s[c][2 * r], left[r], -base));
                const float y = exp2_fast(fmaf(s[c][2 * r + 1], left[r], -base));
                l[r] += x + y;
                *(u32 *)(weights + row * 128 + ((group * 4 + c) ^ (row & 7)) * 16 +
                         (lane & 3) * 4) = pack2<T>(x, y);
            }
        }
#pragma unroll
        for (int x = 0; x < 2; ++x)
#pragma unroll
            for (int n = 0; n < 64; n += 4) {
                sums[x][n] *= lost[0], sums[x][n + 1] *= lost[0];
                sums[x][n + 2] *= lost[1], sums[x][n + 3] *= lost[1];
            }
        __syncthreads();
        u32 p[BN / 16][4];
        const int r = warp % 4 * 16 + (lane & 15);
#pragma unroll
        for (int n = 0; n < BN / 16; ++n)
            ldmatrix(p[n], at_p + r * 128 + ((2 * n + (lane >> 4)) ^ (r & 7)) * 16);
        wgmma_hold(sums[0]);
        wgmma_hold(sums[1]);
        wgmma_fence();
        const u32 from = tile + (a.v_start / 64 + group * 4) * BOX;
#pragma unroll
        for (int n = 0; n < BN / 16; ++n)
#pragma unroll
            for (int x = 0; x < 2; ++x)
                wgmma_rs<T, 128>(sums[x], p[n],
                                 tile_descriptor(from + x * 2 * BOX + n * 16 * 128, BOX), 1);
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(sums[0]);
        wgmma_hold(sums[1]);
        __syncthreads();
        now = walk.alive(now + 1);
        if (next < walk.end) fetch(next, stage), next = walk.alive(next + 1);
        if (waits) begin(), waits = false;
    }
    if (waits) begin();

    leave_rows<T>(a, i3, head_kv, r0, part, live, walk, rows, sums, m, l, totals, ring, damaged,
                  [] { __syncthreads(); });
#endif
}

template <class T, int DK>
__global__ void __launch_bounds__(384, 1)
    latent_pairs(const __grid_constant__ LatentArgument argument) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    bool waits = argument.a.early == ALL;  // later on
    if (!waits) wait_for_predecessor();
    constexpr int TILE = DK / 64 * BOX;
    constexpr int PART = DK == 576 ? 3 : 2, PARTS = DK / 64 / PART;  // boxes, barriers of a tile
    const Attention &a = argument.a;
    extern __shared__ char unaligned[];
    char *queries = unaligned + (-shared_address(unaligned) & 1023);
    char *ring = queries + TILE;
    __shared__ float factors[M], maxima[2][M], totals[2][M];
    __shared__ u64 full[2][PARTS], empty[2];
    __shared__ bool damaged;  // a sum is not finite
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    const int part = blockIdx.x, r0 = blockIdx.y * M;
    const int head_kv = blockIdx.z % a.heads_kv, i3 = blockIdx.z / a.heads_kv;
    const int ratio = a.ratio(), live = a.live(), q0 = r0 / ratio, q1 = (r0 + M - 1) / ratio;
    if (threadIdx.x == 0) {
        damaged = false;
        for (int s = 0; s < 2; ++s) {
            for (int p = 0; p < PARTS; ++p) barrier_init(full[s] + p, 1);
            barrier_init(empty + s, 8);
        }
        fence_barriers();
    }
    const Span all = q0 == q1 ? Span{} : span(a, q0, q1 + 1, live);
    const auto walk_keys = [&] {
        return Walk<BN>(a, i3, q0, q1, part, q0 == q1 ? span(a, q0, live) : all);
    };
    __syncthreads();
    if (!waits) release_successor();
    if (group == 2) {
        registers_give<24>();
        if (threadIdx.x > 256) return;
        const Walk<BN> walk = walk_keys();
        int t = walk.alive(walk.first);
        for (int i = 0; t < walk.end; ++i) {
            const int stage = i & 1;
            if (i > 1) barrier_wait(empty + stage, (i / 2 - 1) & 1);
            for (int c = 0; c < DK / 64; ++c) {
                u64 *b = full[stage] + c / PART;
                if (c % PART == 0) barrier_expect(b, PART * BOX);
                tensor_copy(ring + stage * TILE + c * BOX, &argument.map, b, c * 64, t * BN,
                            head_kv, i3);
            }
            t = walk.alive(t + 1);
        }
        return;
    }
    registers_take<240>();
    const Queries<T, DK, M, 8, true> loaded(a, i3, head_kv, r0, warp);
    const Walk<BN> walk = walk_keys();
    int pair[2] = {walk.alive(walk.first), 0};
    loaded.store(a, factors, warp, [&](int r, int i) {
        return (u32 *)(queries + i / 64 * BOX + r * 128 + (i % 64 / 8 ^ (r & 7)) * 16 + i % 8 * 2);
    });
    fence_engines();
    threads_sync(WORKERS, 256);

    const int row0 = warp % 4 * 16 + lane / 4;
    const float factor[2] = {factors[row0], factors[row0 + 8]};
    const Row rows[2] = {Row(a, i3, head_kv, r0 + row0, live),
                         Row(a, i3, head_kv, r0 + row0 + 8, live)};
    PairSums to;
    for (int i = 0; pair[0] < walk.end; ++i) {
        pair[1] = walk.alive(pair[0] + 1);
        add_pair<T, DK>(
            a, to, queries, maxima, group, pair[1] < walk.end,
            [&](int g, int p) { barrier_wait(full[g] + p, i & 1); },
            [&](int g, float (&s)[8][4], float (&left)[2]) {
                const int t = g ? pair[1] : pair[0], key = t * BN + 2 * (lane & 3);
                const bool bias = walk.biased(t);
                left[0] = factor[0], left[1] = factor[1];
                if (bias || a.softcap > 0 || walk.edge(t)) {
                    left[0] = masked(a, rows[0], s, 0, factor[0], key, bias);
                    left[1] = masked(a, rows[1], s, 2, factor[1], key, bias);
                }
            },
            [&](int g) {
                fence_engines();
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + g);
            });
        pair[0] = walk.alive(pair[1] + 1);
        if (waits) begin(), waits = false;
    }
    if (waits) begin();

    leave_rows<T>(a, i3, head_kv, r0, part, live, walk, rows, to.sums, to.m, to.l, totals, ring,
                  damaged, [] { threads_sync(WORKERS, 256); });
#endif
}
