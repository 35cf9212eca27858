// Ids of the k largest of long rows, largest first, equals by id: a bound, then a sort of what is
// above it.
// @kernel top_k<{1|4}>
// @kernel 90a 100a 120a top_k_cluster<1, 8>
// @kernel hot 90a 100a 120a top_k_cluster<4, {2|6}>
//
// A row is the work of one block, or where rows are few, of a cluster of 8.
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
// Traffic: the row once if it fits in registers, else twice, the second time mostly from L2; k ids.
// A single row takes the time of instructions: 32 warps share a multiprocessor. In thousands of clocks:
// row and maxima 2.9, bound 2.0, bounds of other blocks 1.9, list 4.1, sort 4.6 (65,536, H100).
//
// Designs that lost. By count: a histogram of the whole row has 20 times as many atomics, most of
// them in the same few bins (scores share exponents); a bitonic sort of 4096 keys moves 5 MB
// through shared memory, 20 us. The bitonic sort remains for lists with crowded bins. Measured on an
// H100, 2,048 of 65,536 and of 163,840: 75 and 114 us for a bitonic sort of the row; 13.4 and 16.7 us
// where each block made a list of its own, counted ties on the way and read the row again; 10.2 and
// 10.6 us with room for 24 elements a thread in any row; 9.0 us for 65,536 with room for 8. One atomic a
// block in place of one a warp for the places in the list: 0.3 us more.
#include "cluster.cuh"
#include "sort.cuh"

// Elements that a list holds, and bits of a bin's number when it is sorted.
constexpr int CAPACITY = 4096, SORT_BITS = 12;
// Blocks of a cluster.
constexpr int CLUSTER = 8;
// The order of -inf, the least of all.
constexpr unsigned LOWEST = 0x007FFFFF;
// A bin with so few maxima is not divided further; one with more keys is not sorted by comparisons.
constexpr unsigned FEW = 64;

template <int BLOCKS> constexpr int THREADS = BLOCKS == 1 ? 512 : 1024;
template <int BLOCKS> constexpr int GROUPS = BLOCKS == 1 ? 16 : 4;
template <int BLOCKS> constexpr int BOUND_BITS = BLOCKS == 1 ? 11 : 10;

// The shared memory of a block (SHARED in top_k.py is its size).
struct Shared {
    Key lists[2][CAPACITY];
    alignas(16) unsigned bins[1 << SORT_BITS];
    unsigned words[2][32], ties[32];
    unsigned bounds[CLUSTER], highs[CLUSTER], votes[2];
    unsigned size, all_ties, crowded, bin, before, count;
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

// A block's part of the work on a row. In names and comments, elements are their orders. A thread
// loads N packs of V elements at once; if that is the whole row, it keeps them.
template <int BLOCKS, int V, int N>
struct Choice {
    static constexpr int T = THREADS<BLOCKS>, WARPS = T / 32;
    static constexpr int STRIDE = BLOCKS * T;  // from one pack of a thread to the next
    Shared& s;
    Row<V> row;
    unsigned k;
    int rank, lane, warp, own;
    unsigned x[N][V], high;

    __device__ Choice(Shared& s, const Row<V>& row, unsigned k, int rank)
        : s(s), row(row), k(k), rank(rank), lane(threadIdx.x % 32), warp(threadIdx.x / 32),
          // Adjacent packs go to the lanes of a warp, then to the next block.
          own((warp * BLOCKS + rank) * 32 + lane) {}

    __device__ __forceinline__ void sync_all() {
        if constexpr (BLOCKS > 1) cluster_sync();
        else __syncthreads();
    }

    // Loads packs from `start` on to `x`. Where there is none, elements are below all others: 0.
    __device__ __forceinline__ void load(int start) {
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (start - lane + j * STRIDE < row.packs) {
                const Pack<float, V> raw = row[start + j * STRIDE];
#pragma unroll
                for (int v = 0; v < V; ++v) x[j][v] = __float_as_uint(raw.v[v]);
            }
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const bool there = start + j * STRIDE < row.packs;
#pragma unroll
            for (int v = 0; v < V; ++v) x[j][v] = there ? order_of(__uint_as_float(x[j][v])) : 0;
        }
    }
    // Calls see(first pack) for each round, with its elements in `x`. Those of a single round stay
    // there. All threads of a block have as many rounds.
    template <class See>
    __device__ __forceinline__ void rounds(See see) {
        if (row.packs <= N * STRIDE) return see(own);
        for (int start = own; start - lane - warp * BLOCKS * 32 < row.packs; start += N * STRIDE) {
            load(start);
            see(start);
        }
    }

