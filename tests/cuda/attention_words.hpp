// Names of CUDA and of mma.cuh that the plain attention kernel needs in addition to host.hpp.
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
#define __grid_constant__
#define __align__(n)

struct float2 {
    float x, y;
};
struct float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline __half2 __floats2half2_rn(float a, float b) { return {(__half)a, (__half)b}; }
inline int __ffs(int x) { return __builtin_ffs(x); }
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
inline void wait_for_predecessor() {}
inline void release_successor() {}
inline void begin() {}
enum Early { NOTHING, QUERIES, ALL };
alignas(16) static float memory[1 << 16];
