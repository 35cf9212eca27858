// Calls a kernel with packed arguments, and names of CUDA that are not in host.hpp.
#pragma once
#include <tuple>

#define __grid_constant__
#define __cluster_dims__(...)
using std::isinf;
using std::isnan;
struct float2 {
    float x, y;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
struct float4 {
    float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float x) { return (int)std::nearbyint(x); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned long long)a * b >> 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 4; ++i) c += (signed char)(a >> 8 * i) * (signed char)(b >> 8 * i);
    return c;
}
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
inline __half2 __floats2half2_rn(float x, float y) { return {(__half)x, (__half)y}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
    return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline void sincospif(float x, float* s, float* c) {
    *s = std::sin(x * M_PI), *c = std::cos(x * M_PI);
}

// The argument at offset `at` of the packed ones; each is at a multiple of its own alignment.
template <class T>
T argument(const char* args, int& at) {
    at = (at + (int)alignof(T) - 1) / (int)alignof(T) * (int)alignof(T);
    T value;
    std::memcpy((void*)&value, args + at, sizeof value);
    at += sizeof value;
    return value;
}

// A kernel with its packed arguments.
template <class... A>
std::function<void()> bound(void (*kernel)(A...), const char* args) {
    int end = 0;
    std::tuple<A...> values{argument<A>(args, end)...};
    return [=] { std::apply(kernel, values); };
}

// Runs a kernel; returns the bytes of its arguments.
template <class... A>
int start(void (*kernel)(A...), const char* args, const int* grid, const int* block, int shared,
          int blocks) {
    int end = 0;
    std::tuple<A...> values{argument<A>(args, end)...};
    launch(Dim3{grid[0], grid[1], grid[2]}, Dim3{block[0], block[1], block[2]},
           [&] { std::apply(kernel, values); }, shared, blocks);
    return end;
}
