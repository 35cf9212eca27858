// lightning_indexer of one token and top_k of its scores, for attention that reads the rows in any
// order: ids of the k largest, of equal scores the lower ids, not sorted, but the same in each run.
// @kernel choice<{__half|__nv_bfloat16|q8_0}, {32|64}>
// @kernel hot 90a choice<{__half|__nv_bfloat16|q8_0}, {32|64}>
//
// Two launches of one kernel, which share the memory of its module:
//   scores   as in indexer.cu; each block counts its scores in bins in shared memory, and adds its
//            counts to those of the row when it ends
//   choice   all blocks find the bin in which the k-th largest score is, by two reads of the
//            counts. A block has adjacent rows. It lists ids above the bin in a part of its own,
//            and keys in the bin with those of all blocks. The block that ends last puts the parts
//            together, compares the keys in the bin with each other, and clears the counts.
//
// A bin is a sign, six bits of exponent (2^-24 to 2^40) and seven of the fraction, so some 70 of
// 65,536 scores share the one that matters. If more than KEYS do, or fewer than k scores are above
// -inf, the last block alone finds the k-th largest by passes over the row, and lists ids in order.
//
// Counts never have to be cleared by a launch before: the memory starts as zeros, and the last
// block leaves zeros, as `arrived` wraps around to 0. A run that was broken off between the
// launches leaves counts of its own. The last block sees that they are too many, and does not rely
// on them.
//
// Traffic beside that of the scores: the row once, 2.1 KB of counts for each block, ids twice.
//
// Why not top_k: it is the work of 8 multiprocessors, 15,500 clocks, of which a sort takes a third.
// -inf is not counted: thousands of hidden rows would add to the same count.
#include "indexer_tiles.cuh"
#include "sort.cuh"

// Bins, those of a group, and groups: one for each thread.
constexpr int BINS = 1 << 14, GROUP = 32, GROUPS = BINS / GROUP;
// Threads; the most rows of a thread in `choice`; the most keys that are compared with each other.
constexpr int THREADS = 512, WARPS = THREADS / 32, ROUNDS = 4, KEYS = 512;
// The most blocks of `choice`.
constexpr int BLOCKS = 132;
static_assert(GROUPS == THREADS && KEYS == THREADS && BLOCKS <= THREADS, "one for each thread");

struct ScoreChoice {
    Indexer a;
    int *ids;
    u32 *parts;   // ids of each block above the bin, at its first row
    u32 *counts;  // .. how many
    Key *keys;    // in the bin
    int k, scoring, bins;  // bins: where they are in shared memory
};

// Counts of the row, of keys listed, of blocks that have ended. All are 0 between two runs.
__device__ u32 group_counts[GROUPS], listed_keys, arrived;
__device__ __align__(16) u32 bin_counts[BINS];

__device__ __forceinline__ bool counts(float x) { return x != __int_as_float(0xFF800000); }

// Bins have the order of scores.
__device__ __forceinline__ int bin_of(u32 order) {
    constexpr int LEAST = (127 - 24) << 23, HALF = BINS / 2;
    const bool negative = !(order >> 31);
    const int magnitude = (negative ? ~order : order) & 0x7FFFFFFF;
    const int step = min(max(magnitude - LEAST, 0) >> 16, HALF - 1);
    return negative ? HALF - 1 - step : HALF + step;
}

// Adds the block's counts, two in a word, to those of the row. A thread has a group.
__device__ __forceinline__ void add_counts(const u32 *bins) {
    const int group = threadIdx.x;
    u32 sum = 0;
#pragma unroll
    for (int i = 0; i < GROUP / 8; ++i) {
        const int at = (i + group / 2) % (GROUP / 8);  // threads differ, so that banks do
        const uint4 x = *(const uint4 *)(bins + group * (GROUP / 2) + at * 4);
        const u32 words[4] = {x.x, x.y, x.z, x.w};
        if (!(x.x | x.y | x.z | x.w)) continue;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const u32 count = words[n / 2] >> n % 2 * 16 & 0xFFFF;
            if (count) atomicAdd(&bin_counts[group * GROUP + at * 8 + n], count);
            sum += count;
        }
    }
    if (sum) atomicAdd(&group_counts[group], sum);
}

// What a block of `choice` shares.
struct Shared {
    u32 sums[WARPS], places[ROUNDS][WARPS], least, most;
    u32 total, group, before;  // scores counted; the group of the k-th largest, and scores above it
    u32 starts[BLOCKS], sizes[BLOCKS];
    Key keys[KEYS];
    bool last;
};

