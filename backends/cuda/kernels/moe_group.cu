// Sorts routed tokens by expert, on the device and in a fixed order. One block per expert counts
// all of them, so no block waits for another. Pairs without an expert come last, as if there were
// one expert more.
// @kernel hot group_pairs
#include "linear_common.cuh"

constexpr int THREADS = 1024;

// order: pairs sorted by expert. places: where each pair is there, -1 without an expert. tiles:
// {expert, first entry of order, entries}, one for every `columns` pairs.
__global__ void __launch_bounds__(THREADS)
    group_pairs(Routing routing, int* order, int* places, int4* tiles, int* n_tiles,
                int columns) {
    begin();
    extern __shared__ int counts[];  // one per expert
    __shared__ int starts[THREADS / 32], before, tiles_before, all_tiles;
    const int thread = threadIdx.x, mine = blockIdx.x, n_used = routing.ids.ne[0];
    const int pairs = n_used * routing.ids.ne[1], experts = routing.experts + 1;
    auto id_of = [&](int pair) {
        int id = *(const int*)routing.ids.at<char>(pair % n_used, pair / n_used, 0, 0);
        return id >= 0 && id < routing.experts ? id : routing.experts;
    };
    for (int e = thread; e < experts; e += THREADS) counts[e] = 0;
    if (thread == 0) before = tiles_before = all_tiles = 0;
    __syncthreads();
    // Each thread takes a contiguous run of pairs, so ranks follow from a prefix sum over threads.
    const int share = (pairs + THREADS - 1) / THREADS;
    const int first = min(thread * share, pairs), last = min(first + share, pairs);
    int own = 0;
    for (int pair = first; pair < last; ++pair) {
        int id = id_of(pair);
        own += id == mine;
        atomicAdd(&counts[id], 1);
    }
    __syncthreads();
    for (int e = thread; e < experts; e += THREADS) {
        int some = (counts[e] + columns - 1) / columns;
        atomicAdd(&all_tiles, some);
        if (e < mine) {
            atomicAdd(&before, counts[e]);
            atomicAdd(&tiles_before, some);
        }
    }
    int rank = own;
    for (int i = 1; i < 32; i *= 2) {
        int other = __shfl_up_sync(~0u, rank, i);
        if (thread % 32 >= i) rank += other;
    }
    if (thread % 32 == 31) starts[thread / 32] = rank;
    __syncthreads();
    int at = before + rank - own;
    for (int warp = 0; warp < thread / 32; ++warp) at += starts[warp];
    if (own)
        for (int pair = first; pair < last; ++pair)
            if (id_of(pair) == mine) {
                places[pair] = mine < routing.experts ? at : -1;
                order[at++] = pair;
            }
    int count = counts[mine];
    for (int i = thread; i * columns < count; i += THREADS)
        tiles[tiles_before + i] =
            make_int4(mine, before + i * columns, min(columns, count - i * columns), 0);
    if (mine == 0 && thread == 0) *n_tiles = all_tiles;
}
