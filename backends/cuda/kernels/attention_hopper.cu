// flash_attn_ext for many queries on 9.0: wgmma and the tensor copy engine.
//
// Two designs. (a) mma.sync (attention_tiles.cu): every warp reads every key through ldmatrix,
// which alone takes more clocks than the products, and mma.sync reaches about 0.6 of wgmma's rate.
// (b) wgmma: operands come from shared memory without passing through registers, a copy engine
// fills it, and one thread directs both; needs 9.0a. pyggml has both: 269 and 523 TFLOP/s on an
// H200 (192/128, 16 heads, 8192 queries, causal, f16).
//
// Warpgroup 0 fetches: one thread keeps two tiles of BN keys and two of BN values in flight (with
// full / empty mbarriers for each). Warpgroups 1 and 2 own 64 rows each: S = Q K^T, then O += P V
// with the weights P in registers as the A operand. The S of a tile runs at the same time as
// the P V of the previous tile, and its softmax overlaps that P V. Each warpgroup fills the other's
// gaps.
// EXTRA: with an explicit mask or a soft-cap. That code leaves too few registers to overlap softmax
// and P V inside a warpgroup.
// Rows are the (query, head) pairs of one key head, as in attention.cuh. A block takes 128 rows;
// blocks with the most keys start first, those of some heads before those of others: blocks of a head
// that run at the same time read its keys from L2. With one block of each of 128 heads, all read
// their keys from memory (4096 keys: 389 TFLOP/s on an H200).
// HalvesEnd: results are rows that a product reads (halves.cuh), all heads of a query in each. Their
// scale is the same for all: a result lies between values, which are f16.
// @kernel 90a hot hopper<{__half|__nv_bfloat16}, {64, 64, 128|128, 128, 128|192, 128, 128|256, 256, 64}, {false|true}>
// @kernel 90a hot hopper<__half, {64, 64, 128|128, 128, 128|192, 128, 128|256, 256, 64}, false, HalvesEnd>
#include "attention.cuh"
#include "halves.cuh"

// Kernel parameters start at 0x210 on 9.0, and tensor maps must be 64-byte aligned.
struct HopperArgument {
    u64 pad[6];
    TensorMap map_k, map_v;
    Attention a;
    float* scales;  // of rows of f16
};

// The half of each result, which may be rounded up to 65520 and more.
struct HalvesEnd {
    char *to;
    float factor;

    __device__ HalvesEnd(const Attention &a, int i3, const Row &row, int, float m, float l, bool first)
        : to((char *)out_row(a, i3, row.query, row.head)),
          factor(0.5f * row_end(a, i3, row.query, row.head, m, l, first)) {}
    __device__ __forceinline__ bool put(int column, float x, float y) const {
        *(u32 *)(to + 2 * place_in_row(column)) = pack2<__half>(x * factor, y * factor);
        return !(finite_number(x) && finite_number(y));
    }
    __device__ __forceinline__ void put_one(int column, float x) const {
        *(__half *)(to + 2 * place_in_row(column)) = __float2half_rn(x * factor);
    }
};

template <int DK, int DV, int BN>
struct HopperShape {
    static constexpr int Q = 128 * DK * 2, K = BN * DK * 2, V = BN * DV * 2;
    static constexpr int BYTES = Q + 2 * (K + V) + 1024;  // plus room to align to 1024
};

