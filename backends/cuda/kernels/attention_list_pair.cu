// flash_attn_ext over a list of keys on 9.0, one query of latent attention with many heads (576/512
// or 512/512, V is a view of K): blocks of attention_latent.cu in pairs, which gather each row once.
//
// A block takes 16 heads of a query and one split of its list, at most two tiles of 64 keys, so all
// its rows are in flight at once and no tile is used twice. The two blocks of a cluster have the
// same keys: each asks the copy engine for half of the rows, whole, and the engine writes them to
// the shared memory of both. A row's pitch is 16 bytes more than the row, so the eight rows of an
// ldmatrix are in different banks without a swizzle. Products, softmax and parts as in
// attention_latent.cuh.
//
// Traffic of 128 heads, 2,048 rows (128 blocks): 9.4 MB of rows from L2, where blocks that gather
// for themselves read 18.9; 4.7 of queries; 2.1 of parts in f16. Two designs lost by count. Clusters
// of 4 read 4.7 MB of rows, but only 30 of them fit on 132 multiprocessors. Blocks of 32 heads read
// as much as pairs, without clusters, but write twice the parts and read twice the queries.
// @kernel 90a hot list_pair<{__half|__nv_bfloat16}, {576|512}>
#include "attention_latent.cuh"
#include "cluster.cuh"

// The shared memory of a block.
template <int DK>
struct PairMemory {
    static constexpr int ROW = DK * 2, PITCH = ROW + 16;
    char queries[16 * PITCH], tiles[2][64 * PITCH], weights[16 * 128];
    float factors[16], lost[16], tops[16], totals[16], biases[2][64];
    u64 full[2];
};

