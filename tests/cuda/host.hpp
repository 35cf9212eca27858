// The words of CUDA that the kernels' decoders need, for one thread on the host.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

using std::max;
using std::min;
#define __device__
#define __global__
#define __constant__
#define __shared__ static
#ifndef SHARED
#define SHARED(T, name, n) static T name[n]
#endif
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

#ifndef __BLOCK__
struct Dim3 {
    int x, y, z;
};
static const Dim3 threadIdx = {0, 0, 0}, blockDim = {1, 1, 1};
inline void __syncthreads() {}
template <class T>
T __shfl_xor_sync(unsigned, T x, int) {
    return x;
}
#endif

struct uint2 {
    unsigned x, y;
};
struct uint4 {
    unsigned x, y, z, w;
};
struct int4 {
    int x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

inline unsigned __funnelshift_r(unsigned low, unsigned high, int by) {
    return unsigned(((uint64_t)high << 32 | low) >> (by & 31));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
// The fourth bit of a nibble puts the sign of its byte in the byte's place.
inline unsigned byte_permutation(unsigned a, unsigned b, unsigned selector) {
    const uint64_t both = (uint64_t)b << 32 | a;
    unsigned r = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned nibble = selector >> 4 * i & 15, byte = both >> 8 * (nibble & 7) & 255;
        r |= (nibble < 8 ? byte : byte < 128 ? 0 : 255) << 8 * i;
    }
    return r;
}

template <class To, class From>
To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline float __uint_as_float(unsigned x) { return bits_as<float>(x); }
inline float __int_as_float(int x) { return bits_as<float>(x); }
inline int __float_as_int(float x) { return bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return bits_as<unsigned>(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }

using __half = _Float16;
struct __nv_bfloat16 {
    unsigned short bits;
};
struct __half2 {
    __half x, y;
};
inline __half __ushort_as_half(unsigned short x) { return bits_as<__half>(x); }
inline float __half2float(__half x) { return x; }
inline __half __float2half_rn(float x) { return (__half)x; }
inline float __bfloat162float(__nv_bfloat16 x) { return bits_as<float>(unsigned(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    unsigned bits = bits_as<unsigned>(x);
    return {(unsigned short)(bits + 0x7FFF + (bits >> 16 & 1) >> 16)};
}
inline __half2 __half2half2(__half x) { return {x, x}; }
inline __half2 __float2half2_rn(float x) { return __half2half2((__half)x); }
inline __half2 __hsub2(__half2 a, __half2 b) { return {(__half)(a.x - b.x), (__half)(a.y - b.y)}; }
inline __half2 __hmul2(__half2 a, __half2 b) { return {(__half)(a.x * b.x), (__half)(a.y * b.y)}; }
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {  // doubles hold these products
    return {(__half)((double)a.x * b.x + c.x), (__half)((double)a.y * b.y + c.y)};
}
template <class T>
unsigned pack2(float a, float b) {
    return __float2bfloat16_rn(a).bits | (unsigned)__float2bfloat16_rn(b).bits << 16;
}
