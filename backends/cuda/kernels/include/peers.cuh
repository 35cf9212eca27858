// GPUs of one host that write to each other's memory, and how a kernel waits for another GPU.
#pragma once
#include "common.cuh"

constexpr int MOST_GPUS = 8;

struct Peers {
    unsigned long long box[MOST_GPUS];  // of each GPU, as this one sees it
    // Two words of the host: the first is not 0 if all waits must end; into the second goes one more
    // than the number of the GPU that this one then waited for.
    unsigned long long stop;
    int index, count;  // of this GPU, of all
};

#ifndef __BLOCK__
__device__ __forceinline__ void let_others_run() {}
#endif

// Waits until has_come(), or until the host ends all waits: what then follows is never used. The
// host's word is far away, so it is read once in 64 turns.
template <class F>
__device__ __forceinline__ void wait_for(const Peers& peers, int gpu, F has_come) {
    volatile unsigned* stop = (volatile unsigned*)peers.stop;
    for (unsigned turn = 1; !has_come(); turn++) {
        let_others_run();
        if (turn % 64 == 0 && stop[0]) {
            stop[1] = gpu + 1;
            return;
        }
    }
}
