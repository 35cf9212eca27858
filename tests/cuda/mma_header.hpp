// What mma.cuh declares for 8.0, on a block of host threads, for kernels that emulated.py runs.
#pragma once
#include "overlap.cuh"

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
#define __align__(n)
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
template <class T>
void atomicMin(T* at, T x) {
    *at = min(*at, x);
}
template <class T>
void atomicMax(T* at, T x) {
    *at = max(*at, x);
}
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
constexpr bool BULK = true;
#include "mma.hpp"
