// flash_attn_ext over lists of keys on 9.0, for few queries of many heads (576/512 or 512/512 in f16, V
// is a view of K).
//
// A block takes 32 heads of one query and one split of its list, in tiles of 64 keys. Keys and columns
// of values are the rows of its products (wgmma has 64), heads their columns. For the scores each of two
// warpgroups multiplies half of the elements; then it has 16 heads, and at last 256 columns.
//
// Bytes decide: each block of heads gathers all chosen rows from L2, and each split writes sums for
// all heads, which are read again. 128 heads and 2,048 keys in 128 blocks, MB: 16 heads a block 18.9
// gathered and 4.2 of f32 sums written, 32 heads 9.4 and 8.4, 64 heads 4.7 and 16.8. So 32 heads, and
// sums in f16: they are divided by their weights, so they lie between values, which are f16; half of
// them, because rounded weights may add up to a little more than 1. `list_combine` has a block for
// each row, all of which run at once and start before the sums are complete.
//
// Designs that lost (H100, a token of V3.2 at 65,536 rows, 22.8 us): attention_latent.cu with 16 heads
// a block and f32 sums, 25.1; mma in place of wgmma, 23.0. A dry run before the wait brings the
// instructions, which come from L2 where they run for the first time, but blocks that share a
// multiprocessor with the launch before start too late for it: 3 us more.
// @kernel hot 90a list_token<{576|512}>
// @kernel list_combine
#include "attention.cuh"

constexpr int DV = 512, M = 32, BN = 64, BOX = BN * 128, Q_BOX = M * 128;

// Where the sum of a column lies in its part: as threads have them.
__device__ __forceinline__ int place_of(int column) {
    return column & 256 | column / 16 % 4 * 64 | column % 8 * 8 | column / 64 % 4 * 2 | column / 8 % 2;
}

