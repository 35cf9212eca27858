// Launches that overlap (9.0): a kernel may begin once all blocks of its predecessor have called
// release_successor, and must not read what that writes before wait_for_predecessor.
//
// Every block of every kernel waits, also one with nothing to do, and releases only then: so all
// but the direct predecessor has ended when a kernel begins, and its end is the end of all before.
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

// Once in every kernel, first of all or behind what needs nothing of the predecessor.
__device__ __forceinline__ void begin() {
    wait_for_predecessor();
    release_successor();
}
