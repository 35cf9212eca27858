// Shared by the kernels of lightning_indexer: the argument, and how a score ends.
#pragma once
#include "mma.cuh"

// The argument of every kernel here (Indexer in indexer.py). Strides are in bytes.
struct Indexer {
    const char *q, *k, *w;
    const char *mask;   // f16, or null
    const int *kv_len;  // null: all rows count
    char *out;
    char *images;  // packed queries, or null
    long long nb_q[3], nb_k[2], nb_w[3], nb_mask[2], nb_out[2];
    int d, heads, n_tokens, n_kv, mask_batch, chunk, early;
    float scale;  // of the weights

    __device__ int live() const { return kv_len ? max(0, min(n_kv, *kv_len)) : n_kv; }
    // What is added to the score of row j: -inf if the token does not see it.
    __device__ float bias(int j, int t, int i3, int live) const {
        if (j >= live) return __int_as_float(0xFF800000);
        if (!mask) return 0;
        return __half2float(((const __half *)(mask + t * nb_mask[0] + i3 % mask_batch * nb_mask[1]))[j]);
    }
    __device__ float *score(int j, int t, int i3) const {
        return (float *)(out + t * nb_out[0] + i3 * nb_out[1]) + j;
    }
};

__device__ __forceinline__ bool hides(float bias) { return bias == __int_as_float(0xFF800000); }

// max(0, x), but NaN stays NaN.
__device__ __forceinline__ float relu(float x) {
    float y;
    asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
    return y;
}

// The exponent e of a query's head, of which each lane of a warp has four elements: all of them by
// 2^-e are below 1.
__device__ __forceinline__ int exponent_of(float4 v) {
    float top = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
#pragma unroll
    for (int by = 16; by; by /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, by));
    return max(-100, min(100, int(__float_as_uint(top) >> 23) - 126));
}