template <class T, int DK, int DV, int BN, bool EXTRA, class E = End>
__global__ void __launch_bounds__(384, 1) hopper(const __grid_constant__ HopperArgument argument) {
    begin();
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    const Attention &a = argument.a;
    using Shape = HopperShape<DK, DV, BN>;
    constexpr int M = 128, NV = DV < 128 ? DV : 128, VS = DV / NV;
    extern __shared__ char unaligned[];
    char *memory = unaligned + (-shared_address(unaligned) & 1023);
    char *ring_k = memory + Shape::Q, *ring_v = ring_k + 2 * Shape::K;
    __shared__ float factors[M];
    __shared__ u64 full_k[2], full_v[2], empty_k[2], empty_v[2];
    // The compiler can tell that the second form is the same in all lanes, so descriptors are in
    // uniform registers. With masks it then needs more registers than there are.
    const int lane = threadIdx.x % 32,
              warp = EXTRA ? threadIdx.x / 32 : __shfl_sync(~0u, threadIdx.x / 32, 0);
    const int r0 = (gridDim.y - 1 - blockIdx.y) * M;
    const int outer = blockIdx.z * gridDim.x + blockIdx.x;
    const int head_kv = outer % a.heads_kv, i3 = outer / a.heads_kv;
    if (i3 >= a.n3) return;  // the last set of heads may be smaller
    const int ratio = a.ratio(), live = a.live(), q0 = r0 / ratio, q1 = (r0 + M - 1) / ratio;
    if (threadIdx.x == 0) {
        for (int s = 0; s < 2; ++s) {
            barrier_init(full_k + s, 1), barrier_init(full_v + s, 1);
            barrier_init(empty_k + s, 8), barrier_init(empty_v + s, 8);
        }
        fence_barriers();
    }
    const Walk<BN, EXTRA> walk(a, i3, q0, q1, live);
    int now = walk.alive(walk.first);
    __syncthreads();

    if (warp < 4) {
        registers_give<24>();
        if (threadIdx.x == 0) {
            for (int i = 0; now < walk.end; ++i, now = walk.alive(now + 1)) {
                const int s = i & 1, j0 = now * BN;
                const u32 parity =
                    (i >> 1 & 1) ^ 1;  // previous phase: the first wait passes at once
                barrier_wait(empty_k + s, parity);
                barrier_expect(full_k + s, Shape::K);
                for (int c = 0; c < DK / 64; ++c)
                    tensor_copy(ring_k + s * Shape::K + c * BN * 128, &argument.map_k, full_k + s,
                                c * 64, j0, head_kv, i3);
                barrier_wait(empty_v + s, parity);
                barrier_expect(full_v + s, Shape::V);
                for (int c = 0; c < DV / 64; ++c)
                    tensor_copy(ring_v + s * Shape::V + c * BN * 128, &argument.map_v, full_v + s,
                                c * 64, j0, head_kv, i3);
            }
        }
        return;
    }
    registers_take<240>();
    const int group = warp / 4 - 1, row0 = group * 64 + warp % 4 * 16 + lane / 4;
    const Queries<T, DK, 64, 4> queries(a, i3, head_kv, r0 + group * 64, warp % 4);
    queries.store(a, factors + group * 64, warp % 4, [&](int r, int i) {
        const int row = group * 64 + r, chunk = i % 64 / 8 ^ (r & 7);
        return (u32 *)(memory + i / 64 * M * 128 + row * 128 + chunk * 16 + i % 8 * 2);
    });
    fence_engines();
    warpgroup_sync(1 + group);
    const float factor[2] = {factors[row0], factors[row0 + 8]};
    const Row rows[2] = {Row(a, i3, head_kv, r0 + row0, live),
                         Row(a, i3, head_kv, r0 + row0 + 8, live)};
    const u32 at_q = shared_address(memory) + group * 64 * 128;
    const u64 q_at = tile_descriptor(at_q, 16), k_at = tile_descriptor(shared_address(ring_k), 16),
              v_at = tile_descriptor(shared_address(ring_v), BN * 128);

    float sums[VS][NV / 2], s[BN / 2], m[2] = {-INF, -INF}, l[2] = {};
    float (&score)[BN / 8][4] = reinterpret_cast<float (&)[BN / 8][4]>(s);
    u32 p[BN / 16][4];
#pragma unroll
    for (int x = 0; x < VS; ++x)
#pragma unroll
        for (int i = 0; i < NV / 2; ++i) sums[x][i] = 0;

    const auto multiply_keys = [&](int i) {
        barrier_wait(full_k + (i & 1), i >> 1 & 1);
        wgmma_hold(s);
        wgmma_fence();
        const u64 k_from = further(k_at, (i & 1) * Shape::K);
#pragma unroll
        for (int n = 0; n < DK / 16; ++n)
            wgmma_ss<T, BN>(s, further(q_at, n / 4 * M * 128 + n % 4 * 32),
                            further(k_from, n / 4 * BN * 128 + n % 4 * 32), n > 0);
        wgmma_commit();
    };
    const auto multiply_values = [&](int i) {
        barrier_wait(full_v + (i & 1), i >> 1 & 1);
#pragma unroll
        for (int x = 0; x < VS; ++x) wgmma_hold(sums[x]);
        wgmma_fence();
        const u64 v_from = further(v_at, (i & 1) * Shape::V);
#pragma unroll
        for (int n = 0; n < BN / 16; ++n)
#pragma unroll
            for (int x = 0; x < VS; ++x)
                wgmma_rs<T, NV>(
                    sums[x], p[n],
                    further(v_from, x * (NV / 64) * BN * 128 + n * 16 * 128), 1);
        wgmma_commit();
    };
    const auto release = [&](u64 *b) {
        if (lane == 0) barrier_arrive(b);
    };
    const auto soften = [&](int tile) {
        const int j0 = tile * BN;
        const int key = j0 + 2 * (lane & 3);
        float left[2] = {factor[0], factor[1]};
        const bool bias = walk.biased(tile);
        if (EXTRA && (bias || a.softcap > 0)) {
            left[0] = masked(a, rows[0], score, 0, factor[0], key, bias);
            left[1] = masked(a, rows[1], score, 2, factor[1], key, bias);
        } else if (walk.edge(tile)) {
            hide(rows[0], score, 0, key);
            hide(rows[1], score, 2, key);
        }
        return softmax_step(score, left, m, l);
    };
    // The sums for a new maximum. This runs while the next keys are multiplied.
    const auto rescale = [&](float2 lost) {
#pragma unroll
        for (int x = 0; x < VS; ++x)
#pragma unroll
            for (int n = 0; n < NV / 2; n += 4) {
                sums[x][n] *= lost.x, sums[x][n + 1] *= lost.x;
                sums[x][n + 2] *= lost.y, sums[x][n + 3] *= lost.y;
            }
    };
    const auto pack = [&] {
#pragma unroll
        for (int n = 0; n < BN / 16; ++n) {
            p[n][0] = pack2<T>(score[2 * n][0], score[2 * n][1]);
            p[n][1] = pack2<T>(score[2 * n][2], score[2 * n][3]);
            p[n][2] = pack2<T>(score[2 * n + 1][0], score[2 * n + 1][1]);
            p[n][3] = pack2<T>(score[2 * n + 1][2], score[2 * n + 1][3]);
        }
    };

    if (now < walk.end) {
        multiply_keys(0);
        wgmma_wait<0>();
        wgmma_hold(s);
        release(empty_k);
        float2 lost = soften(now);
        pack();
        int i = 1;
        for (now = walk.alive(now + 1); now < walk.end; now = walk.alive(now + 1), ++i) {
            multiply_keys(i);
            rescale(lost);
            multiply_values(i - 1);
            wgmma_wait<1>();
            wgmma_hold(s);
            release(empty_k + (i & 1));
            lost = soften(now);
            // Never true, but it makes the compiler compute the weights before it waits for
            // the sums.
            if (l[0] + l[1] < 0) release(empty_v);
            wgmma_wait<0>();
#pragma unroll
            for (int x = 0; x < VS; ++x) wgmma_hold(sums[x]);
            release(empty_v + (i - 1 & 1));
            pack();
        }
        rescale(lost);
        multiply_values(i - 1);
        wgmma_wait<0>();
#pragma unroll
        for (int x = 0; x < VS; ++x) wgmma_hold(sums[x]);
    }
    bool odd[2] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        l[r] = quad_sum(l[r]);
        if (rows[r].query < 0) continue;
        const E to(a, i3, rows[r], 0, m[r], l[r], lane % 4 == 0);
        if constexpr (Same<E, HalvesEnd>::yes)
            if (rows[r].head == 0 && lane % 4 == 0) argument.scales[i3 * a.n_q + rows[r].query] = 2;
#pragma unroll
        for (int x = 0; x < VS; ++x)
#pragma unroll
            for (int n = 0; n < NV / 8; ++n)
                odd[r] |= to.put(x * NV + n * 8 + (lane & 3) * 2, sums[x][4 * n + 2 * r],
                                 sums[x][4 * n + 2 * r + 1]);
    }
    repair_rows<DV, E>(a, i3, head_kv, r0 + row0 - lane / 4, walk.first * BN, walk.end * BN, 0, 0,
                    odd, m, l, source_of<T>(a, i3, head_kv));
#endif
}