    // The least of `low` and the largest of `high` over the block.
    __device__ void range(unsigned& low, unsigned& high) {
        low = __reduce_min_sync(~0u, low), high = __reduce_max_sync(~0u, high);
        if (lane == 0) s.words[0][warp] = low, s.words[1][warp] = high;
        __syncthreads();
        low = __reduce_min_sync(~0u, lane < WARPS ? s.words[0][lane] : ~0u);
        high = __reduce_max_sync(~0u, lane < WARPS ? s.words[1][lane] : 0);
    }

    template <int BITS>
    __device__ __forceinline__ void clear_bins() {
        for (int i = threadIdx.x; i < 1 << BITS; i += T) s.bins[i] = 0;
    }

    // Counts become starts. Each thread has MINE bins in a row: calls see(bin, start, count).
    template <int BITS, class See>
    __device__ __forceinline__ void start_bins(See see) {
        constexpr int MINE = (1 << BITS) / T, WIDTH = MINE % 4 ? MINE : 4;
        using Words = Pack<unsigned, WIDTH>;
        __syncthreads();
        unsigned counts[MINE], sum = 0;
#pragma unroll
        for (int i = 0; i < MINE; i += WIDTH) {
            const Words x = *(const Words*)&s.bins[threadIdx.x * MINE + i];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) sum += counts[i + j] = x.v[j];
        }
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
        for (int i = 0; i < MINE; i += WIDTH) {
            Words x;
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                see(threadIdx.x * MINE + i + j, start, counts[i + j]);
                x.v[j] = start;
                start += counts[i + j];
            }
            *(Words*)&s.bins[threadIdx.x * MINE + i] = x;
        }
        __syncthreads();
    }

    // How far to shift numbers up to `most` to have `bits`.
    static __device__ int shift_for(unsigned most, int bits) { return max(0, 32 - __clz(most) - bits); }

    // At most the k-th largest of this block's maxima, and hardly less; LOWEST if fewer than k are
    // larger than that. `high` becomes the largest of all.
    __device__ unsigned bound_of(const unsigned (&maxima)[GROUPS<BLOCKS>], unsigned k) {
        constexpr int BITS = BOUND_BITS<BLOCKS>;
        // Sets of maxima, at least k: the least of their largest has k maxima above it.
        unsigned low = ~0u;
#pragma unroll
        for (int i = 0; i < GROUPS<BLOCKS>; i += 4) {
            unsigned largest = max(max(maxima[i], maxima[i + 1]), max(maxima[i + 2], maxima[i + 3]));
            high = max(high, largest);
            if constexpr (BLOCKS > 1) {
                largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
                largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
            }
            low = min(low, largest);
        }
        clear_bins<BITS>();
        if (threadIdx.x == 0) s.count = 0;
        range(low, high);
        if (high <= LOWEST) return LOWEST;
        if (low <= LOWEST) {
            low = ~0u;
#pragma unroll
            for (unsigned y : maxima)
                if (y > LOWEST) low = min(low, y);
            __syncthreads();
            range(low, high);
        }
        unsigned top = high, most = high - low;
        for (int shift = shift_for(most, BITS);; shift = max(0, shift - BITS)) {
#pragma unroll
            for (unsigned y : maxima)
                if (y <= top && top - y <= most) atomicAdd(&s.bins[(top - y) >> shift], 1u);
            start_bins<BITS>([&](int bin, unsigned start, unsigned count) {
                if (start < k && k <= start + count) s.bin = bin, s.before = start, s.count = count;
            });
            const unsigned count = s.count;
            if (count == 0) return LOWEST;
            top -= s.bin << shift, k -= s.before;
            most = min((1u << shift) - 1, top - LOWEST);
            if (shift == 0 || count <= FEW) return top - most;
            clear_bins<BITS>();
            __syncthreads();
        }
    }

    // A bound from the maxima of groups: at least k elements of the row are no less.
    __device__ unsigned bound() {
        unsigned maxima[GROUPS<BLOCKS>];
#pragma unroll
        for (unsigned& y : maxima) y = LOWEST;
        load(own);
        rounds([&](int) {
#pragma unroll
            for (int j = 0; j < N; ++j)
#pragma unroll
                for (int v = 0; v < V; ++v) {
                    unsigned& best = maxima[(j * V + v) % GROUPS<BLOCKS>];
                    best = max(best, x[j][v]);
                }
        });
        high = 0;
        unsigned least = bound_of(maxima, (k + BLOCKS - 1) / BLOCKS);
        clear_bins<SORT_BITS>();
        if constexpr (BLOCKS > 1) {
            if (threadIdx.x < BLOCKS) {
                *in_block(&s.bounds[rank], threadIdx.x) = least;
                *in_block(&s.highs[rank], threadIdx.x) = high;
            }
            cluster_sync();
#pragma unroll
            for (int r = 0; r < BLOCKS; ++r) least = min(least, s.bounds[r]), high = max(high, s.highs[r]);
        }
        return least;
    }

    // The sum over the row's blocks.
    __device__ unsigned total(unsigned sum, int vote) {
        sum = __reduce_add_sync(~0u, sum);
        if (lane == 0) s.words[0][warp] = sum;
        __syncthreads();
        sum = __reduce_add_sync(~0u, lane < WARPS ? s.words[0][lane] : 0);
        if constexpr (BLOCKS > 1) {
            if (threadIdx.x == 0) s.votes[vote] = sum;
            cluster_sync();
            sum = 0;
            for (int r = 0; r < BLOCKS; ++r) sum += *in_block(&s.votes[vote], r);
        }
        __syncthreads();
        return sum;
    }

    // The k-th largest, by binary search: a pass over the row for each of 32 bits.
    __device__ unsigned kth_largest() {
        unsigned largest = 0;
        for (int bit = 31; bit >= 0; --bit) {
            const unsigned probe = largest | 1u << bit;
            unsigned many = 0;
            rounds([&](int) {
#pragma unroll
                for (int j = 0; j < N; ++j)
#pragma unroll
                    for (int v = 0; v < V; ++v) many += x[j][v] >= probe;
            });
            if (total(many, bit % 2) >= k) largest = probe;
        }
        return largest;
    }

    // Lists the elements above `least` in the first block; returns how many there are.
    __device__ unsigned collect(unsigned least) {
        unsigned* const size = in_block(&s.size, 0);
        Key* const list = in_block(s.lists[0], 0);
        rounds([&](int start) {
            unsigned many = 0;
#pragma unroll
            for (int j = 0; j < N; ++j)
#pragma unroll
                for (int v = 0; v < V; ++v) many += x[j][v] > least;
            unsigned upto = many;
#pragma unroll
            for (int by = 1; by < 32; by *= 2) {
                const unsigned below = __shfl_up_sync(~0u, upto, by);
                if (lane >= by) upto += below;
            }
            unsigned base = 0;
            if (lane == 31 && upto) base = atomicAdd(size, upto);
            unsigned place = __shfl_sync(~0u, base, 31) + upto - many;
            if (many == 0) return;
#pragma unroll
            for (int j = 0; j < N; ++j)
#pragma unroll
                for (int v = 0; v < V; ++v)
                    if (x[j][v] > least) {
                        const unsigned id = (start + j * STRIDE) * V + v;
                        if (place < CAPACITY) list[place] = (Key)~x[j][v] << 32 | id;
                        ++place;
                    }
        });
        sync_all();
        return *size;
    }

    // put(place, id) for the first `many` elements equal to `least`. Here each warp has packs that
    // follow one another, so that places follow ids.
    template <class Put>
    __device__ void put_ties(unsigned least, unsigned many, Put put) {
        const int each = (row.packs + 32 * BLOCKS * WARPS - 1) / (32 * BLOCKS * WARPS) * 32;
        const int first = min(row.packs, (rank * WARPS + warp) * each);
        const int end = min(row.packs, first + each);
        unsigned equals = 0;
        for (int i = first + lane; i < end; i += 32) {
            const Pack<float, V> x = row[i];
#pragma unroll
            for (int v = 0; v < V; ++v) equals += order_of(x.v[v]) == least;
        }
        equals = __reduce_add_sync(~0u, equals);
        if (lane == 0) s.ties[warp] = equals;
        __syncthreads();
        unsigned before = __reduce_add_sync(~0u, lane < warp ? s.ties[lane] : 0);
        if constexpr (BLOCKS > 1) {
            if (threadIdx.x == T - 1) s.all_ties = before + equals;
            cluster_sync();
            before += __reduce_add_sync(~0u, lane < rank ? *in_block(&s.all_ties, lane % BLOCKS) : 0);
        }
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

    // put(place, id) for the k first of this block's list in order. All are above `least`.
    template <class Put>
    __device__ void put_sorted(unsigned size, unsigned least, Put put) {
        Key *const from = s.lists[0], *const to = s.lists[1];
        const int shift = shift_for(high - least, SORT_BITS);
        const auto bin_of = [&](Key key) { return (high - ~(unsigned)(key >> 32)) >> shift; };
        for (unsigned i = threadIdx.x; i < size; i += T) atomicAdd(&s.bins[bin_of(from[i])], 1u);
        start_bins<SORT_BITS>([&](int, unsigned, unsigned count) {
            if (count > FEW) s.crowded = 1;
        });
        if (s.crowded) {
            int padded = 2;
            while (padded < size) padded *= 2;
            for (int i = size + threadIdx.x; i < padded; i += T) from[i] = LAST_KEY;
            sort_shared(from, padded, 0);
            for (unsigned i = threadIdx.x; i < min(size, k); i += T) put(i, (int)(unsigned)from[i]);
            return;
        }
        for (unsigned i = threadIdx.x; i < size; i += T) {
            const Key key = from[i];
            to[atomicAdd(&s.bins[bin_of(key)], 1u)] = key;
        }
        __syncthreads();
        for (unsigned i = threadIdx.x; i < size; i += T) {
            const Key key = to[i];
            const unsigned bin = bin_of(key), end = s.bins[bin];  // a start became its bin's end
            const unsigned start = bin ? s.bins[bin - 1] : 0;
            unsigned place = start;
#pragma unroll 4
            for (unsigned j = start; j < end; ++j) place += to[j] < key;
            if (place < k) put(place, (int)(unsigned)key);
        }
    }

    template <class Put>
    __device__ void choose(Put put) {
        if (threadIdx.x == 0) s.size = 0, s.crowded = 0;
        unsigned least = bound();  // with barriers
        unsigned size = collect(least);
        if (size > CAPACITY) {
            least = kth_largest();
            if (threadIdx.x == 0) s.size = 0;
            sync_all();
            size = collect(least);
        }
        if (size < k)
            put_ties(least, k - size, [&](unsigned place, int id) { put(size + place, id); });
        if (rank == 0 && size) put_sorted(size, least, put);
        if constexpr (BLOCKS > 1) cluster_sync();
    }
};

