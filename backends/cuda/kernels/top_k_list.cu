// Ids of the k largest of a long row in no order, but in the same one in each run: for lists that
// attention reads. Few rows; of equals the first.
// @kernel hot top_k_list<{1|4}>
// @kernel hot 90a 100a 120a top_k_list_cluster<{2|4|12}>
//
// A row is the work of a block, or of a cluster of 8, each of which keeps its part in registers. They
// count elements in bins between two numbers, tell each other, and so each knows the bin of the k-th,
// what is above it, and where to write its own. Only those in that bin are compared with each other.
// If there are too many of them, they are counted again in finer bins.
//
// The bins end at the largest of a sample, and begin at the least of the maxima of its groups, whose
// size makes a few times k elements larger than that. The sample only decides how often blocks count.
//
// Counts and elements go to other blocks by stores that complete an mbarrier there, 1,000 clocks. A
// barrier of the cluster waits for all stores to global memory too: with the stores, 1,900.
//
// Traffic: the row once, k ids.
//
// Designs that lost, 65,536 on an H100, in thousands of clocks from the wait to the end, here 10.8:
// top_k.cu, which lists and sorts, 15.5; barriers of the cluster and 1,024 threads 13.4; elements in
// shared memory and short loops of 256 threads 16.5, even where the code had run once before.
#include "cluster.cuh"
#include "mma.cuh"
#include "sort.cuh"

constexpr int CLUSTER = 8, T = 512, WARPS = T / 32, SAMPLE = 1024;
// Bins, and the most elements that are compared with each other. Threads are at least as many.
constexpr int BITS = 8, BINS = 1 << BITS, MOST = 256;
constexpr unsigned NONE = ~0u, LOWEST = 0x007FFFFF;  // no bin; the order of -inf, the least of all

// The bin of the k-th, or NONE; elements above it, and in it; how many of them lower blocks have.
struct Found {
    unsigned bin, before, count, above_lower, in_lower;
};
// The shared memory of a block (SHARED in top_k.py is its size). Other blocks write `counts`, two in a
// word, every other turn, and the first block's `ties`, and complete `arrived`.
struct State {
    unsigned counts[2][CLUSTER][BINS / 2];
    Key ties[MOST];
    unsigned bins[BINS];
    unsigned words[2][32];
    u64 arrived[3];
    Found found[2];
    unsigned all, all_lower;
};

// A block's part of the work on a row; elements are their orders, see sort.cuh.
template <int BLOCKS, int N>
struct Part {
    static constexpr int SAMPLES = SAMPLE / T;
    State &s;
    const char *row;
    long long step;
    int packs, each, rank, lane, warp;
    unsigned x[N][4];

    // Pack j of a thread, of the row.
    __device__ int pack(int j) const { return rank * each + j * T + threadIdx.x; }