// The sum over all threads before this one; s.total becomes the sum over all.
__device__ __forceinline__ u32 sum_before(Shared &s, u32 x) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 upto = x;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
        const u32 below = __shfl_up_sync(~0u, upto, by);
        if (lane >= by) upto += below;
    }
    __syncthreads();  // the last sums have been read
    if (lane == 31) s.sums[warp] = upto;
    __syncthreads();
    const u32 other = lane < WARPS ? s.sums[lane] : 0;
    const u32 before = __reduce_add_sync(~0u, lane < warp ? other : 0);
    const u32 total = __reduce_add_sync(~0u, other);
    if (threadIdx.x == 0) s.total = total;
    return before + upto - x;
}

// The last block by itself: ids of the k largest, in order. `bin` may have the k-th largest, which
// is not in a higher one; negative: it is -inf; BINS: nothing is known.
__device__ __noinline__ void choose_alone(const ScoreChoice &c, Shared &s, int bin) {
    const float *row = (const float *)c.a.out;
    const int n = c.a.n_kv;
    const auto order = [&](int i) { return order_of(__ldcg(row + i)); };
    const auto total = [&](u32 x) {
        sum_before(s, x);
        __syncthreads();
        return s.total;
    };
    u32 low = 0x007FFFFF, high = low;  // of -inf
    if (bin >= 0) {
        low = ~0u, high = 0;
        for (int i = threadIdx.x; i < n; i += THREADS) {
            const u32 x = order(i);
            if (counts(row[i]) && bin_of(x) == bin) low = min(low, x), high = max(high, x);
        }
        if (threadIdx.x == 0) s.least = ~0u, s.most = 0;
        __syncthreads();
        atomicMin(&s.least, low), atomicMax(&s.most, high);
        __syncthreads();
        low = s.least, high = s.most;
        u32 many = 0;
        for (int i = threadIdx.x; i < n; i += THREADS) many += order(i) >= low;
        if (total(many) < c.k) low = 0, high = ~0u;
    }
    while (low < high) {  // the k-th largest is between them
        const u32 probe = low + (high - low) / 2 + 1;
        u32 many = 0;
        for (int i = threadIdx.x; i < n; i += THREADS) many += order(i) >= probe;
        if (total(many) >= c.k) low = probe;
        else high = probe - 1;
    }
    u32 many = 0;
    for (int i = threadIdx.x; i < n; i += THREADS) many += order(i) > low;
    const u32 above = total(many);
    u32 placed = 0, ties = above;  // ids above come first, those equal to it behind them
    for (int start = 0; start < n; start += THREADS) {
        const int i = start + threadIdx.x;
        const u32 x = i < n ? order(i) : 0;
        const u32 mine = (i < n && x > low) | (i < n && x == low) << 16;
        const u32 before = sum_before(s, mine);
        const u32 place = mine & 1 ? placed + (before & 0xFFFF) : ties + (before >> 16);
        if (mine && place < c.k) c.ids[place] = i;
        __syncthreads();
        placed += s.total & 0xFFFF, ties += s.total >> 16;
    }
}

__device__ __forceinline__ void choose(const ScoreChoice &c) {
    __shared__ Shared s;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = c.a.n_kv;
    const int chunk = (n + gridDim.x - 1) / gridDim.x;
    const int first = blockIdx.x * chunk, end = min(n, first + chunk);
    const float *row = (const float *)c.a.out;
    begin();
    float x[ROUNDS];
#pragma unroll
    for (int j = 0; j < ROUNDS; ++j) {
        const int i = first + j * THREADS + threadIdx.x;
        x[j] = i < end ? __ldcg(row + i) : __int_as_float(0xFF800000);
    }
    // Groups from the largest scores on.
    const u32 count = __ldcg(&group_counts[GROUPS - 1 - threadIdx.x]);
    const u32 start = sum_before(s, count);
    if (start < c.k && c.k <= start + count) s.group = GROUPS - 1 - threadIdx.x, s.before = start;
    __syncthreads();
    int bin = -1;           // of the k-th largest
    u32 above = s.total, equal = 0;  // scores in higher bins, and in this one
    if (s.total >= c.k) {
        const u32 mine = __ldcg(&bin_counts[s.group * GROUP + GROUP - 1 - lane]);
        u32 upto = mine;
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
            const u32 below = __shfl_up_sync(~0u, upto, by);
            if (lane >= by) upto += below;
        }
        const u32 before = s.before + upto - mine;
        const int at = __ffs(__ballot_sync(~0u, before < c.k && c.k <= before + mine)) - 1;
        bin = s.group * GROUP + GROUP - 1 - at;
        above = __shfl_sync(~0u, before, at), equal = __shfl_sync(~0u, mine, at);
    }
    const bool alone = bin < 0 || equal > KEYS;
    u32 higher[ROUNDS];  // of a warp, as bits