template <int BLOCKS, int V, int N>
__device__ __forceinline__ void choose(Shared& s, const Tensor& out, const Tensor& a) {
    const int number = blockIdx.x / BLOCKS, i1 = number % a.ne[1], rest = number / a.ne[1];
    const int i2 = rest % a.ne[2], i3 = rest / a.ne[2];
    const Row<V> row = {(const char*)a.row<float>(i1, i2, i3), a.nb[0], a.ne[0] / V};
    char* ids = (char*)out.row<int>(i1, i2, i3);
    Choice<BLOCKS, V, N>(s, row, out.ne[0], blockIdx.x % BLOCKS).choose([&](unsigned place, int id) {
        *(int*)(ids + place * out.nb[0]) = id;
    });
}

// grid: rows.
template <int V>
__global__ void __launch_bounds__(THREADS<1>, 2) top_k(Tensor out, Tensor a) {
    begin();
    extern __shared__ __align__(16) char memory[];
    choose<1, V, V == 1 ? 8 : 4>(*(Shared*)memory, out, a);
}

#if __CUDA_ARCH__ >= 900
// grid: rows times CLUSTER. Threads are so many that instructions count: N is no more than needed.
template <int V, int N>
__global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(THREADS<CLUSTER>, 1)
    top_k_cluster(Tensor out, Tensor a) {
    cluster_sync();  // the other blocks have started, so their memory can be written
    begin();
    extern __shared__ __align__(16) char memory[];
    choose<CLUSTER, V, N>(*(Shared*)memory, out, a);
}
#endif
