// Ids of the k largest of long rows, largest first, equals by id: a bound, then a sort of what is
// above it.
// @kernel top_k<1>
// @kernel hot top_k<4>
// @kernel hot 90a 100a 120a top_k_cluster<{1|4}>
//
// A row is the work of one block, or where rows are few, of a cluster of 8. It is read twice.
//
// First, each thread takes the maxima of several groups of elements. The k-th largest maximum is a
// bound: k elements are at least that large, so the k-th largest element is too. With four times as
// many groups as k, only about a tenth more than k elements of a random row are above it. A
// histogram finds it, and counts a few thousand maxima instead of the row. Blocks of a cluster each
// take their share of k, and the least of their bounds.
//
// Then all elements above the bound are listed in shared memory, in any order, and sorted: one
// histogram puts them in bins, and those of a bin are compared with each other. Keys contain the
// id, so their order is unique and the result does not depend on that of the atomics. If the list
// has less than k elements, those equal to the bound follow in order of ids.
//
// The list has room for CAPACITY elements. If more are above the bound (only if they are in few
// groups, so their order has to follow that of threads), a binary search finds the k-th largest
// itself, and the row is listed again.
//
// Traffic: the row twice, the second time mostly from L2, and k ids.
//
// Designs that lost, by count: a histogram of the whole row has 20 times as many atomics, most of
// them in the same few bins (scores share exponents); a bitonic sort of 4096 keys moves 5 MB
// through shared memory, 20 us. The bitonic sort remains for lists with crowded bins.
#include "cluster.cuh"
#include "sort.cuh"

// Elements that a list holds; bins of a histogram. CAPACITY in top_k.py
constexpr int CAPACITY = 4096, BINS = 4096;
// Blocks of a cluster.
constexpr int CLUSTER = 8;
// The order of -inf, the least of all.
constexpr unsigned LOWEST = 0x007FFFFF;
// A bin with so few maxima is not divided further; one with more keys is not sorted by comparisons.
constexpr unsigned FEW = 64;

template <int BLOCKS> constexpr int THREADS = BLOCKS == 1 ? 512 : 1024;
template <int BLOCKS> constexpr int GROUPS = BLOCKS == 1 ? 16 : 4;

// The shared memory of a block (SHARED in top_k.py is its size).
struct Shared {
    Key lists[2][CAPACITY];
    unsigned bins[BINS];
    unsigned words[2][32], ties[32];
    unsigned bounds[CLUSTER], votes[2];
    unsigned size, total, start, all_ties;
    unsigned bin, before, count;
};

// V adjacent elements of a row at a time: "packs".
template <int V>
struct Row {
    const char* x;
    long long step;
    int packs;

    __device__ Pack<float, V> operator[](int i) const {
        return *(const Pack<float, V>*)(x + min(i, packs - 1) * step * V);
    }
};

// A block's part of the work on a row.
template <int BLOCKS, int V>
struct Choice {
    static constexpr int WARPS = THREADS<BLOCKS> / 32, T = THREADS<BLOCKS>;
    Shared& s;
    Row<V> row;
    unsigned k;
    int rank, lane, warp;
    // Packs of this warp, for all but the maxima.
    int first, end;

    __device__ Choice(Shared& s, const Row<V>& row, unsigned k, int rank)
        : s(s), row(row), k(k), rank(rank), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {
        const int each = (row.packs + 32 * BLOCKS * WARPS - 1) / (32 * BLOCKS * WARPS) * 32;
        first = min(row.packs, (rank * WARPS + warp) * each);
        end = min(row.packs, first + each);
    }

    __device__ __forceinline__ void sync_all() {
        if constexpr (BLOCKS > 1) cluster_sync();
        else __syncthreads();
    }

    // The least of `low` and the largest of `high` over the block.
    __device__ void range(unsigned& low, unsigned& high) {
        low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
        if (lane == 0) s.words[0][warp] = low, s.words[1][warp] = high;
        __syncthreads();
        low = __reduce_min_sync(~0u, lane < WARPS ? s.words[0][lane] : ~0u);
        high = __reduce_max_sync(~0u, lane < WARPS ? s.words[1][lane] : 0);
        __syncthreads();
    }

