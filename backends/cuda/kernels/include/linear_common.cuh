// Helpers shared by the product kernels.
#pragma once
#include "common.cuh"

// Row number `column` of a tensor, counting through dimensions 1 to 3.
__device__ __forceinline__ char* row_at(const Tensor& x, unsigned column) {
    if (column < (unsigned)x.ne[1]) return x.data + column * x.nb[1];
    unsigned rest = column / x.ne[1];
    return x.data + column % x.ne[1] * x.nb[1] + rest % x.ne[2] * x.nb[2] +
           rest / x.ne[2] * x.nb[3];
}

// For data that is read once: bypasses L1. The assembler moves `load_stream` over barriers (.nc),
// but not `load_in_order`.
__device__ __forceinline__ unsigned load_stream(const unsigned* at) {
    unsigned v;
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}
__device__ __forceinline__ uint2 load_stream(const uint2* at) {
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(at)
                 : "memory");
    return v;
}
__device__ __forceinline__ unsigned load_in_order(const unsigned* at) {
    unsigned v;
    asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(at) : "memory");
    return v;
}
__device__ __forceinline__ uint2 load_in_order(const uint2* at) {
    uint2 v;
    asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(at)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint4 load_in_order(const uint4* at) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at)
                 : "memory");
    return v;
}

// For data that is read again. With asm it stays a global load even where the compiler cannot tell
// the address space.
__device__ __forceinline__ uint4 load_global(const void* at) {
    uint4 v;
    asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(at));
    return v;
}
__device__ __forceinline__ unsigned load_global(const unsigned short* at) {
    unsigned short v;
    asm("ld.global.u16 %0, [%1];" : "=h"(v) : "l"(at));
    return v;
}

// act(gate) * up. act: 0 silu, 1 gelu (the tanh form, as x / (1 + exp(-2 z)) with tanh's argument
// z), 2 relu.
__device__ __forceinline__ float gated(int act, float gate, float up) {
    if (act == 2) return (gate < 0.0f ? 0.0f : gate) * up;
    float z = gate;
    if (act == 1) z *= 1.59576912160573071f * (1.0f + 0.044715f * gate * gate);
    return __fdividef(gate, 1.0f + expf(-z)) * up;
}
// act(min(gate, limit)) * clamp(up, -limit, limit). NaN stays NaN.
__device__ __forceinline__ float gated(int act, float gate, float up, float limit) {
    return gated(act, gate > limit ? limit : gate,
                 up < -limit ? -limit : up > limit ? limit : up);
}

// Writes an element, as f16 if `narrow`.
__device__ __forceinline__ void put(char* at, float value, int narrow) {
    if (narrow)
        *(__half*)at = __float2half_rn(value);
    else
        *(float*)at = value;
}
// Writes element `row` of the row at `to`.
__device__ __forceinline__ void put(const Tensor& y, char* to, int row, float value, int narrow) {
    put(to + row * y.nb[0], value, narrow);
}

// Maps batch z = i3 * a2 + i2 of b to its matrix of `a`: (i3 / r3, i2).
struct Heads {
    int a2, r3, columns;  // columns of b that share a matrix
    __device__ __forceinline__ int matrix(unsigned z) const {
        return z == 0 ? 0 : z / a2 / r3 * a2 + z % a2;
    }
};

// A routed token: its expert (-1: none), its row of activations, and where the result goes.
struct Routing {
    Tensor ids;  // i32 [n_used, n_tokens]
    int experts, n_b;
};
struct Pair {
    int expert;
    unsigned column;
    char* to;
};
// Where the result of (token, slot) number `pair` goes.
__device__ __forceinline__ char* target_of(const Routing& r, const Tensor& y, int pair) {
    return y.data + pair % r.ids.ne[0] * y.nb[1] + pair / r.ids.ne[0] * y.nb[2];
}
__device__ __forceinline__ Pair pair_of(const Routing& r, const Tensor& y, int pair) {
    int slot = pair % r.ids.ne[0], token = pair / r.ids.ne[0];
    int id = *(const int*)(r.ids.data + slot * r.ids.nb[0] + token * r.ids.nb[1]);
    return {id >= 0 && id < r.experts ? id : -1, (unsigned)(token * r.n_b + slot % r.n_b),
            target_of(r, y, pair)};
}

// The columns of tiles: from a list made by moe_group.cu, or simply the next N.
struct Columns {
    const int4* tiles;  // {expert, first entry of `order`, entries}
    const int* n_tiles;  // of all, and of those with an expert, which come first
    const int* order;  // pairs sorted by expert
    Heads heads;
    Routing routing;
};