template <int DK>
__global__ void __launch_bounds__(448, 1) list_token(const __grid_constant__ Attention a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    constexpr int BOXES = DK / 64, TILE = BOXES * BOX;
    extern __shared__ char unaligned[];
    char *const queries = unaligned + (-shared_address(unaligned) & 1023);
    char *const weights = queries + BOXES * Q_BOX, *const ring = weights + M * 128;
    __shared__ float4 halves[2][2][128];
    __shared__ float factors[M], tops[4][M], totals[4][M], lost[M], biases[2][BN];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // uniform
    const int row = lane / 4, pair = lane % 4 * 2;  // of the fragments of sums
    const int part = blockIdx.x, query = blockIdx.y * M / a.pitch, h0 = blockIdx.y * M % a.pitch;
    const int head_kv = blockIdx.z % a.heads_kv, i3 = blockIdx.z / a.heads_kv, ratio = a.ratio();
    const int units = (a.n_ids + BN - 1) / BN, first = share(units, part, a.splits);
    const int last = share(units, part + 1, a.splits);

    if (a.early == NOTHING) wait_for_predecessor();
    {
        const Queries<__half, DK, M, 8> loaded(a, i3, head_kv, blockIdx.y * M, threadIdx.x / 32, a.pitch);
        loaded.store(a, factors, threadIdx.x / 32, [&](int r, int i) {
            return (u32 *)(queries + i / 64 * Q_BOX + r * 128 + (i % 64 / 8 ^ (r & 7)) * 16 + i % 8 * 2);
        });
    }
    fence_engines();
    __syncthreads();
    const int mine = group * 16 + pair;  // this thread's heads for weights: mine + 8 n + {0, 1}
    float factor[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) factor[n][e] = factors[mine + 8 * n + e];
    const u64 of_queries = tile_descriptor(shared_address(queries) + group * (BOXES / 2) * Q_BOX, 16);
    const u32 at_p = shared_address(weights);
    const int stored = group * 16 + lane / 16 * 8 + lane % 8;  // the head whose weights this lane stores
    const u32 to_weights = at_p + stored * 128 + ((2 * warp + lane / 8 % 2) ^ (stored & 7)) * 16;
    const char *const ids = a.ids + query * a.nb_ids[1] + i3 * a.nb_ids[2];
    const char *const k = a.k + head_kv * a.nb_k[1] + i3 * a.nb_k[2] + threadIdx.x % 8 * 16;
    const char *const mask =
        a.mask ? a.mask + query * a.nb_mask[1] + i3 % a.mask_batch * a.nb_mask[3] : nullptr;
    const int place = threadIdx.x / 8;  // of a tile's keys; the other one is 32 further
    const u32 to_tile = shared_address(ring) + place * 128 + (threadIdx.x % 8 ^ (place & 7)) * 16;

    if (a.early == QUERIES) wait_for_predecessor();
    if (a.early != ALL) release_successor();
    int low = 0, high = 0;
    // Starts the copies of a tile, first those of each group's first EARLY boxes, so that their products
    // run while the others come. Hidden keys become zeros.
    constexpr int EARLY = ((BOXES + 1) / 2 + 1) / 2;
    const auto fetch = [&](int t) {
        const bool there = t < last;
        const int stage = (t - first) % 2;
        const char *from[2];
        bool real[2];
        if (there) {
            int id[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int j = t * BN + place + 32 * i;
                id[i] = j < a.n_ids ? *(const int *)(ids + j * a.nb_ids[0]) : -1;
            }
            if (t == first) {
                high = a.live();
                if (a.pos) {
                    const int p = a.position(query);
                    high = p < high ? p + 1 : high;
                    if (a.window) low = max(0, p - (a.window - 1));
                }
            }
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                real[i] = id[i] >= low && id[i] < high;
                float bias = real[i] ? 0 : -INF;
                if (mask && real[i]) {
                    bias = __half2float(*(const __half *)(mask + id[i] * a.nb_mask[0]));
                    real[i] = bias != -INF;
                }
                if (threadIdx.x % 8 == 0) biases[stage][place + 32 * i] = bias;
                from[i] = k + (real[i] ? id[i] * a.nb_k[0] : 0);
            }
        }
#pragma unroll
        for (int late = 0; late < 2; ++late) {
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int c = 0; c < BOXES; ++c) {
                    const int own = c < (BOXES + 1) / 2 ? c : c - BOXES / 2;  // of its group
                    if (there && (own >= EARLY) == late)
                        copy16(to_tile + stage * TILE + i * (32 * 128) + c * BOX, from[i] + c * 128, real[i]);
                }
            copies_commit();
        }
    };
    fetch(first);
    fetch(first + 1);
    if (a.early == ALL) begin();
    float sums[4][16], by[4][2] = {}, m[2][2], l[2][2];
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int e = 0; e < 2; ++e) m[n][e] = -INF, l[n][e] = 0;

