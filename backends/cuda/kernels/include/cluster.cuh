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
// Stores x, of 8 or 16 bytes, where `p` is in block `rank`, and completes as many bytes of the barrier
// that is at `b` there. Who waits for that sees x.
template <class T>
__device__ __forceinline__ void send(void* p, int rank, const T& x, unsigned long long* b) {
    unsigned at, bar;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"((unsigned)__cvta_generic_to_shared(p)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(bar) : "r"((unsigned)__cvta_generic_to_shared(b)), "r"(rank));
    if constexpr (sizeof(T) == 8)
        asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(at),
                     "l"(x), "r"(bar)
                     : "memory");
    else
        asm volatile(
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];" ::"r"(at),
            "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(bar)
            : "memory");
}

// Numbers that blocks send each other. To meet for them takes a fence of all that the threads wrote;
// these count themselves where they arrive. One thread of a block opens it for `bytes`, all threads
// call `blocks_start` behind that and `blocks_started` before the first one sends.
struct Inbox {
    unsigned long long arrived;

    __device__ __forceinline__ unsigned at() { return (unsigned)__cvta_generic_to_shared(&arrived); }
    __device__ __forceinline__ void open(int bytes) {
        asm volatile("mbarrier.init.shared.b64 [%0], 1;\n"
                     "fence.mbarrier_init.release.cluster;\n"
                     "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(at()), "r"(bytes)
                     : "memory");
    }
    // Writes x to `to` in the memory of block `rank`.
    __device__ __forceinline__ void send(int rank, float* to, float x) {
        asm volatile("{\n.reg .b32 to, box;\n"
                     "mapa.shared::cluster.u32 to, %0, %3;\n"
                     "mapa.shared::cluster.u32 box, %1, %3;\n"
                     "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [to], %2, [box];\n}"
                     ::"r"((unsigned)__cvta_generic_to_shared(to)), "r"(at()),
                       "r"(__float_as_uint(x)), "r"(rank)
                     : "memory");
    }
    // Waits for all bytes if they are `mine`. All threads of a block call it.
    __device__ __forceinline__ void wait(bool mine) {
        if (!mine) return;
        asm volatile("{\n.reg .pred done;\nagain:\n"
                     "mbarrier.try_wait.parity.shared.b64 done, [%0], 0;\n"
                     "@!done bra again;\n}" ::"r"(at())
                     : "memory");
    }
};
__device__ __forceinline__ void blocks_start() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void blocks_started() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#else
template <class T>
__device__ __forceinline__ T* in_block(T* p, int) {
    return p;
}
__device__ __forceinline__ void cluster_sync() {}
template <class T>
__device__ __forceinline__ void send(void*, int, const T&, unsigned long long*) {}
#endif
