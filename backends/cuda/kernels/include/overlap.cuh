// Overlapping launches (9.0): a kernel may start once all blocks of its predecessor have called
// release_successor. It must not read the predecessor's results before wait_for_predecessor.
//
// Every block of every kernel waits, even one with nothing to do, and releases its successor only
// after that. So at most one earlier kernel is still running when a kernel starts, and when that
// one has ended, all earlier ones have ended too.
//
// `combine` and `list_combine` release first: what wrote their parts has waited for all before it, and
// writes nothing else. So their successor may start while both run, and reads nothing of theirs before
// its wait.
//
// So do products whose successor reads nothing but constants before it waits (`soon` and `patient` in
// launch.py). It waits for the product, so for all before, and then releases its own successor.
#pragma once

__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Call once in every kernel: first, or after the part that reads nothing from the predecessor.
__device__ __forceinline__ void begin() {
    wait_for_predecessor();
    release_successor();
}

// What attention reads before the wait, because the launch before does not write it: nothing,
// queries, or keys too and all that says which of them a query sees. SPANS: what says which keys a
// query sees, but not queries; of keys in order, QUERIES includes it. Keys alone are not worth it:
// queries, which are loaded behind them, would arrive last.
enum Early { NOTHING, QUERIES, ALL, SPANS };

// Fetches a line of 128 bytes into L2, for weights that are read after the wait. L2 sees all
// writes, so unlike a load this is right even if the predecessor writes there. Without a wait, the
// loads themselves are as early.
__device__ __forceinline__ void fetch_early(const void* at) {
#if __CUDA_ARCH__ >= 900
    asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
#endif
}
// The same for `nbytes` from `at` on, and for what shares 16 bytes with them.
__device__ __forceinline__ void fetch_early(const void* at, unsigned nbytes) {
#if __CUDA_ARCH__ >= 900
    const unsigned long long from = (unsigned long long)at / 16 * 16;
    nbytes = unsigned((unsigned long long)at % 16 + nbytes + 15) / 16 * 16;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(nbytes) : "memory");
#endif
}
