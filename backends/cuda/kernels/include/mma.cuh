// Thin PTX wrappers for the tensor cores and copy engines, which C++ does not expose.
//
// Fragments of mma m16n8k16 (g = lane / 4, t = lane % 4). Of A, a thread holds rows g and g + 8,
// columns 2t, 2t + 1 and the same 8 further. Of B, it holds rows (k) 2t, 2t + 1 and the same 8
// further, column g. Of the sums, [0, 1] are row g and [2, 3] row g + 8, columns 2t and 2t + 1. So
// two adjacent tiles of sums, rounded and packed, are an A fragment: scores become weights without
// leaving registers.
// Each warp of a wgmma m64nNk16 holds 16 rows in the same way.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "overlap.cuh"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;

__device__ __forceinline__ u32 shared_address(const void* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// ---- numbers ------------------------------------------------------------------------------------

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rounds two floats to T and packs them, the first in the low half.
template <class T> __device__ __forceinline__ u32 pack2(float low, float high);
template <> __device__ __forceinline__ u32 pack2<__half>(float low, float high) {
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
template <> __device__ __forceinline__ u32 pack2<__nv_bfloat16>(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// ---- warps: mma.sync, ldmatrix, cp.async (8.0 and up) -------------------------------------------

template <class T>
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1);
#define MMA(T, NAME)                                                                              \
    template <>                                                                                   \
    __device__ __forceinline__ void mma<T>(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {    \
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME                       \
                     ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"                 \
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                             \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));             \
    }
MMA(__half, "f16")
MMA(__nv_bfloat16, "bf16")
#undef MMA

__device__ __forceinline__ void ldmatrix(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}
__device__ __forceinline__ void ldmatrix_trans(u32 (&r)[4], u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

// Stores four 8 x 8 matrices transposed (9.0); lanes 8 i to 8 i + 7 have the addresses of matrix i.
__device__ __forceinline__ void stmatrix_trans(u32 at, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(at),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// Copies 16 bytes to shared memory asynchronously (cp.async). Where not `real`, it
// writes zeros and reads nothing.
__device__ __forceinline__ void copy16(u32 to, const void* from, bool real) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                 "r"(real ? 16 : 0)
                 : "memory");
}
__device__ __forceinline__ void copy4(u32 to, const void* from, bool real) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from),
                 "r"(real ? 4 : 0)
                 : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;"); }
template <int N> __device__ __forceinline__ void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// The barrier gets this thread's arrival when all its copies so far are done. A warpgroup's products
// may read them after `fence_engines` by each thread that waited.
__device__ __forceinline__ void copies_arrive(u64* b) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(shared_address(b))
                 : "memory");
}

// ---- mbarrier and the tensor copy engine (9.0) --------------------------------------------------

__device__ __forceinline__ void barrier_init(u64* b, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count));
}
__device__ __forceinline__ void barrier_expect(u64* b, u32 nbytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(b)),
                 "r"(nbytes)
                 : "memory");
}
__device__ __forceinline__ void barrier_arrive(u64* b) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void barrier_wait(u64* b, u32 parity) {
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "again:\n"
                 "mbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n"
                 "@p bra done;\n"
                 "bra again;\n"
                 "done:\n"
                 "}" ::"r"(shared_address(b)),
                 "r"(parity)
                 : "memory");
}
// Whether `barrier_wait` would not wait.
__device__ __forceinline__ bool barrier_passed(u64* b, u32 parity) {
    u32 passed;
    asm volatile("{\n"
                 ".reg .pred p;\n"
                 "mbarrier.test_wait.parity.shared.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n"
                 "}"
                 : "=r"(passed)
                 : "r"(shared_address(b)), "r"(parity)
                 : "memory");
    return passed;
}
// Make initialized barriers (or, fence_engines, written shared memory) visible to the engines.
__device__ __forceinline__ void fence_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void fence_engines() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The output of cuTensorMapEncodeTiled; must be 64-byte aligned.
struct TensorMap {
    u64 opaque[16];
};

__device__ __forceinline__ void tensor_copy(void* to, const TensorMap* map, u64* b, int x, int y,
                                            int z, int w) {
    asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3,%4,%5,%6}], [%2];" ::"r"(shared_address(to)),
                 "l"(map), "r"(shared_address(b)), "r"(x), "r"(y), "r"(z), "r"(w)
                 : "memory");
}

#if __CUDA_ARCH__ >= 900
constexpr bool BULK = true;
#else
constexpr bool BULK = false;
#endif
// Copies to shared memory; both addresses and `nbytes` are multiples of 16. The barrier must expect it.
__device__ __forceinline__ void bulk_fetch(u32 to, const void* from, u32 nbytes, u64* b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
                 "[%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(nbytes), "r"(shared_address(b))
                 : "memory");
}
// Copies from shared memory, `nbytes` a multiple of 16, after `fence_engines` by those who wrote it and
// a barrier. The thread that copies must wait before the block ends or writes there again.
__device__ __forceinline__ void bulk_copy(void* to, u32 from, u32 nbytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(from),
                 "r"(nbytes)
                 : "memory");
}
__device__ __forceinline__ void bulk_copies_wait() {
    asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}

