// flash_attn_ext for many queries on 8.0 and up (attention_hopper.cu is faster on 9.0).
//
// Each warp owns 16 rows and all keys of a tile, so scores become weights in registers and no
// barrier separates the two products. The next tile's keys and values arrive by cp.async meanwhile.
// Rows are the (query, head) pairs of one key head, so a group of heads shares every tile. The
// other design, 32 rows per warp, halves the shared-memory reads that limit this one to about 0.8
// of the rate of mma.sync, but its sums and scores use up the registers at d_v = 128.
// The keys may be split over blocks (few rows, many keys); `combine` then adds the splits.
// @kernel hot tiles<{__half|__nv_bfloat16}, {64, 64|80, 80|96, 96|128, 128|192, 128}, {4|8}, 64>
// @kernel tiles<{__half|__nv_bfloat16}, 256, 256, {4|8}, 32>
#include "attention.cuh"

template <class T, int DK, int DV, int WARPS, int BN>
__global__ void __launch_bounds__(WARPS * 32, 1) tiles(const __grid_constant__ Attention a) {
    wait_for_predecessor();
    constexpr int M = 16 * WARPS, THREADS = 32 * WARPS;
    constexpr int PITCH_K = DK * 2 + 16, PITCH_V = DV * 2 + 16, STAGE = BN * (PITCH_K + PITCH_V);
    extern __shared__ __align__(128) char memory[];
    __shared__ float factors[M];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    // Under a causal mask the last rows see the most keys, so they start first.
    const int part = blockIdx.z, r0 = (gridDim.y - 1 - blockIdx.y) * M;
    const int head_kv = blockIdx.x % a.heads_kv, i3 = blockIdx.x / a.heads_kv;
    const int ratio = a.ratio(), live = a.live(), q0 = r0 / ratio, q1 = (r0 + M - 1) / ratio;

    release_successor();
    Queries<T, DK, M, WARPS>(a, i3, head_kv, r0, warp).store(a, factors, warp, [&](int r, int i) {
        return (u32 *)(memory + r * PITCH_K + i * 2);
    });
    __syncthreads();
    u32 q[DK / 16][4];
#pragma unroll
    for (int n = 0; n < DK / 16; ++n)
        ldmatrix(q[n], shared_address(memory) + (warp * 16 + (lane & 15)) * PITCH_K +
                           (lane >> 4) * 16 + n * 32);
    const int row0 = warp * 16 + lane / 4;
    const float factor[2] = {factors[row0], factors[row0 + 8]};
    const Walk<BN> walk(a, i3, q0, q1, live, part);
    __syncthreads();

    const char *k = a.k + head_kv * a.nb_k[1] + i3 * a.nb_k[2];
    const char *v = a.v + head_kv * a.nb_v[1] + i3 * a.nb_v[2];
    const auto fetch = [&](int t, int stage) {
        constexpr int CK = DK / 8, CV = DV / 8;
        const int j0 = t * BN;
        const u32 to = shared_address(memory) + stage * STAGE;
        for (int i = threadIdx.x; i < BN * CK; i += THREADS) {
            const int j = i / CK, c = i % CK;
            const bool real = j0 + j < live;
            copy16(to + j * PITCH_K + c * 16, k + (real ? (j0 + j) * a.nb_k[0] + c * 16 : 0), real);
        }
        for (int i = threadIdx.x; i < BN * CV; i += THREADS) {
            const int j = i / CV, c = i % CV;
            const bool real = j0 + j < live;
            copy16(to + BN * PITCH_K + j * PITCH_V + c * 16,
                   v + (real ? (j0 + j) * a.nb_v[0] + c * 16 : 0), real);
        }
    };

    int now = walk.alive(walk.first), next = now;
    if (next < walk.end) fetch(next, 0), next = walk.alive(next + 1);
    copies_commit();
    float sums[DV / 8][4] = {}, m[2] = {-INF, -INF}, l[2] = {};
    for (int stage = 0; now < walk.end; stage ^= 1) {
        copies_wait<0>();
        __syncthreads();
        const int tile = now;
        now = next;
        if (next < walk.end) fetch(next, stage ^ 1), next = walk.alive(next + 1);
        copies_commit();

        const u32 at = shared_address(memory) + stage * STAGE;
        float s[BN / 8][4] = {};
        const u32 at_k = at + ((lane & 7) + (lane >> 4) * 8) * PITCH_K + (lane >> 3 & 1) * 16;
#pragma unroll
        for (int n = 0; n < DK / 16; ++n)
#pragma unroll
            for (int c = 0; c < BN / 16; ++c) {
                u32 b[4];
                ldmatrix(b, at_k + c * 16 * PITCH_K + n * 32);
                mma<T>(s[2 * c], q[n], b[0], b[1]);
                mma<T>(s[2 * c + 1], q[n], b[2], b[3]);
            }
        const bool bias = walk.biased(tile);
        float left[2] = {factor[0], factor[1]};
        if (bias || a.softcap > 0 || walk.edge(tile)) {
#pragma unroll
            for (int r = 0; r < 2; ++r)
                left[r] = masked(a, Row(a, i3, head_kv, r0 + row0 + 8 * r, live), s, 2 * r,
                                 factor[r], tile * BN + 2 * (lane & 3), bias);
        }
        const float2 lost = softmax_step(s, left, m, l);
#pragma unroll
        for (int n = 0; n < DV / 8; ++n) {
            sums[n][0] *= lost.x, sums[n][1] *= lost.x;
            sums[n][2] *= lost.y, sums[n][3] *= lost.y;
        }
        const u32 at_v = at + BN * PITCH_K + (lane & 15) * PITCH_V + (lane >> 4) * 16;
#pragma unroll
        for (int c = 0; c < BN / 16; ++c) {
            const u32 p[4] = {pack2<T>(s[2 * c][0], s[2 * c][1]),
                              pack2<T>(s[2 * c][2], s[2 * c][3]),
                              pack2<T>(s[2 * c + 1][0], s[2 * c + 1][1]),
                              pack2<T>(s[2 * c + 1][2], s[2 * c + 1][3])};
#pragma unroll
            for (int n = 0; n < DV / 8; n += 2) {
                u32 b[4];
                ldmatrix_trans(b, at_v + c * 16 * PITCH_V + n * 16);
                mma<T>(sums[n], p, b[0], b[1]);
                mma<T>(sums[n + 1], p, b[2], b[3]);
            }
        }
    }
    bool odd[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const Row row(a, i3, head_kv, r0 + row0 + 8 * r, live);
        l[r] = quad_sum(l[r]);
        if (row.query < 0) continue;
        const End to(a, i3, row, part, m[r], l[r], lane % 4 == 0);
#pragma unroll
        for (int n = 0; n < DV / 8; ++n)
            odd[r] |= to.put(n * 8 + (lane & 3) * 2, sums[n][2 * r], sums[n][2 * r + 1]);
    }
    repair_rows<DV>(a, i3, head_kv, r0 + warp * 16, walk.first * BN, walk.end * BN, part, 0, odd, m, l,
                    source_of<T>(a, i3, head_kv));
}
