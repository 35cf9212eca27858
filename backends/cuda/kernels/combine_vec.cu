// The end of latent attention of a few queries: the sums of its splits and their product with
// attn_v_b, head by head. Apart, `combine` and `vec` took 6.1 us of a token of V2-Lite, this takes 2.
//
// parts [512, splits, rows], w [512, n, heads] -> y [n] of each row; a row is a query of a head
// grid: BLOCKS, heads, queries. The blocks of a row are a cluster. Each has 512 / BLOCKS columns: it
// adds their splits, makes them fixed point and multiplies all n rows of w by them; its part of w is
// in registers before it waits. The products of the blocks meet in shared memory, of 32 rows of w in
// one block, which also writes them as fixed point. Reads parts once, from L2 (139 KB a head for 4352
// keys of V2-Lite), and w for each row.
//
// Parts of `list_token` are halves of means in f16, in the order of `place_of` there. A block's 128 of
// these are four groups of 32 columns, with 64 columns from one to the next.
//
// Lost by count: every block adds up all columns of its head. 139 KB take a multiprocessor 2200
// clocks, more than the blocks need to meet.
// @kernel hot 90a combine_vec<tiles::{BLOCKS}, {8, 1|4, 2}>
// @kernel 90a combine_vec<tiles::{SOME}, {8, 2|4, 4}>
// @kernel 90a combine_vec<tiles::{SOME}, 4, {2|4}, true>
// @kernel 100a 120a combine_vec<tiles::{SOME}, {8, 1|4, 2|8, 2|4, 4}>
#include "attention.cuh"
#include "cluster.cuh"
#include "linear_vec.cuh"

constexpr int D = 512, WARPS = 8, WORDS = group_bytes<2> / 16;

// Where the results go: y, from query to query and head to head in bytes; and as fixed point, or
// null, in groups.
struct Values {
    char *y;
    long long query, head;
    unsigned char *fixed;
    int query_groups, head_groups;
};

// UNITS: of 32 rows of w, whose products meet in a block.
template <int BLOCKS, int UNITS>
struct Meeting {
    float columns[WARPS][D / BLOCKS];  // sums of each warp's splits
    uint4 groups[D / BLOCKS / 32 * WORDS];
    float products[UNITS][BLOCKS][32];  // from each block
    Inbox inbox;
};