    __device__ void clear_bins() {
        for (int i = threadIdx.x; i < BINS; i += T) s.bins[i] = 0;
        __syncthreads();
    }

    // Counts become starts. Each thread has BINS / T bins in a row: calls see(bin, start, count).
    template <class See>
    __device__ void start_bins(See see) {
        constexpr int MINE = BINS / T;
        __syncthreads();
        unsigned counts[MINE], sum = 0;
#pragma unroll
        for (int i = 0; i < MINE; ++i) sum += counts[i] = s.bins[threadIdx.x * MINE + i];
        unsigned upto = sum;
#pragma unroll
        for (int by = 1; by < 32; by *= 2) {
            const unsigned below = __shfl_up_sync(~0u, upto, by);
            if (lane >= by) upto += below;
        }
        if (lane == 31) s.words[0][warp] = upto;
        __syncthreads();
        unsigned start = upto - sum + __reduce_add_sync(~0u, lane < warp ? s.words[0][lane] : 0);
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            const int bin = threadIdx.x * MINE + i;
            see(bin, start, counts[i]);
            s.bins[bin] = start;
            start += counts[i];
        }
        __syncthreads();
    }

    // How far to shift numbers up to `most` for bins.
    static __device__ int shift_for(unsigned most) {
        return max(0, 32 - __clz(most) - 12);
    }

    // At most the k-th largest of this block's maxima, and hardly less; LOWEST if fewer than k are
    // larger than that.
    __device__ unsigned bound_of(const unsigned (&maxima)[GROUPS<BLOCKS>], unsigned k) {
        unsigned low = ~0u, high = 0;
#pragma unroll
        for (unsigned x : maxima)
            if (x > LOWEST) low = min(low, x), high = max(high, x);
        range(low, high);
        if (high == 0) return LOWEST;
        unsigned most = high - low;
        for (int shift = shift_for(most);; shift = max(0, shift - 12)) {
            if (threadIdx.x == 0) s.count = 0;
            clear_bins();
#pragma unroll
            for (unsigned x : maxima)
                if (x > LOWEST && x <= high && high - x <= most)
                    atomicAdd(&s.bins[(high - x) >> shift], 1u);
            start_bins([&](int bin, unsigned start, unsigned count) {
                if (start < k && k <= start + count) s.bin = bin, s.before = start, s.count = count;
            });
            const unsigned count = s.count;
            if (count == 0) return LOWEST;
            high -= s.bin << shift, k -= s.before;
            most = min((1u << shift) - 1, high - LOWEST);
            if (shift == 0 || count <= FEW) return high - most;
            __syncthreads();
        }
    }

    // A bound from the maxima of groups: at least k elements of the row are no less.
    __device__ unsigned bound() {
        constexpr int ROUND = V == 4 ? 4 : 16;
        unsigned maxima[GROUPS<BLOCKS>];
#pragma unroll
        for (unsigned& x : maxima) x = LOWEST;
        // Adjacent packs go to the lanes of a warp, then to the next block.
        const int own = (warp * BLOCKS + rank) * 32 + lane;
        for (int start = own; start < row.packs; start += ROUND * BLOCKS * T) {
            Pack<float, V> x[ROUND];
#pragma unroll
            for (int j = 0; j < ROUND; ++j) x[j] = row[start + j * BLOCKS * T];
#pragma unroll
            for (int j = 0; j < ROUND; ++j)
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    unsigned& best = maxima[(j * V + v) % GROUPS<BLOCKS>];
                    if (start + j * BLOCKS * T < row.packs) best = max(best, order_of(x[j].v[v]));
                }
        }
        unsigned least = bound_of(maxima, (k + BLOCKS - 1) / BLOCKS);
        if constexpr (BLOCKS > 1) {
            if (threadIdx.x < BLOCKS) *in_block(&s.bounds[rank], threadIdx.x) = least;
            cluster_sync();
#pragma unroll
            for (int r = 0; r < BLOCKS; ++r) least = min(least, s.bounds[r]);
        }
        return least;
    }

    // The k-th largest, by binary search: the row is read 32 times.
    __device__ unsigned kth_largest() {
        unsigned largest = 0;
        for (int bit = 31; bit >= 0; --bit) {
            const unsigned probe = largest | 1u << bit;
            unsigned many = 0;
            for (int i = first + lane; i < end; i += 32) {
                const Pack<float, V> x = row[i];
#pragma unroll
                for (int v = 0; v < V; ++v) many += order_of(x.v[v]) >= probe;
            }
            many = __reduce_add_sync(~0u, many);
            if (lane == 0) s.words[0][warp] = many;
            __syncthreads();
            many = __reduce_add_sync(~0u, lane < WARPS ? s.words[0][lane] : 0);
            if constexpr (BLOCKS > 1) {
                if (threadIdx.x == 0) s.votes[bit % 2] = many;
                cluster_sync();
                many = 0;
                for (int r = 0; r < BLOCKS; ++r) many += *in_block(&s.votes[bit % 2], r);
            }
            if (many >= k) largest = probe;
            __syncthreads();
        }
        return largest;
    }

    // Lists the elements above `least`, those of all blocks in the first one; returns how many there
    // are. Counts the elements equal to it.
    __device__ unsigned collect(unsigned least) {
        constexpr int ROUND = V == 4 ? 4 : 8;
        unsigned equals = 0;
        for (int start = first; start < end; start += 32 * ROUND) {
            Pack<float, V> x[ROUND];
#pragma unroll
            for (int j = 0; j < ROUND; ++j) x[j] = row[start + 32 * j + lane];
#pragma unroll
            for (int j = 0; j < ROUND; ++j) {
                const int i = start + 32 * j + lane;
                unsigned hits[V], all = 0, before[V];
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    const unsigned order = order_of(x[j].v[v]);
                    hits[v] = __ballot_sync(~0u, i < end && order > least);
                    before[v] = all + __popc(hits[v] & ((1u << lane) - 1));
                    all += __popc(hits[v]);
                    equals += i < end && order == least;
                }
                if (all == 0) continue;
                unsigned base = lane == 0 ? atomicAdd(&s.size, all) : 0;
                base = __shfl_sync(~0u, base, 0);
#pragma unroll
                for (int v = 0; v < V; ++v)
                    if (hits[v] >> lane & 1 && base + before[v] < CAPACITY)
                        s.lists[0][base + before[v]] = sort_key(x[j].v[v], i * V + v, true);
            }
        }
        equals = __reduce_add_sync(~0u, equals);
        if (lane == 0) s.ties[warp] = equals;
        __syncthreads();
        if constexpr (BLOCKS == 1) return s.size;
        if (warp == 0) {
            equals = __reduce_add_sync(~0u, lane < WARPS ? s.ties[lane] : 0);
            if (lane == 0) s.all_ties = equals, s.start = atomicAdd(in_block(&s.total, 0), s.size);
        }
        __syncthreads();
        const unsigned size = min(s.size, (unsigned)CAPACITY), start = s.start;
        Key* list = in_block(s.lists[1], 0);
        for (unsigned i = threadIdx.x; i < size && start + i < CAPACITY; i += T)
            list[start + i] = s.lists[0][i];
        cluster_sync();
        return *in_block(&s.total, 0);
    }

    // put(place, id) for the first `many` elements equal to `least`.
    template <class Put>
    __device__ void put_ties(unsigned least, unsigned many, Put put) {
        unsigned before = __reduce_add_sync(~0u, lane < warp ? s.ties[lane] : 0);
        if constexpr (BLOCKS > 1)
            before += __reduce_add_sync(~0u, lane < rank ? *in_block(&s.all_ties, lane % BLOCKS) : 0);
        for (int start = first; start < end && before < many; start += 32) {
            const int i = start + lane;
            const Pack<float, V> x = row[i];
            unsigned place = before;
            bool equal[V];
#pragma unroll
            for (int v = 0; v < V; ++v) {
                equal[v] = i < end && order_of(x.v[v]) == least;
                const unsigned all = __ballot_sync(~0u, equal[v]);
                place += __popc(all & ((1u << lane) - 1));
                before += __popc(all);
            }
#pragma unroll
            for (int v = 0; v < V; ++v) {
                if (!equal[v]) continue;
                if (place < many) put(place, i * V + v);
                ++place;
            }
        }
    }

    // put(place, id) for the k first of a list in order.
    template <class Put>
    __device__ void put_sorted(Key* from, Key* to, int size, Put put) {
        unsigned low = ~0u, high = 0;
        for (int i = threadIdx.x; i < size; i += T) {
            const unsigned x = from[i] >> 32;
            low = min(low, x), high = max(high, x);
        }
        range(low, high);
        const int shift = shift_for(high - low);
        const auto bin_of = [&](Key key) { return (unsigned)(key >> 32) - low >> shift; };
        clear_bins();
        for (int i = threadIdx.x; i < size; i += T) atomicAdd(&s.bins[bin_of(from[i])], 1u);
        unsigned most = 0, least = ~0u;
        start_bins([&](int, unsigned, unsigned count) { most = max(most, count); });
        range(least, most);
        if (most > FEW) {
            int padded = 2;
            while (padded < size) padded *= 2;
            for (int i = size + threadIdx.x; i < padded; i += T) from[i] = LAST_KEY;
            sort_shared(from, padded, 0);
            for (int i = threadIdx.x; i < min(size, (int)k); i += T) put(i, (int)(unsigned)from[i]);
            return;
        }
        for (int i = threadIdx.x; i < size; i += T) {
            const Key key = from[i];
            to[atomicAdd(&s.bins[bin_of(key)], 1u)] = key;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < size; i += T) {
            const Key key = to[i];
            const unsigned bin = bin_of(key), end = s.bins[bin];  // a start became its bin's end
            unsigned place = bin ? s.bins[bin - 1] : 0;
            for (unsigned j = place; j < end; ++j) place += to[j] < key;
            if (place < k) put(place, (int)(unsigned)key);
        }
    }

    template <class Put>
    __device__ void choose(Put put) {
        if (threadIdx.x == 0) s.size = 0, s.total = 0;
        unsigned least = bound();  // with barriers between
        unsigned size = collect(least);
        if (size > CAPACITY) {
            least = kth_largest();
            if (threadIdx.x == 0) s.size = 0, s.total = 0;
            sync_all();
            size = collect(least);
        }
        if (size < k)
            put_ties(least, k - size, [&](unsigned place, int id) { put(size + place, id); });
        if (rank == 0) {
            constexpr int from = BLOCKS > 1;
            put_sorted(s.lists[from], s.lists[1 - from], size, put);
        }
        if constexpr (BLOCKS > 1) cluster_sync();
    }
};

