// Shared by most kernels: tensor arguments, conversions, reductions over a block.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "overlap.cuh"

// A tensor passed by value (Tensor in argument.py): address, byte strides, sizes; dimension 0 first.
struct Tensor {
    char* data;
    long long nb[4];
    int ne[4];

    template <class T>
    __device__ T* row(int i1, int i2, int i3) const {
        return (T*)(data + i1 * nb[1] + i2 * nb[2] + i3 * nb[3]);
    }
    template <class T>
    __device__ T* at(int i0, int i1, int i2, int i3) const {
        return (T*)(data + i0 * nb[0] + i1 * nb[1] + i2 * nb[2] + i3 * nb[3]);
    }
};

struct Index {
    int i0, i1, i2, i3;
};

// The indices of element `i`, counting dimension 0 first. I: unsigned, or long long past 2^32.
template <class I>
__device__ __forceinline__ Index unravel(I i, int n0, int n1, int n2) {
    I rest = i / n0, outer = rest / n1, last = outer / n2;
    return {int(i - rest * n0), int(rest - outer * n1), int(outer - last * n2), int(last)};
}

// i modulo n, in a dimension that repeats. Usually n == full, which costs nothing.
__device__ __forceinline__ int wrap(int i, int n, int full) { return n == full ? i : i % n; }

// -- values -----------------------------------------------------------------------------------------

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_f32(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_f32(int x) { return (float)x; }
__device__ __forceinline__ float to_f32(long long x) { return (float)x; }

template <class T>
__device__ __forceinline__ T from_f32(float x) {
    return (T)x;
}
template <>
__device__ __forceinline__ __half from_f32<__half>(float x) {
    return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_f32<__nv_bfloat16>(float x) {
    return __float2bfloat16_rn(x);
}

// Four of the 8 bytes of a and b, chosen by the nibbles of the selector's low half.
__device__ __forceinline__ unsigned permute(unsigned a, unsigned b, unsigned selector) {
    unsigned r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
}

template <class A, class B> struct Same { static constexpr bool yes = false; };
template <class A> struct Same<A, A> { static constexpr bool yes = true; };
template <class T> struct Whole { static constexpr bool yes = Same<T, int>::yes || Same<T, long long>::yes; };

// Converts one type to another: equal types bit for bit, integers without a detour through f32.
template <class D, class S>
__device__ __forceinline__ D convert_to(S x) {
    if constexpr (Same<D, S>::yes) return x;
    else if constexpr (Whole<D>::yes && Whole<S>::yes) return (D)x;
    else return from_f32<D>(to_f32(x));
}

// ln(1 + e^x), accurate at both ends.
__device__ __forceinline__ float softplus(float x) { return (x > 0 ? x : 0) + log1pf(expf(-fabsf(x))); }

// V adjacent elements, read and written at once.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
    T v[V];
};

// Four adjacent numbers. A part of a concat may begin anywhere.
__device__ __forceinline__ Pack<float, 4> four_at(const float* at) {
    if ((size_t)at % 16 == 0) return *(const Pack<float, 4>*)at;
    return {{at[0], at[1], at[2], at[3]}};
}

// -- over a warp and a block ------------------------------------------------------------------------

struct Sum {
    static __device__ __forceinline__ float apply(float a, float b) { return a + b; }
};
struct Max {
    static __device__ __forceinline__ float apply(float a, float b) { return fmaxf(a, b); }
};

// Returns the same value in every lane. The order of operations is fixed.
template <class Op>
__device__ __forceinline__ float warp_reduce(float x) {
    for (int lane = 16; lane; lane >>= 1) x = Op::apply(x, __shfl_xor_sync(~0u, x, lane));
    return x;
}

// Returns the same value in every thread of a block of whole warps. May be called repeatedly.
template <class Op>
__device__ __forceinline__ float block_reduce(float x, float neutral) {
    __shared__ float parts[32];
    x = warp_reduce<Op>(x);
    if (blockDim.x == 32) return x;
    __syncthreads();
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? parts[threadIdx.x % 32] : neutral;
    return warp_reduce<Op>(x);
}
