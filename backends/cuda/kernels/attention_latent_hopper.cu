// flash_attn_ext of the latent cache on 9.0: design (a) of attention_latent.cu.
//
// A block takes 64 rows and one split of the keys, in tiles of 64; two tiles are in flight or in
// use. Each tile arrives as 9 or 8 boxes of 64 columns: all are keys, 8 of them also values.
// For the scores, each of the two warpgroups takes half of a tile's keys. They exchange maxima and
// weights through shared memory, and each then sums half of the 512 columns. The products of a tile
// start as soon as its first box arrives.
// @kernel 90a hot latent_hopper<{__half|__nv_bfloat16}, {576|512}>
#include "attention.cuh"

constexpr int M = 64, BN = 64, BOX = BN * 128;

// As in attention_hopper.cu: parameters start at 0x210, maps must be 64-byte aligned.
struct LatentArgument {
    u64 pad[6];
    TensorMap map;
    Attention a;
};

template <class T, int DK>
__global__ void __launch_bounds__(256, 1)
    latent_hopper(const __grid_constant__ LatentArgument argument) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    wait_for_predecessor();
    constexpr int TILE = DK / 64 * BOX;
    constexpr int PART = DK == 576 ? 3 : 2, PARTS = DK / 64 / PART;  // boxes, barriers of a tile
    const Attention &a = argument.a;
    extern __shared__ char unaligned[];
    char *queries = unaligned + (-shared_address(unaligned) & 1023);
    char *ring = queries + TILE, *weights = ring + 2 * TILE;
    __shared__ float factors[M], tops[2][M], totals[2][M];
    __shared__ u64 full[2][PARTS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = warp / 4;
    const int part = blockIdx.x, r0 = blockIdx.y * M;
    const int head_kv = blockIdx.z % a.heads_kv, i3 = blockIdx.z / a.heads_kv;
    const int ratio = a.ratio(), live = a.live(), q0 = r0 / ratio, q1 = (r0 + M - 1) / ratio;
    if (threadIdx.x == 0) {
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
    release_successor();
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
    }

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(l[r]);
        if (lane % 4 == 0) totals[group][row0 + 8 * r] = sum;
    }
    __syncthreads();
    bool odd[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        l[r] = totals[0][row0 + 8 * r] + totals[1][row0 + 8 * r];
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
#endif
}
