// flash_attn_ext for few queries: memory-bound, so only the number of bytes in flight matters.
//
// Two designs. (a) A vector kernel: lanes share a key, with FMA products and shuffled sums. At one
// query it wastes no multiplications, but with g heads on one key head it does g times the work.
// (b) mma m16n8k16 with the (head, query) rows of one key head as M. At one query of one head 15 of
// 16 rows are wasted, which costs nothing: a tile of 16 keys takes 40 products at 192/128, a tenth
// of the time its bytes take. Up to 16 rows are free. (b) serves all cases: taken.
//
// A block takes 16 rows and one split of the keys. Its warps share nothing until the end: each
// takes every WARPS-th tile of 16 keys through its own ring (cp.async), so no block-wide barrier
// stalls a load. The sums of the warps are merged in order, and those of the splits by `combine`.
// q8_0 keys and values arrive in the ring undecoded and are decoded to f16 from there.
// The instances below that name architectures are for GPUs with less shared memory than 9.0; on 8.0
// half of the others fit too.
// @kernel hot split<{__half|__nv_bfloat16}, 64, 64, 8, 4, false>
// @kernel hot split<{__half|__nv_bfloat16}, 80, 80, 8, 4, false>
// @kernel hot split<{__half|__nv_bfloat16}, 96, 96, 8, 3, false>
// @kernel hot split<{__half|__nv_bfloat16}, 128, 128, 8, 2, false>
// @kernel hot split<{__half|__nv_bfloat16}, 192, 128, 8, 2, false>
// @kernel split<{__half|__nv_bfloat16}, 256, 256, 4, 2, false>
// @kernel hot split<__half, 64, 64, 8, 4, true>
// @kernel hot split<__half, 128, 128, 8, 2, true>
// @kernel hot split<__half, 192, 128, 8, 2, true>
// @kernel split<__half, 256, 256, 4, 2, true>
// @kernel hot 80 86 89 120a split<{__half|__nv_bfloat16}, {64, 64|80, 80}, 8, 2, false>
// @kernel hot 80 86 89 120a split<{__half|__nv_bfloat16}, 96, 96, 4, 3, false>
// @kernel hot 80 86 89 120a split<{__half|__nv_bfloat16}, {128, 128|192, 128}, 4, 2, false>
// @kernel 80 86 89 120a split<{__half|__nv_bfloat16}, 256, 256, 2, 2, false>
// @kernel hot 80 86 89 120a split<__half, {64, 64, 8|128, 128, 4|192, 128, 4}, 2, true>
// @kernel 80 86 89 120a split<__half, 256, 256, 2, 2, true>
#include "attention.cuh"
#include "attention_q8_0.cuh"

template <int DK, int DV, bool Q8>
struct SplitShape {
    static constexpr int KEYS = 16, PITCH_K = DK * 2 + 16, PITCH_V = DV * 2 + 16;
    static constexpr int TILE = KEYS * (PITCH_K + PITCH_V);
    static constexpr int RAW_K = DK / 32 * 34, RAW_V = DV / 32 * 34;  // bytes of a q8_0 row
    static constexpr int STAGE = Q8 ? (KEYS * (RAW_K + RAW_V) + 15) / 16 * 16 : TILE;
};

