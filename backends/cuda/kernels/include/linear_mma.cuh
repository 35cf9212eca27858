// A warpgroup's product with decoded weights in registers: wgmma where available, else mma.sync.
#pragma once
#include "mma.cuh"

// Makes this thread's copies to shared memory visible to wgmma.
__device__ __forceinline__ void fence_engines_for_wgmma() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    fence_engines();
#endif
}

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// sums [64 x N] += A [64 x 16] (registers) B [N x 16] (shared memory, k contiguous, 128B swizzle).
template <class T, int N>
__device__ __forceinline__ void wgmma_by_rows(float (&d)[N / 2], const u32 (&a)[4], u64 b);

#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D64(i) D16(i), D16(i + 16), D16(i + 32), D16(i + 48)
#define NAMES32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES64                                                                              \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
    "%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES128                                                                               \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"   \
    "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45," \
    "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define BY_ROWS(T, NAME, N, NAMES, OUTS, A, B, C, D, E)                                         \
    template <>                                                                                 \
    __device__ __forceinline__ void wgmma_by_rows<T, N>(float (&d)[N / 2], const u32(&a)[4],    \
                                                        u64 b) {                                \
        asm volatile("wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" NAMES \
                     "}, {%" #A ",%" #B ",%" #C ",%" #D "}, %" #E ", 1, 1, 1, 0;"               \
                     : OUTS                                                                     \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                     \
    }
#define ARGS(...) __VA_ARGS__
BY_ROWS(__half, "f16", 32, NAMES32, ARGS(D16(0)), 16, 17, 18, 19, 20)
BY_ROWS(__nv_bfloat16, "bf16", 32, NAMES32, ARGS(D16(0)), 16, 17, 18, 19, 20)
BY_ROWS(__half, "f16", 64, NAMES64, ARGS(D16(0), D16(16)), 32, 33, 34, 35, 36)
BY_ROWS(__nv_bfloat16, "bf16", 64, NAMES64, ARGS(D16(0), D16(16)), 32, 33, 34, 35, 36)
BY_ROWS(__half, "f16", 128, NAMES128, ARGS(D64(0)), 64, 65, 66, 67, 68)
BY_ROWS(__nv_bfloat16, "bf16", 128, NAMES128, ARGS(D64(0)), 64, 65, 66, 67, 68)
#undef BY_ROWS
#endif

// Waits until at most LEFT products are running: before sums are read or an A is overwritten.
template <int LEFT>
__device__ __forceinline__ void wait_products() {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    wgmma_wait<LEFT>();
#endif
}

// A place in shared memory, as a product reads it.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
using Place = u64;
__device__ __forceinline__ Place place_of(u32 at) { return tile_descriptor(at, 16); }
#else
using Place = u32;
__device__ __forceinline__ Place place_of(u32 at) { return at; }
__device__ __forceinline__ Place further(Place place, u32 bytes) { return place + bytes; }
#endif

// Starts sums += A B for 32 values of k. a: fragments of two m16n8k16; b: the first of N rows of
// 128 bytes; `half`: which 64 bytes of each row.
template <class T, int N>
__device__ __forceinline__ void begin_product(float (&sums)[N / 2], const u32 (&a)[2][4], Place b,
                                              int half) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < 2; ++k) wgmma_by_rows<T, N>(sums, a[k], further(b, half * 64 + k * 32));
    wgmma_commit();
#else
    const int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8,
              chunk = half * 4 + lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < 2; ++k)
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            u32 f[4];
            ldmatrix(f, b + (n + row) * 128 + (((2 * k + chunk) ^ (row & 7)) << 4));
            mma<T>(*(float (*)[4]) & sums[n / 2], a[k], f[0], f[1]);
            mma<T>(*(float (*)[4]) & sums[n / 2 + 4], a[k], f[2], f[3]);
        }
#endif
}