#pragma unroll 1
    for (int t = first; t < last; ++t) {
        const int stage = (t - first) % 2;
        const u32 tile = shared_address(ring) + stage * TILE;
        copies_wait<3>();
        fence_engines();
        __syncthreads();
        float s[16];
        wgmma_hold(s);
        wgmma_fence();
        // Of nine boxes both groups multiply the fifth, which the second overwrites.
        const u64 keys = tile_descriptor(tile + group * (BOXES / 2) * BOX, 16);
#pragma unroll
        for (int n = 0; n < (BOXES + 1) / 2 * 4; ++n) {
            if (n == EARLY * 4) {
                wgmma_commit();
                copies_wait<2>();
                fence_engines();
                __syncthreads();
                wgmma_fence();
            }
            wgmma_ss<__half, 32>(s, further(keys, n / 4 * BOX + n % 4 * 32),
                                 further(of_queries, n / 4 * Q_BOX + n % 4 * 32),
                                 n == 0 ? 0 : BOXES % 2 && n == 4 ? group == 0 : 1);
        }
        wgmma_commit();
        wgmma_wait<0>();
        wgmma_hold(s);
        float4 x[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float4 a = make_float4(s[4 * n], s[4 * n + 1], s[4 * n + 2], s[4 * n + 3]);
            const float4 b = make_float4(s[8 + 4 * n], s[9 + 4 * n], s[10 + 4 * n], s[11 + 4 * n]);
            halves[group ^ 1][n][threadIdx.x % 128] = group ? a : b;
            x[n] = group ? b : a;
        }
        __syncthreads();
        // Scores of keys `row` and row + 8 of this warp's 16, by n and key for two heads.
        const float bias[2] = {biases[stage][warp * 16 + row], biases[stage][warp * 16 + row + 8]};
        float y[2][2][2], top[2][2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float4 z = halves[group][n][threadIdx.x % 128];
            const float both[2][2] = {{x[n].x + z.x, x[n].y + z.y}, {x[n].z + z.z, x[n].w + z.w}};
#pragma unroll
            for (int e = 0; e < 2; ++e) {
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    y[n][r][e] = bias[r] == -INF ? -INF : fmaf(LOG2E, bias[r], both[r][e] * factor[n][e]);
                top[n][e] = fmaxf(y[n][0][e], y[n][1][e]);
            }
        }
#pragma unroll
        for (int by = 4; by < 32; by *= 2)
#pragma unroll
            for (int n = 0; n < 2; ++n)
#pragma unroll
                for (int e = 0; e < 2; ++e)
                    top[n][e] = fmaxf(top[n][e], __shfl_xor_sync(~0u, top[n][e], by));
        if (row == 0)
#pragma unroll
            for (int n = 0; n < 2; ++n)
                *(float2 *)&tops[warp][mine + 8 * n] = make_float2(top[n][0], top[n][1]);
        warpgroup_sync(1 + group);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const float2 other = *(const float2 *)&tops[w][mine + 8 * n];
                top[n][0] = fmaxf(top[n][0], other.x), top[n][1] = fmaxf(top[n][1], other.y);
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                top[n][e] = fmaxf(top[n][e], m[n][e]);
                const float base = finite(top[n][e]), less = exp2_fast(m[n][e] - base);
                m[n][e] = top[n][e];
#pragma unroll
                for (int r = 0; r < 2; ++r) y[n][r][e] = exp2_fast(y[n][r][e] - base);
                l[n][e] = l[n][e] * less + (y[n][0][e] + y[n][1][e]);
                if (t > first && warp == 0 && row == 0) lost[mine + 8 * n + e] = less;
            }
        }
        u32 packed[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) packed[i] = pack2<__half>(y[i / 2][i % 2][0], y[i / 2][i % 2][1]);
        stmatrix_trans(to_weights, packed);
        if (t + 1 == last) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
                float z[2] = {l[n][0], l[n][1]};
#pragma unroll
                for (int by = 4; by < 32; by *= 2)
#pragma unroll
                    for (int e = 0; e < 2; ++e) z[e] += __shfl_xor_sync(~0u, z[e], by);
                if (row == 0) *(float2 *)&totals[warp][mine + 8 * n] = make_float2(z[0], z[1]);
            }
        }
        fence_engines();
        __syncthreads();
        if (t > first)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float2 less = *(const float2 *)&lost[8 * j + pair];
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int r = 0; r < 2; ++r)
                        sums[i][4 * j + 2 * r] *= less.x, sums[i][4 * j + 2 * r + 1] *= less.y;
            }
#pragma unroll
        for (int i = 0; i < 4; ++i) wgmma_hold(sums[i]);
        wgmma_fence();
        const u64 values = tile_descriptor(tile + (a.v_start / 64 + group * 4) * BOX, BOX);
        const u64 of_weights = tile_descriptor(at_p, 16);
#pragma unroll
        for (int n = 0; n < BN / 16; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                wgmma_columns(sums[i], further(values, i * BOX + n * 16 * 128),
                              further(of_weights, n * 32), n > 0 || t > first);
        wgmma_commit();
#pragma unroll
        for (int j = 0; j < 4; ++j) {  // of use for the last tile
            float total[2] = {};
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const float2 z = *(const float2 *)&totals[w][8 * j + pair];
                total[0] += z.x, total[1] += z.y;
            }
#pragma unroll
            for (int e = 0; e < 2; ++e) by[j][e] = total[e] == 0 ? 0 : 0.5f * reciprocal_fast(total[e]);
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < 4; ++i) wgmma_hold(sums[i]);
        if (t + 2 < last) __syncthreads();  // all have read the tile that is replaced
        fetch(t + 2);
    }

    const int limit = ratio - h0;  // heads that exist
    const long long number = part_index(a, i3, query, head_kv * ratio + h0, part);
    if (warp == 0 && row == 0)