// ---- warpgroups: wgmma (9.0a only) --------------------------------------------------------------

template <int N> __device__ __forceinline__ void registers_take() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void registers_give() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// wgmma writes the sums asynchronously: this keeps the compiler from moving their uses across it.
template <int N> __device__ __forceinline__ void wgmma_hold(float (&d)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// Barrier `id` (1 to 15) among some threads of a block, whole warps; some may arrive without waiting.
__device__ __forceinline__ void threads_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void threads_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The same among the 128 threads of a warpgroup.
__device__ __forceinline__ void warpgroup_sync(int id) {
    asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory");
}

// Describes a tile in shared memory whose rows are 128 bytes (64 values), with TMA's 128B swizzle;
// groups of 8 rows are 1024 bytes apart. `leading` is the step in bytes from one 64 columns to the
// next. It is read only if the contiguous dimension is not k (B = V, [keys][d_v]).
__device__ __forceinline__ u64 tile_descriptor(u32 at, u32 leading) {
    return u64((at & 0x3FFFF) >> 4) | u64(leading >> 4) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}
// The descriptor of a tile `bytes` further, a multiple of 16: one addition, where a descriptor made
// anew is six instructions.
__device__ __forceinline__ u64 further(u64 descriptor, u32 bytes) {
    return descriptor & ~0xFFFFFFFFull | u32(descriptor) + (bytes >> 4);
}

#define R8(d, i)                                                                                  \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),   \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define R32(d, i) R8(d, i), R8(d, i + 8), R8(d, i + 16), R8(d, i + 24)
#define S32                                                                                       \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"      \
    "%24,%25,%26,%27,%28,%29,%30,%31"
#define S16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define S64                                                                                       \
    S32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,"   \
        "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// sums[64 x N] (+)= A B, both in shared memory with k contiguous. `add` = 0 overwrites the sums.
template <class T, int N>
__device__ __forceinline__ void wgmma_ss(float (&d)[N / 2], u64 a, u64 b, int add);
// The same with A in registers and B [k][n], n contiguous.
template <class T, int N>
__device__ __forceinline__ void wgmma_rs(float (&d)[N / 2], const u32 (&a)[4], u64 b, int add);

#define WGMMA(T, NAME, N, REGS, OUTS, A, B, C, D, E, F)                                           \
    template <>                                                                                   \
    __device__ __forceinline__ void wgmma_ss<T, N>(float (&d)[N / 2], u64 a, u64 b, int add) {    \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" C ", 0;\n"                              \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS    \
                     "}, %" A ", %" B ", p, 1, 1, 0, 0;\n}"                                       \
                     : OUTS                                                                       \
                     : "l"(a), "l"(b), "r"(add));                                                 \
    }                                                                                             \
    template <>                                                                                   \
    __device__ __forceinline__ void wgmma_rs<T, N>(float (&d)[N / 2], const u32 (&a)[4], u64 b,   \
                                                   int add) {                                     \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" F ", 0;\n"                              \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" REGS    \
                     "}, {%" A ",%" B ",%" C ",%" D "}, %" E ", p, 1, 1, 1;\n}"                   \
                     : OUTS                                                                       \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));             \
    }
#define OUTS16 R8(d, 0), R8(d, 8)
#define OUTS32 R32(d, 0)
#define OUTS64 R32(d, 0), R32(d, 32)
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// sums[64 x 32] (+)= A B, both in shared memory: A is [k][m] with m contiguous, B has k contiguous.
__device__ __forceinline__ void wgmma_columns(float (&d)[16], u64 a, u64 b, int add) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %18, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {" S16
                 "}, %16, %17, p, 1, 1, 1, 0;\n}"
                 : OUTS16
                 : "l"(a), "l"(b), "r"(add));
}
WGMMA(__half, "f16", 32, S16, OUTS16, "16", "17", "18", "19", "20", "21")
WGMMA(__nv_bfloat16, "bf16", 32, S16, OUTS16, "16", "17", "18", "19", "20", "21")
WGMMA(__half, "f16", 64, S32, OUTS32, "32", "33", "34", "35", "36", "37")
WGMMA(__nv_bfloat16, "bf16", 64, S32, OUTS32, "32", "33", "34", "35", "36", "37")
WGMMA(__half, "f16", 128, S64, OUTS64, "64", "65", "66", "67", "68", "69")
WGMMA(__nv_bfloat16, "bf16", 128, S64, OUTS64, "64", "65", "66", "67", "68", "69")
#endif
