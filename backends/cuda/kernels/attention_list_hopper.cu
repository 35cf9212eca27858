// flash_attn_ext over lists of keys on 9.0: prompts of latent attention with many heads (576/512 or
// 512/512, V is a view of K).
//
// A block takes 64 heads of one query and one split of its list, in pairs of tiles of 64 keys
// (attention_pairs.cuh). A producer warpgroup gathers the rows, 16 bytes a copy.
//
// Two designs lost. All threads gather between products, with two tiles of 64 keys in turn, as in
// attention_latent_hopper.cu: 341 TFLOP/s (2048 queries, 128 heads, 2048 of 32768 rows, H100). This
// kernel, but warpgroup 1 adds tile 0 after its own, so both tiles were free for the producer only
// at the end of a pair: 390. For one token, attention_latent.cu is faster.
// @kernel 90a hot list_hopper<{__half|__nv_bfloat16}, {576|512}>
#include "attention_pairs.cuh"

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
    threads_sync(WORKERS, 256);

    const int row0 = warp % 4 * 16 + lane / 4;
    const Row rows[2] = {Row(a, i3, head_kv, r0 + row0, live, a.pitch),
                         Row(a, i3, head_kv, r0 + row0 + 8, live, a.pitch)};
    const float factor[2] = {factors[row0], factors[row0 + 8]};
    PairSums all;
    for (int i = 0; i < pairs; ++i)
        add_pair<T, DK>(
            a, all, queries, maxima, group, true,
            [&](int g, int p) {
                barrier_wait(full[g] + p, i & 1);
                fence_engines();
            },
            [&](int g, float (&s)[8][4], float (&left)[2]) {
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    listed(a, s, 2 * r, factor[r], rows[r].slope, biases[g] + 2 * (lane & 3));
                    left[r] = 1;
                }
            },
            [&](int g) {
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + g);
            });

#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float sum = quad_sum(all.l[r]);
        if (lane % 4 == 0) totals[group][row0 + 8 * r] = sum;
    }
    threads_sync(WORKERS, 256);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        if (rows[r].query < 0) continue;
        const float total = totals[0][row0 + 8 * r] + totals[1][row0 + 8 * r];
        const End to(a, i3, rows[r], part, all.m[r], total, group == 0 && lane % 4 == 0);
#pragma unroll
        for (int x = 0; x < 2; ++x)
#pragma unroll
            for (int n = 0; n < 16; ++n)
                to.put(group * 256 + x * 128 + n * 8 + (lane & 3) * 2, all.sums[x][4 * n + 2 * r],
                       all.sums[x][4 * n + 2 * r + 1]);
    }
#endif
}