    __device__ void load() {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const int own = j * T + threadIdx.x;
            const bool there = own < each && pack(j) < packs;
            const Pack<float, 4> raw = *(const Pack<float, 4> *)(row + (there ? pack(j) : 0) * 16ll);
#pragma unroll
            for (int v = 0; v < 4; ++v) x[j][v] = there ? __float_as_uint(raw.v[v]) : ~0u;
        }
    }
    // Where there is no element, the order is that of none: 0.
    __device__ void order() {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const bool there = j * T + threadIdx.x < each && pack(j) < packs;
#pragma unroll
            for (int v = 0; v < 4; ++v) x[j][v] = there ? order_of(__uint_as_float(x[j][v])) : 0;
        }
    }

    // Sums of two numbers over lower threads, and over all in the last one. With a barrier.
    __device__ void before_this(unsigned (&sums)[2]) {
        unsigned upto[2] = {sums[0], sums[1]};
#pragma unroll
        for (int by = 1; by < 32; by *= 2)
#pragma unroll
            for (unsigned &sum : upto) {
                const unsigned below = __shfl_up_sync(~0u, sum, by);
                if (lane >= by) sum += below;
            }
        if (lane == 31) s.words[0][warp] = upto[0], s.words[1][warp] = upto[1];
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 2; ++i)
            sums[i] = upto[i] - sums[i] + __reduce_add_sync(~0u, lane < warp ? s.words[i][lane] : 0);
    }

    // Counts the elements from `low` to `high` of all blocks. Their bins are `base` and above, then
    // (base - y) >> shift.
    __device__ Found find(unsigned low, unsigned high, unsigned base, int shift, unsigned k, int turn) {
        Found &found = s.found[turn % 2];
        u64 *const arrived = s.arrived + turn % 2;
        if (threadIdx.x == 0) found.bin = NONE;
        if (BLOCKS > 1 && threadIdx.x == 0) barrier_expect(arrived, BLOCKS * BINS * 2);
#pragma unroll
        for (int j = 0; j < N; ++j)
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                const unsigned y = x[j][v], bin = y >= base ? 0 : (base - y) >> shift;
                if (y >= low && y <= high) atomicAdd(&s.bins[bin], 1u);
            }
        __syncthreads();
        const bool mine = threadIdx.x < BINS;
        if (BLOCKS > 1 && warp < BLOCKS) {  // each warp tells one block, each lane of eight bins
            const uint4 a = ((const uint4 *)s.bins)[2 * lane], b = ((const uint4 *)s.bins)[2 * lane + 1];
            const uint4 all = {a.x | a.y << 16, a.z | a.w << 16, b.x | b.y << 16, b.z | b.w << 16};
            send(&s.counts[turn % 2][rank][4 * lane], warp, all, arrived);
        }
        unsigned all = BLOCKS == 1 && mine ? s.bins[threadIdx.x] : 0, lower = 0;
        if constexpr (BLOCKS > 1) {
            barrier_wait(arrived, turn / 2 & 1);
#pragma unroll
            for (int r = 0; r < BLOCKS; ++r) {
                const unsigned many = mine ? ((const unsigned short *)s.counts[turn % 2][r])[threadIdx.x] : 0;
                all += many, lower += r < rank ? many : 0;
            }
        }
        unsigned before[2] = {all, lower};
        before_this(before);
        if (mine) s.bins[threadIdx.x] = 0;
        if (before[0] < k && k <= before[0] + all)
            found = {threadIdx.x, before[0], all, before[1], lower};
        if (threadIdx.x == T - 1) s.all = before[0] + all, s.all_lower = before[1] + lower;
        __syncthreads();
        return found;
    }

    // put(place, id) for the k largest: those above the bin of the k-th in the order of blocks and
    // threads, then those in it in order.
    template <class Put>
    __device__ __forceinline__ void list(unsigned k, int n, Put put) {
        unsigned y[SAMPLES];
#pragma unroll
        for (int i = 0; i < SAMPLES; ++i)
            y[i] = __float_as_uint(*(const float *)(row + ((int)threadIdx.x + i * T) * (n / SAMPLE) * step));
        load();
        // Whether groups of so many are likely to have an element of the k largest each.
        const auto good = [&](int size) { return size * (int)k * 3 <= n * 5; };
        unsigned base = 0, low = ~0u;
#pragma unroll
        for (unsigned &z : y) z = order_of(__uint_as_float(z)), base = max(base, z);
        if (good(SAMPLES)) {
            low = base;
#pragma unroll
            for (int by = 1; by < 32 / SAMPLES; by *= 2) {
                const unsigned other = __shfl_xor_sync(~0u, low, by);
                if (good(2 * SAMPLES * by)) low = max(low, other);
            }
        } else {
#pragma unroll
            for (unsigned z : y) low = min(low, z);
        }
        low = __reduce_min_sync(~0u, low), base = __reduce_max_sync(~0u, base);
        if (lane == 0) s.words[0][warp] = low, s.words[1][warp] = base;
        order();
        __syncthreads();
        low = __reduce_min_sync(~0u, s.words[0][lane % WARPS]);
        base = __reduce_max_sync(~0u, s.words[1][lane % WARPS]);

        unsigned high = ~0u, before = 0, above_lower = 0, nth = k;
        Found found;
#pragma unroll 1
        for (int turn = 0;; ++turn) {
            const int shift = max(0, 32 - __clz(base - low) - BITS);
            found = find(low, high, base, shift, nth, turn);
            if (found.bin == NONE) {  // all of these are among the k largest
                before += s.all, above_lower += s.all_lower, nth -= s.all;
                high = base = low - 1, low = LOWEST;
                continue;
            }
            before += found.before, above_lower += found.above_lower, nth -= found.before;
            low = max(low, base - min(base, (found.bin << shift) + ((1u << shift) - 1)));
            if (found.bin) high = base - (found.bin << shift);
            base = high;
            if (found.count <= MOST || low == high) break;
        }

        // Elements as bits: those above, and those in the bin.
        constexpr int WORDS = (4 * N + 31) / 32;
        unsigned above[WORDS] = {}, equal[WORDS] = {}, sums[2] = {};
#pragma unroll
        for (int i = 0; i < 4 * N; ++i) {
            const unsigned z = x[i / 4][i % 4];
            if (z > high) above[i / 32] |= 1u << i % 32;
            else if (z >= low) equal[i / 32] |= 1u << i % 32;
        }
#pragma unroll
        for (int w = 0; w < WORDS; ++w) sums[0] += __popc(above[w]), sums[1] += __popc(equal[w]);
        before_this(sums);
        unsigned place = above_lower + sums[0], tie = found.in_lower + sums[1];
        if (found.count > MOST) {  // equals: the first are chosen
            each_of(above, [&](int id) { put(place++, id); });
            put_first(equal, found.in_lower, nth, [&](unsigned i, int id) { put(before + i, id); });
            return;
        }
        u64 *const arrived = s.arrived + 2;
        if (BLOCKS > 1 && rank == 0 && threadIdx.x == 0)
            barrier_expect(arrived, found.count * (unsigned)sizeof(Key));
        each_of(equal, [&](int id) {
            const Key key = sort_key(*(const float *)(row + id * step), id, true);
            if constexpr (BLOCKS > 1) send(&s.ties[tie++], 0, key, arrived);
            else s.ties[tie++] = key;
        });
        each_of(above, [&](int id) { put(place++, id); });
        if (rank) return;
        if constexpr (BLOCKS > 1) barrier_wait(arrived, 0);
        else __syncthreads();
        // Two threads for each element, or eight if they suffice, compare it with the others.
        static_assert(T == 2 * MOST, "two threads for each of the most elements");
        const int shift = found.count <= T / 8 ? 3 : 1, each = 1 << shift;
        const unsigned own = threadIdx.x >> shift, share = threadIdx.x & (each - 1);
        const Key key = s.ties[own];
        unsigned less = 0;
#pragma unroll 4
        for (unsigned j = share; j < found.count; j += each) less += s.ties[j] < key;
        for (int by = 1; by < each; by *= 2) less += __shfl_xor_sync(~0u, less, by);
        if (own < found.count && less < nth && share == 0) put(before + less, (int)(unsigned)key);
    }

    // see(id) for each element of this thread that is marked.
    template <int WORDS, class See>
    __device__ __forceinline__ void each_of(const unsigned (&marks)[WORDS], See see) {
#pragma unroll
        for (int w = 0; w < WORDS; ++w)
#pragma unroll 1
            for (unsigned bits = marks[w]; bits; bits &= bits - 1) {
                const int i = w * 32 + __ffs(bits) - 1;
                see(pack(i / 4) * 4 + i % 4);
            }
    }

    // put(place, id) for the first `many` of the elements that `equal` marks, of which lower blocks have
    // `place`.
    template <int WORDS, class Put>
    __device__ void put_first(const unsigned (&equal)[WORDS], unsigned place, unsigned many, Put put) {
#pragma unroll 1
        for (int j = 0; j < N; ++j) {
            unsigned bits = 0;
#pragma unroll
            for (int w = 0; w < WORDS; ++w)
                if (w == j / 8) bits = equal[w] >> j % 8 * 4 & 15;
            unsigned sums[2] = {(unsigned)__popc(bits), 0};
            __syncthreads();
            before_this(sums);
            for (unsigned i = place + sums[0]; bits; bits &= bits - 1, ++i)
                if (i < many) put(i, pack(j) * 4 + __ffs(bits) - 1);
            place += __reduce_add_sync(~0u, lane < WARPS ? s.words[0][lane] : 0);
        }
    }
};