#pragma unroll
        for (int n = 0; n < 2; ++n)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const int h = mine + 8 * n + e;
                const float total = (totals[0][h] + totals[1][h]) + (totals[2][h] + totals[3][h]);
                if (h < limit)
                    *part_stats(a, number + h * a.splits) = make_float2(m[n][e], total);
            }
    uint4 *to = (uint4 *)((__half *)a.parts + number * DV) + group * 32 + warp * 8 + row;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int h = 8 * j + pair + e;
            u32 y[4];
#pragma unroll
            for (int i = 0; i < 4; ++i)
                y[i] = pack2<__half>(sums[i][4 * j + e] * by[j][e], sums[i][4 * j + 2 + e] * by[j][e]);
            if (h < limit) to[h * a.splits * (DV / 8)] = make_uint4(y[0], y[1], y[2], y[3]);
        }
#endif
}

// The sum of a row's parts, in the order of splits. 64 threads load a part; all parts of 32 splits
// are on their way at once.
// grid: rows.
__global__ void __launch_bounds__(256, 3) list_combine(const __grid_constant__ Attention a) {
    constexpr int AHEAD = 8, GROUPS = 4;
    __shared__ __align__(16) float sums[GROUPS][DV];
    const int lane = threadIdx.x % 32, group = threadIdx.x / 64;
    const int row = blockIdx.x, head = row % a.heads, query = row / a.heads % a.n_q;
    const int i3 = row / a.heads / a.n_q;
    const float2 *const stats = part_stats(a, (long long)row * a.splits);
    const uint4 *const from =
        (const uint4 *)((const __half *)a.parts + (long long)row * a.splits * DV) + threadIdx.x % 64;
    float *const out = out_row(a, i3, query, head);
    // As overlap.cuh says, the next launch may start beside what wrote the parts.
    release_successor();
    wait_for_predecessor();
    const int splits = a.splits;
    const auto stat = [&](int s) { return s < splits ? stats[s] : make_float2(-INF, 0); };
    float sum[8] = {}, m = -INF, l = 0;
    float2 mine = stat(lane);
#pragma unroll 1
    for (int first = 0;;) {
        uint4 x[AHEAD];
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
            const int s = first + group + GROUPS * n;
            x[n] = s < splits ? from[s * (DV / 8)] : make_uint4(0, 0, 0, 0);
        }
        if (first == 0) {
            m = mine.x;
            for (int s = 32 + lane; s < splits; s += 32) m = fmaxf(m, stats[s].x);
#pragma unroll
            for (int i = 16; i; i /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
        }
        // The weights of the next 32 splits, one a lane.
        const float weight = mine.y * exp2_fast(mine.x - finite(m));
        l += weight;
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
            const float by = __shfl_sync(~0u, weight, group + GROUPS * n);
            const u32 words[4] = {x[n].x, x[n].y, x[n].z, x[n].w};
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                sum[2 * i] += by * __half2float(__ushort_as_half(words[i] & 0xFFFF));
                sum[2 * i + 1] += by * __half2float(__ushort_as_half(words[i] >> 16));
            }
        }
        first += GROUPS * AHEAD;
        if (first >= splits) break;
        mine = stat(first + lane);
    }
#pragma unroll
    for (int i = 16; i; i /= 2) l += __shfl_xor_sync(~0u, l, i);
    float4 *const to = (float4 *)(sums[group] + threadIdx.x % 64 * 8);
    to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
    to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
    __syncthreads();
    const float factor = 2 * row_end(a, i3, query, head, m, l, threadIdx.x == 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int column = threadIdx.x + 256 * i, p = place_of(column);
        const float y = ((sums[0][p] + sums[1][p]) + (sums[2][p] + sums[3][p])) * factor;
        out[column] = y;
    }
}