template <int BLOCKS, int V>
__device__ __forceinline__ void choose(Shared& s, const Tensor& out, const Tensor& a) {
    const int number = blockIdx.x / BLOCKS, i1 = number % a.ne[1], rest = number / a.ne[1];
    const int i2 = rest % a.ne[2], i3 = rest / a.ne[2];
    const Row<V> row = {(const char*)a.row<float>(i1, i2, i3), a.nb[0], a.ne[0] / V};
    char* ids = (char*)out.row<int>(i1, i2, i3);
    Choice<BLOCKS, V>(s, row, out.ne[0], blockIdx.x % BLOCKS).choose([&](unsigned place, int id) {
        *(int*)(ids + place * out.nb[0]) = id;
    });
}

// grid: rows.
template <int V>
__global__ void __launch_bounds__(THREADS<1>, 2) top_k(Tensor out, Tensor a) {
    begin();
    extern __shared__ __align__(16) char memory[];
    choose<1, V>(*(Shared*)memory, out, a);
}

#if __CUDA_ARCH__ >= 900
// grid: rows times CLUSTER.
template <int V>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS<CLUSTER>, 1)
    top_k_cluster(Tensor out, Tensor a) {
    cluster_sync();  // the other blocks have started, so their memory can be written
    begin();
    extern __shared__ __align__(16) char memory[];
    choose<CLUSTER, V>(*(Shared*)memory, out, a);
}
#endif
