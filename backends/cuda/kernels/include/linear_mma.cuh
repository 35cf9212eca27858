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
#define D32(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D64(i) D32(i), D32(i + 16)
#define D128(i) D64(i), D64(i + 32)
#define NAMES32 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES64 NAMES32 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define NAMES96 NAMES64 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define NAMES128 NAMES96 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES160 NAMES128 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define NAMES192 NAMES160 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define NAMES224 \
    NAMES192 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define NAMES256 \
    NAMES224 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
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
#define BOTH_BY_ROWS(N, OUTS, ...) \
    BY_ROWS(__half, "f16", N, NAMES##N, ARGS(OUTS), __VA_ARGS__) \
    BY_ROWS(__nv_bfloat16, "bf16", N, NAMES##N, ARGS(OUTS), __VA_ARGS__)
BOTH_BY_ROWS(32, ARGS(D32(0)), 16, 17, 18, 19, 20)
BOTH_BY_ROWS(64, ARGS(D64(0)), 32, 33, 34, 35, 36)
BOTH_BY_ROWS(96, ARGS(D64(0), D32(32)), 48, 49, 50, 51, 52)
BOTH_BY_ROWS(128, ARGS(D128(0)), 64, 65, 66, 67, 68)
BOTH_BY_ROWS(160, ARGS(D128(0), D32(64)), 80, 81, 82, 83, 84)
BOTH_BY_ROWS(192, ARGS(D128(0), D64(64)), 96, 97, 98, 99, 100)
BOTH_BY_ROWS(224, ARGS(D128(0), D64(64), D32(96)), 112, 113, 114, 115, 116)
BOTH_BY_ROWS(256, ARGS(D128(0), D128(64)), 128, 129, 130, 131, 132)
#undef BOTH_BY_ROWS
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

// Starts sums += A B for 16 values of k and each fragment of `a`. b: the first of N rows of 128
// bytes; first: which 16 values of a row are the first.
template <class T, int N, int COUNT>
__device__ __forceinline__ void begin_product(float (&sums)[N / 2], const u32 (&a)[COUNT][4],
                                              Place b, int first) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < COUNT; ++k) wgmma_by_rows<T, N>(sums, a[k], further(b, (first + k) * 32));
    wgmma_commit();
#else
    const int lane = threadIdx.x % 32, row = lane / 16 * 8 + lane % 8,
              chunk = 2 * first + lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
#pragma unroll
        for (int n = 0; n < N; n += 16) {
            u32 f[4];
            ldmatrix(f, b + (n + row) * 128 + (((2 * k + chunk) ^ (row & 7)) << 4));
            mma<T>(*(float (*)[4]) & sums[n / 2], a[k], f[0], f[1]);
            mma<T>(*(float (*)[4]) & sums[n / 2 + 4], a[k], f[2], f[3]);
        }
#endif
}