#pragma unroll
    for (int j = 0; j < ROUNDS; ++j) {
        const u32 order = order_of(x[j]);
        const int mine = counts(x[j]) ? bin_of(order) : -1;
        higher[j] = __ballot_sync(~0u, mine > bin && mine >= 0);
        if (lane == 0) s.places[j][warp] = __popc(higher[j]);
        if (!alone && mine == bin)
            c.keys[atomicAdd(&listed_keys, 1u) % KEYS] =
                (Key)~order << 32 | (unsigned)(first + j * THREADS + threadIdx.x);
    }
    __syncthreads();
    u32 size = 0;
#pragma unroll
    for (int j = 0; j < ROUNDS; ++j) {
        const u32 counts_of = lane < WARPS ? s.places[j][lane] : 0;
        const u32 place = size + __reduce_add_sync(~0u, lane < warp ? counts_of : 0) +
                          __popc(higher[j] & ((1u << lane) - 1));
        if (higher[j] >> lane & 1) c.parts[first + place] = first + j * THREADS + threadIdx.x;
        size += __reduce_add_sync(~0u, counts_of);
    }
    if (threadIdx.x == 0) c.counts[blockIdx.x] = size;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        s.last = atomicInc(&arrived, gridDim.x - 1) == gridDim.x - 1;
        __threadfence();
    }
    __syncthreads();
    if (!s.last) return;

    const u32 mine = threadIdx.x < gridDim.x ? __ldcg(c.counts + threadIdx.x) : 0;
    const u32 listed = alone ? equal : __ldcg(&listed_keys);
    if (!alone && threadIdx.x < equal) s.keys[threadIdx.x] = __ldcg(c.keys + threadIdx.x);
    const u32 before = sum_before(s, mine);
    if (threadIdx.x < BLOCKS) s.starts[threadIdx.x] = before, s.sizes[threadIdx.x] = mine;
    __syncthreads();
    const bool stale = s.total != above || listed != equal;
    if (alone || stale) {
        choose_alone(c, s, stale ? BINS : bin);
    } else {
        constexpr int EACH = (BLOCKS + WARPS - 1) / WARPS;
        u32 ids[EACH];
#pragma unroll
        for (int i = 0; i < EACH; ++i) {  // all loads start before the first is waited for
            const int b = warp + i * WARPS;
            if (b < gridDim.x && lane < s.sizes[b]) ids[i] = __ldcg(c.parts + b * chunk + lane);
        }
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int b = warp + i * WARPS;
            if (b >= gridDim.x) break;
            if (lane < s.sizes[b]) c.ids[s.starts[b] + lane] = ids[i];
            for (u32 j = lane + 32; j < s.sizes[b]; j += 32)
                c.ids[s.starts[b] + j] = __ldcg(c.parts + b * chunk + j);
        }
        if (threadIdx.x < equal) {
            const Key key = s.keys[threadIdx.x];
            u32 place = above;
            for (u32 j = 0; j < equal; ++j) place += s.keys[j] < key;
            if (place < c.k) c.ids[place] = (u32)key;
        }
    }
    group_counts[threadIdx.x] = 0;
    for (int i = threadIdx.x * 4; i < BINS; i += THREADS * 4)
        *(uint4 *)(bin_counts + i) = make_uint4(0, 0, 0, 0);
    if (threadIdx.x == 0) listed_keys = 0;
}

// grid: blocks.
template <class K, int N>
__global__ void __launch_bounds__(THREADS, 1) choice(const __grid_constant__ ScoreChoice c) {
    extern __shared__ __align__(1024) char memory[];
    if (!c.scoring) return choose(c);
    u32 *const bins = (u32 *)(memory + c.bins);
    for (int i = threadIdx.x * 4; i < BINS / 2; i += THREADS * 4)
        *(uint4 *)(bins + i) = make_uint4(0, 0, 0, 0);
    one_token<K, N>(c.a, memory, [&](float x) {
        const int bin = bin_of(order_of(x));
        if (counts(x)) atomicAdd(bins + bin / 2, 1u << bin % 2 * 16);
    });
    __syncthreads();
    add_counts(bins);
}