// The maximum over the warp, in one instruction of whole numbers.
__device__ __forceinline__ float top_of_warp(float x) {
    const unsigned bits = __float_as_uint(x);
    const unsigned top = __reduce_max_sync(~0u, bits >> 31 ? ~bits : bits | 0x80000000u);
    return __uint_as_float(top >> 31 ? top & 0x7fffffffu : ~top);
}
// Four columns of a part.
template <bool LISTED>
struct Four {
    float4 x;
    __device__ float4 numbers() const { return x; }
};
template <>
struct Four<true> {
    uint2 x;
    __device__ float4 numbers() const {
        const auto half = [](u32 word) { return __half2float(__ushort_as_half(word & 0xFFFF)); };
        return make_float4(half(x.x), half(x.x >> 16), half(x.y), half(x.y >> 16));
    }
};
// ROUNDS: tiles of w of which a lane has a group. 4 blocks for many rows: so all are on the GPU at
// once. LISTED: parts are those of `list_token`.
template <class F, int BLOCKS, int ROUNDS, bool LISTED = false>
__global__ void __cluster_dims__(BLOCKS, 1, 1) __launch_bounds__(32 * WARPS, BLOCKS == 4 ? 4 : 3)
    combine_vec(const __grid_constant__ tiles::Weights<F> weights,
                const __grid_constant__ Attention a, const __grid_constant__ Values to) {
    constexpr int COLUMNS = D / BLOCKS, LANES = COLUMNS / 4;  // lanes that share a split
    constexpr int ONCE = 32 * WARPS / LANES, TURNS = LISTED ? 5 : 9;  // splits at once, and how often
    constexpr int STATS = (ONCE * TURNS + 31) / 32;
    constexpr int GROUPS = COLUMNS / 32, TILES = 4 / GROUPS;  // of w, that a warp has at once
    constexpr int UNITS = (ROUNDS * WARPS * TILES / 4 + BLOCKS - 1) / BLOCKS;
    static_assert(!LISTED || BLOCKS == 4, "whole groups in a block");
    extern __shared__ uint4 memory[];
    auto &shared = *(Meeting<BLOCKS, UNITS> *)memory;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = blockIdx.x;
    const int head = blockIdx.y, query = blockIdx.z, units = tiles::rows_of(weights.w[0]) / 32;
    if (threadIdx.x == 0) shared.inbox.open((units - rank + BLOCKS - 1) / BLOCKS * BLOCKS * 128);
    blocks_start();
    const int group = lane / 8 % GROUPS;
    const int columns = LISTED ? rank / 2 * 8 + rank % 2 + 2 * group : rank * GROUPS + group;
    const auto tile = [&](int r) { return (r * WARPS + warp) * TILES + lane / 8 / GROUPS; };
    tiles::RawGroup<F> raw[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        const tiles::Row<F> from(weights.w[0], head, min(tile(r), 4 * units - 1), lane % 8);
        raw[r] = tiles::load_group(from, columns);
    }
    const tiles::Table<F> table(0);
    const long long row = (long long)query * a.heads + head;
    const int split = threadIdx.x / LANES;
    const float2 *stats = part_stats(a, row * a.splits) + lane;
    const auto *sums = (const Four<LISTED> *)a.parts + (row * a.splits + split) * (D / 4) +
                       rank * LANES + threadIdx.x % LANES;
    blocks_started();
    begin();

    float2 stat[STATS];
#pragma unroll
    for (int i = 0; i < STATS; ++i)
        stat[i] = lane + 32 * i < a.splits ? stats[32 * i] : make_float2(-INF, 0);
    Four<LISTED> x[TURNS];
#pragma unroll
    for (int i = 0; i < TURNS; ++i)
        x[i] = split + ONCE * i < a.splits ? sums[ONCE * (D / 4) * i] : Four<LISTED>{};
    float m = stat[0].x, l = 0, weight[STATS];
#pragma unroll
    for (int i = 1; i < STATS; ++i) m = fmaxf(m, stat[i].x);
    m = top_of_warp(m);
#pragma unroll
    for (int i = 0; i < STATS; ++i) {
        weight[i] = exp2_fast(stat[i].x - finite(m));
        const float all = stat[i].y * weight[i];
        l += all;
        if (LISTED) weight[i] = 2 * all;
    }
    float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < TURNS; ++i) {
        const float w = __shfl_sync(~0u, weight[ONCE * i / 32], split + ONCE * i % 32);
        const float4 y = x[i].numbers();
        sum.x += w * y.x, sum.y += w * y.y, sum.z += w * y.z, sum.w += w * y.w;
    }
    if constexpr (LANES == 16) {
        sum.x += __shfl_xor_sync(~0u, sum.x, 16), sum.y += __shfl_xor_sync(~0u, sum.y, 16);
        sum.z += __shfl_xor_sync(~0u, sum.z, 16), sum.w += __shfl_xor_sync(~0u, sum.w, 16);
    }
    if constexpr (LISTED) {
        float *const to = shared.columns[warp] + lane % 2 * 64 + lane / 16 * 16 + lane / 2 % 8;
        to[0] = sum.x, to[8] = sum.y, to[32] = sum.z, to[40] = sum.w;
    } else if (lane < LANES) {
        *(float4 *)&shared.columns[warp][4 * lane] = sum;
    }
    l = warp_reduce<Sum>(l);
    __syncthreads();
    if (warp == 0) {
        float four[4] = {};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            const float4 own = *(const float4 *)&shared.columns[w][4 * (lane % LANES)];
            four[0] += own.x, four[1] += own.y, four[2] += own.z, four[3] += own.w;
        }
        const float factor = row_end(a, 0, query, head, m, l, false);
#pragma unroll
        for (int i = 0; i < 4; ++i) four[i] *= factor;
        put_fixed<2, true>(four, (unsigned char *)(shared.groups + lane % LANES / 8 * WORDS),
                           lane < LANES);
    }
    __syncthreads();

    const tiles::Fixed<2> column([&](int i) { return shared.groups[group * WORDS + i]; });
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        const tiles::Scale scale = F::scale(raw[r].scale.own, raw[r].scale.shared);
        float y = tiles::dot_group(tiles::CodesFor<F>(table, raw[r]), scale, column);
        y += __shfl_xor_sync(~0u, y, 8);
        if constexpr (GROUPS == 4) y += __shfl_xor_sync(~0u, y, 16);
        const int unit = tile(r) / 4;
        if (group == 0 && unit < units)
            shared.inbox.send(unit % BLOCKS,
                              &shared.products[unit / BLOCKS][rank][tile(r) % 4 * 8 + lane % 8], y);
    }
    const bool ends = warp == 0 && rank < units;
    shared.inbox.wait(ends);
    if (!ends) return;
    const int place = lane / 8 % UNITS, unit = place * BLOCKS + rank;
    const bool real = lane < 8 * UNITS && unit < units;
    float four[4] = {};
#pragma unroll
    for (int b = 0; b < BLOCKS; ++b) {
        const float4 own = *(const float4 *)&shared.products[place][b][lane % 8 * 4];
        four[0] += own.x, four[1] += own.y, four[2] += own.z, four[3] += own.w;
    }
    float *y = (float *)(to.y + query * to.query + head * to.head) + 32 * unit + lane % 8 * 4;
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (real) y[i] = four[i];
    const long long groups = query * to.query_groups + head * to.head_groups + unit;
    if (to.fixed) put_fixed<2, true>(four, to.fixed + groups * group_bytes<2>, real);
}
