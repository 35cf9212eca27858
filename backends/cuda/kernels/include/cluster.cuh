// Clusters of blocks (9.0): blocks that run at the same time and reach each other's shared memory.
#pragma once

#if __CUDA_ARCH__ >= 900
// Where `p`, in this block's shared memory, is in that of block `rank` of the cluster.
template <class T>
__device__ __forceinline__ T* in_block(T* p, int rank) {
    T* there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
    return there;
}
// Waits for all threads of the cluster; what they wrote before is visible afterwards. No block may
// end while another one reads its memory.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n"
                 "barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#else
template <class T>
__device__ __forceinline__ T* in_block(T* p, int) {
    return p;
}
__device__ __forceinline__ void cluster_sync() {}
#endif
