// Sorts routed tokens by expert, on the device and in a fixed order. One block per expert counts
// all of them, so no block waits for another. Pairs without an expert come last, as if there were
// one expert more; where devices share the experts these are many, so no atomic counts them.
//
// Full tiles come first, then what is left of each expert, most pairs first. So the last round of
// blocks of a product, which not all multiprocessors have, is of the smallest tiles.
// @kernel hot group_pairs
#include "linear_common.cuh"

// AHEAD: ids that a thread has on their way at once; one by one, each would take as long as a read
// from L2. It divides 32.
constexpr int THREADS = 1024, AHEAD = 4;

// order: pairs sorted by expert. places: where each pair is there, -1 without an expert. tiles:
// {expert, first entry of order, entries}, of up to `columns` pairs. n_tiles: how many there are, and
// how many are of an expert.
__global__ void __launch_bounds__(THREADS)
    group_pairs(Routing routing, int* order, int* places, int4* tiles, int* n_tiles,
                int columns) {
    begin();
    extern __shared__ int counts[];  // one per expert
    __shared__ int starts[THREADS / 32], before, full_before, all_full, rests_before, all_rests;
    const int thread = threadIdx.x, mine = blockIdx.x, n_used = routing.ids.ne[0];
    const int pairs = n_used * routing.ids.ne[1], experts = routing.experts + 1;
    for (int e = thread; e < experts; e += THREADS) counts[e] = 0;
    if (thread == 0) before = full_before = all_full = rests_before = all_rests = 0;
    __syncthreads();
    // Each thread takes a contiguous run of pairs, so ranks follow from a prefix sum over threads.
    const int share = (pairs + THREADS - 1) / THREADS;
    const int first = min(thread * share, pairs), last = min(first + share, pairs);
    const auto expert_of = [&](unsigned id) { return (int)min(id, (unsigned)routing.experts); };
    const long long step = routing.ids.nb[0], skip = routing.ids.nb[1] - n_used * step;
    const char* at_id = routing.ids.at<char>(first % n_used, first / n_used, 0, 0);
    int own = 0, absent = 0, slot = first % n_used;
    unsigned own_of_32 = 0;  // which of the first 32 of the run
    for (int start = first; start < last; start += AHEAD) {
        int ids[AHEAD];
        unsigned bits = 0;
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            ids[i] = 0;
            if (start + i < last) ids[i] = *(const int*)at_id;
            at_id += step;
            if (++slot == n_used) slot = 0, at_id += skip;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i)
            if (start + i < last) {
                const int expert = expert_of(ids[i]);
                bits |= (expert == mine) << i;
                if (expert < routing.experts) atomicAdd(&counts[expert], 1);
                else ++absent;
            }
        own += __popc(bits);
        if (start - first < 32) own_of_32 |= bits << (start - first);
    }
    absent = __reduce_add_sync(~0u, absent);
    if (thread % 32 == 0 && absent) atomicAdd(&counts[routing.experts], absent);
    __syncthreads();
    const int count = counts[mine], left = count % columns;
    for (int e = thread; e < experts; e += THREADS) {
        if (e < mine) atomicAdd(&before, counts[e]);
        if (e == routing.experts) continue;
        const int full = counts[e] / columns, rest = counts[e] % columns;
        atomicAdd(&all_full, full);
        if (e < mine) atomicAdd(&full_before, full);
        if (rest) atomicAdd(&all_rests, 1);
        if (rest > left || (rest && rest == left && e < mine)) atomicAdd(&rests_before, 1);
    }
    int rank = own;
    for (int i = 1; i < 32; i *= 2) {
        int other = __shfl_up_sync(~0u, rank, i);
        if (thread % 32 >= i) rank += other;
    }
    if (thread % 32 == 31) starts[thread / 32] = rank;
    __syncthreads();
    const int in_warps_before = thread % 32 < thread / 32 ? starts[thread % 32] : 0;
    int at = before + rank - own + (int)__reduce_add_sync(~0u, in_warps_before);
    const auto put = [&](int pair) {
        places[pair] = mine < routing.experts ? at : -1;
        order[at++] = pair;
    };
    for (; own_of_32; own_of_32 &= own_of_32 - 1) put(first + __ffs(own_of_32) - 1);
#pragma unroll 1
    for (int pair = first + 32; pair < last; ++pair)
        if (expert_of(*routing.ids.at<int>(pair % n_used, pair / n_used, 0, 0)) == mine) put(pair);
    const bool none = mine == routing.experts;
    for (int i = thread; i * columns < count; i += THREADS) {
        const int here = min(columns, count - i * columns);
        const int tile = none              ? all_full + all_rests + i
                         : here == columns ? full_before + i
                                           : all_full + rests_before;
        tiles[tile] = make_int4(mine, before + i * columns, here, 0);
    }
    if (none && thread == 0) {
        n_tiles[1] = all_full + all_rests;
        n_tiles[0] = n_tiles[1] + (count + columns - 1) / columns;
    }
}
