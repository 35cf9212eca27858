// GPUs of one host that write to each other's memory, and how a kernel waits for another GPU.
#pragma once
#include "common.cuh"

constexpr int MOST_GPUS = 8;
constexpr int BOX_HEAD = 256;  // bytes of a box, of which the first word is not 0 if all waits must end

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

// Waits until has_come(), or until the host ends all waits: what then follows is never used.
//
// Reads of the host's memory share a hub with the links between GPUs. When all warps that waited
// looked at the host's word once in 64 turns, these reads held up what they waited for: a sum of
// 16 MiB took 43 us, or 11 ms if the other GPU came 60 us late. So they look once in 2^14 turns, about
// 15 ms, and the first that finds that it must end tells the others in the GPU's own memory.
template <class F>
__device__ __forceinline__ void wait_for(const Peers& peers, int gpu, F has_come) {
    for (unsigned turn = 1; !has_come(); turn++) {
        let_others_run();
        if (turn % 64) continue;
        volatile unsigned *stop = (volatile unsigned*)peers.stop,
                          *ends = (volatile unsigned*)peers.box[peers.index];
        if (*ends) return;
        if (turn % (1 << 14) || !stop[0]) continue;
        *ends = 1, stop[1] = gpu + 1;
        return;
    }
}