template <class T, int DK>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    list_pair(const __grid_constant__ Attention a) {
    constexpr int M = 16, BN = 64, WARPS = 8, NV = DV / 8 / WARPS;
    using Memory = PairMemory<DK>;
    constexpr int PITCH = Memory::PITCH;
    extern __shared__ __align__(128) char unnamed[];
    Memory &memory = *(Memory *)unnamed;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = blockIdx.y;
    const int r0 = blockIdx.x * M, head_kv = blockIdx.z % a.heads_kv, i3 = blockIdx.z / a.heads_kv;
    const auto at = [](int row, int chunk) { return row * PITCH + chunk * 16; };
    const Walk<BN, false> walk(a, i3, part);
    const int tiles = walk.end - walk.first;

    // A barrier gets the bytes of its tile from the warps, which know the rows that are seen.
    if (threadIdx.x < 2) barrier_init(memory.full + threadIdx.x, WARPS);
    fence_barriers();
    cluster_sync();
    // Lanes 0 to 15 look up eight places of each tile. The engine takes copies of one lane after
    // the other, so all warps ask for a few.
    const int mine = lane / 8 % 2, slot = warp * 8 + lane % 8;
    const int place = (walk.first + mine) * BN + slot, query = r0 / a.pitch;
    const bool listed_here = lane < 16 && place < min(a.n_ids, walk.end * BN);
    const char *ids = a.ids + query * a.nb_ids[1] + i3 * a.nb_ids[2] + place * a.nb_ids[0];
    const char *k = a.k + head_kv * a.nb_k[1] + i3 * a.nb_k[2];
    if (a.early == NOTHING) wait_for_predecessor();
    int id = a.early != QUERIES && listed_here ? *(const int *)ids : -1;
    const Queries<T, DK, M, WARPS> loaded(a, i3, head_kv, r0, warp, a.pitch);
    if (a.early == QUERIES) {
        wait_for_predecessor();
        if (listed_here) id = *(const int *)ids;
    }
    const int live = a.live();
    {
        const Row row(a, i3, head_kv, r0, live, a.pitch);
        float bias = id >= row.first && id < row.last ? 0 : -INF;
        if (bias == 0 && row.mask)
            bias = __half2float(*(const __half *)(row.mask + id * a.nb_mask[0]));
        const u32 seen = __ballot_sync(~0u, bias != -INF);
        if (lane < 16) {
            memory.biases[mine][slot] = bias;
            if (lane % 8 == 0)
                barrier_expect(memory.full + mine, __popc(seen >> lane & 255) * Memory::ROW);
            if (bias != -INF && lane / 4 % 2 == blockIdx.x % 2)
                copy_to_blocks(memory.tiles[mine] + slot * PITCH, k + id * a.nb_k[0], Memory::ROW,
                               memory.full + mine, 3);
        }
        // A row that nobody sees is not read: zeros stand for it.
        for (u32 hidden = ~seen & (tiles > 1 ? 0xFFFF : 0xFF); hidden; hidden &= hidden - 1) {
            const int i = __ffs(hidden) - 1;
            for (int c = lane; c < DK / 8; c += 32)
                *(uint4 *)(memory.tiles[i / 8] + at(warp * 8 + i % 8, c)) = make_uint4(0, 0, 0, 0);
        }
    }
    if (a.early == ALL) wait_for_predecessor();
    release_successor();
    loaded.store(a, memory.factors, warp, [&](int r, int i) {
        return (u32 *)(memory.queries + at(r, i / 8) + i % 8 * 2);
    });
    __syncthreads();

    const Slice<T, DK, BN, PITCH> slice(memory.queries, warp, at);
    const int row0 = lane / 4;  // this thread's first row of sums
    float sums[NV][4] = {}, m[2] = {-INF, -INF}, l[2] = {}, factor[2], slope[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        factor[r] = memory.factors[slice.row + r];
        slope[r] = Row(a, i3, head_kv, r0 + slice.row + r, live, a.pitch).slope;
    }
    __syncthreads();  // the products of a tile are put where the queries were
    for (int t = 0; t < tiles; ++t) {
        const u32 tile = shared_address(memory.tiles[t]);
        barrier_wait(memory.full + t, 0);
        slice.multiply(tile);
        __syncthreads();
        float s[1][4], top[2];
        slice.sum(s);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            listed(a, s, 2 * r, factor[r], slope[r], memory.biases[t] + slice.key);
            top[r] = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
        }
        slice.row_max(top);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = slice.row + r;
            top[r] = fmaxf(m[r], top[r]);
            const float base = finite(top[r]), less = exp2_fast(m[r] - base);
            const float x = exp2_fast(s[0][2 * r] - base), y = exp2_fast(s[0][2 * r + 1] - base);
            m[r] = top[r];
            l[r] = l[r] * less + (x + y);
            if (slice.key == 0) memory.lost[row] = less;
            *(u32 *)(memory.weights + weight_at<BN>(row, slice.key)) = pack2<T>(x, y);
        }
        __syncthreads();
        const float lost[2] = {memory.lost[row0], memory.lost[row0 + 8]};
#pragma unroll
        for (int c = 0; c < NV; ++c)
#pragma unroll
            for (int e = 0; e < 4; ++e) sums[c][e] *= lost[e / 2];
#pragma unroll
        for (int n = 0; n < BN / 16; ++n) {
            u32 x[4];
            ldmatrix(x, shared_address(memory.weights) +
                            weight_at<BN>(lane & 15, 16 * n + (lane >> 4) * 8));
#pragma unroll
            for (int c = 0; c < NV; c += 2) {
                u32 b[4];
                ldmatrix_trans(b, tile + at(n * 16 + (lane & 15),
                                            a.v_start / 8 + warp * NV + (lane >> 4) + c));
                mma<T>(sums[c], x, b[0], b[1]);
                mma<T>(sums[c + 1], x, b[2], b[3]);
            }
        }
    }

    const Peaks<WARPS, M> peaks = {(float *)memory.queries};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float total = slice.row_sum(l[r]);
        if (slice.key == 0) {
            memory.totals[slice.row + r] = total;
            memory.tops[slice.row + r] = m[r];
        }
        peaks.put(warp, row0 + 8 * r, sums, r);
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const int index = row0 + 8 * r;
        float top = memory.tops[index], total = memory.totals[index];
        const float down = peaks.scale(index, top, total);
        const Row row(a, i3, head_kv, r0 + index, live, a.pitch);
        if (row.query < 0) continue;
        const End to(a, i3, row, part, top, total, warp == 0 && lane % 4 == 0, down);
        to.put(warp * NV * 8, sums, r);
    }
}