template <class T, int DK, int DV, int WARPS, int STAGES, bool Q8>
__global__ void __launch_bounds__(WARPS * 32, 1) split(const __grid_constant__ Attention a) {
    wait_for_predecessor();
    using Shape = SplitShape<DK, DV, Q8>;
    constexpr int KEYS = Shape::KEYS, PITCH_K = Shape::PITCH_K, PITCH_V = Shape::PITCH_V;
    constexpr int PITCH_SUM = DV + 4;
    extern __shared__ __align__(128) char memory[];
    __shared__ float factors[16], tops[WARPS][16], totals[WARPS][16];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = blockIdx.x,
              r0 = blockIdx.y * 16;
    const int head_kv = blockIdx.z % a.heads_kv, i3 = blockIdx.z / a.heads_kv;
    const int ratio = a.ratio(), live = a.live(), q0 = r0 / ratio, q1 = (r0 + 15) / ratio;

    release_successor();
    Queries<T, DK, 16, WARPS>(a, i3, head_kv, r0, warp).store(a, factors, warp, [&](int r, int i) {
        return (u32 *)(memory + r * PITCH_K + i * 2);
    });
    __syncthreads();
    u32 q[DK / 16][4];
#pragma unroll
    for (int n = 0; n < DK / 16; ++n)
        ldmatrix(q[n], shared_address(memory) + (lane & 15) * PITCH_K + (lane >> 4) * 16 + n * 32);
    const float factor[2] = {factors[lane / 4], factors[lane / 4 + 8]};
    const Row rows[2] = {Row(a, i3, head_kv, r0 + lane / 4, live),
                         Row(a, i3, head_kv, r0 + lane / 4 + 8, live)};
    const Walk<KEYS> walk(a, i3, q0, q1, live, part);
    __syncthreads();

    const char *k = a.k + head_kv * a.nb_k[1] + i3 * a.nb_k[2];
    const char *v = a.v + head_kv * a.nb_v[1] + i3 * a.nb_v[2];
    char *ring = memory + warp * (STAGES * Shape::STAGE + (Q8 ? Shape::TILE : 0));
    const auto fetch = [&](int t, int stage) {
        const int j0 = t * KEYS;
        const u32 to = shared_address(ring) + stage * Shape::STAGE;
        if constexpr (Q8) {
            fetch_raw<KEYS, Shape::RAW_K>(to, k + j0 * a.nb_k[0], a.nb_k[0], live - j0, lane, 32);
            fetch_raw<KEYS, Shape::RAW_V>(to + KEYS * Shape::RAW_K, v + j0 * a.nb_v[0], a.nb_v[0],
                                          live - j0, lane, 32);
        } else {
            constexpr int CK = DK / 8, CV = DV / 8;
#pragma unroll
            for (int i = lane; i < KEYS * CK; i += 32) {
                const int j = i / CK, c = i % CK;
                const bool real = j0 + j < live;
                copy16(to + j * PITCH_K + c * 16, k + (real ? (j0 + j) * a.nb_k[0] + c * 16 : 0),
                       real);
            }
#pragma unroll
            for (int i = lane; i < KEYS * CV; i += 32) {
                const int j = i / CV, c = i % CV;
                const bool real = j0 + j < live;
                copy16(to + KEYS * PITCH_K + j * PITCH_V + c * 16,
                       v + (real ? (j0 + j) * a.nb_v[0] + c * 16 : 0), real);
            }
        }
    };

    int now = walk.alive(walk.first + warp, WARPS), next = now;
#pragma unroll
    for (int s = 0; s < STAGES; ++s) {
        if (next < walk.end) fetch(next, s), next = walk.alive(next + WARPS, WARPS);
        copies_commit();
    }
    float sums[DV / 8][4] = {}, m[2] = {-INF, -INF}, l[2] = {};
    for (int stage = 0; now < walk.end; stage = stage + 1 == STAGES ? 0 : stage + 1) {
        copies_wait<STAGES - 1>();
        __syncwarp();
        u32 at = shared_address(ring) + stage * Shape::STAGE;
        if constexpr (Q8) {
            const char *raw = ring + stage * Shape::STAGE;
            char *tile = ring + STAGES * Shape::STAGE;
            decode_raw<KEYS, DK>(raw, tile, PITCH_K, lane, 32);
            decode_raw<KEYS, DV>(raw + KEYS * Shape::RAW_K, tile + KEYS * PITCH_K, PITCH_V, lane,
                                 32);
            __syncwarp();
            at = shared_address(tile);
        }
        float s[2][4] = {};
        const u32 at_k = at + ((lane & 7) + (lane >> 4) * 8) * PITCH_K + (lane >> 3 & 1) * 16;
#pragma unroll
        for (int n = 0; n < DK / 16; ++n) {
            u32 b[4];
            ldmatrix(b, at_k + n * 32);
            mma<T>(s[0], q[n], b[0], b[1]);
            mma<T>(s[1], q[n], b[2], b[3]);
        }
        const int key = now * KEYS + 2 * (lane & 3);
        const bool bias = walk.biased(now);
        float left[2] = {factor[0], factor[1]};
        if (bias || a.softcap > 0 || walk.edge(now)) {
            left[0] = masked(a, rows[0], s, 0, factor[0], key, bias);
            left[1] = masked(a, rows[1], s, 2, factor[1], key, bias);
        }
        const float2 lost = softmax_step(s, left, m, l);
        const u32 p[4] = {pack2<T>(s[0][0], s[0][1]), pack2<T>(s[0][2], s[0][3]),
                          pack2<T>(s[1][0], s[1][1]), pack2<T>(s[1][2], s[1][3])};
        const u32 at_v = at + KEYS * PITCH_K + (lane & 15) * PITCH_V + (lane >> 4) * 16;
#pragma unroll
        for (int n = 0; n < DV / 8; n += 2) {
            u32 b[4];
            ldmatrix_trans(b, at_v + n * 16);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                sums[n + i][0] *= lost.x, sums[n + i][1] *= lost.x;
                sums[n + i][2] *= lost.y, sums[n + i][3] *= lost.y;
                mma<T>(sums[n + i], p, b[2 * i], b[2 * i + 1]);
            }
        }
        __syncwarp();
        now = walk.alive(now + WARPS, WARPS);
        if (next < walk.end) fetch(next, stage), next = walk.alive(next + WARPS, WARPS);
        copies_commit();
    }

    // Sum over the warps, in order.
    copies_wait<0>();
    __syncthreads();
    float *shared_sums = (float *)memory;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int row = lane / 4 + 8 * r;
        l[r] = quad_sum(l[r]);
        if (lane % 4 == 0) tops[warp][row] = m[r], totals[warp][row] = l[r];
#pragma unroll
        for (int n = 0; n < DV / 8; ++n)
            *(float2 *)(shared_sums + (warp * 16 + row) * PITCH_SUM + n * 8 + lane % 4 * 2) =
                make_float2(sums[n][2 * r], sums[n][2 * r + 1]);
    }
    __syncthreads();
    for (int r = warp; r < 16; r += WARPS) {
        const Row row(a, i3, head_kv, r0 + r, live);
        if (row.query < 0) continue;
        float top = -INF, total = 0, weight[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, tops[w][r]);
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            weight[w] = exp2_fast(tops[w][r] - finite(top));
            total += weight[w] * totals[w][r];
        }
        const End to(a, i3, row, part, top, total, lane == 0);
        bool odd = false;
        for (int c = lane; c < DV; c += 32) {
            float x = 0;
#pragma unroll
            for (int w = 0; w < WARPS; ++w)
                x += weight[w] * shared_sums[(w * 16 + r) * PITCH_SUM + c];
            to.to[c] = x * to.factor;
            odd |= !finite_number(x);
        }
        if (__any_sync(~0u, odd))
            repair<(DV + 31) / 32>(a, i3, head_kv, r0 + r, walk.first * KEYS, walk.end * KEYS, part, 0,
                                       DV, top, total, source_of<Stored<T, Q8>>(a, i3, head_kv));
    }
}