template <int BLOCKS, int N>
__device__ __forceinline__ void list(const Tensor &out, const Tensor &a) {
    extern __shared__ __align__(16) char memory[];
    State &s = *(State *)memory;
    const int number = blockIdx.x / BLOCKS, i1 = number % a.ne[1], rest = number / a.ne[1];
    const int i2 = rest % a.ne[2], i3 = rest / a.ne[2], packs = a.ne[0] / 4;
    char *const ids = (char *)out.row<int>(i1, i2, i3);
    Part<BLOCKS, N> part = {s, (const char *)a.row<float>(i1, i2, i3), a.nb[0], packs,
                            (packs + BLOCKS - 1) / BLOCKS, int(blockIdx.x % BLOCKS), int(threadIdx.x % 32),
                            int(threadIdx.x / 32)};
    if (threadIdx.x < BINS) s.bins[threadIdx.x] = 0;
    if constexpr (BLOCKS > 1) {
        if (threadIdx.x < 3) barrier_init(s.arrived + threadIdx.x, 1);
        fence_barriers();
        cluster_sync();  // the other blocks have started, and their barriers are there
    }
    begin();
    part.list(out.ne[0], a.ne[0], [&](unsigned place, int id) { *(int *)(ids + place * out.nb[0]) = id; });
}

// grid: rows.
template <int N>
__global__ void __launch_bounds__(T, 1) top_k_list(Tensor out, Tensor a) {
    list<1, N>(out, a);
}
#if __CUDA_ARCH__ >= 900
// grid: rows times CLUSTER.
template <int N>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(T, 1) top_k_list_cluster(Tensor out, Tensor a) {
    list<CLUSTER, N>(out, a);
}
#endif
