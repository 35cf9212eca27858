// Sorts rows by keys whose low half is the id: no two keys are equal, so the order is unique.
#pragma once
#include "common.cuh"

typedef unsigned long long Key;
#define LAST_KEY 0xFFFFFFFFFFFFFFFFull

// A number whose order is that of the values. -0 equals 0. NaN of either sign is above every number,
// so it shows up in the result.
__device__ __forceinline__ unsigned order_of(float value) {
    int bits = value == value ? __float_as_int(value + 0.0f) : 0x7FC00000;
    bits ^= (bits >> 31) & 0x7FFFFFFF;
    return (unsigned)bits ^ 0x80000000u;
}
// Keys sort by value, equal values by id.
__device__ __forceinline__ Key sort_key(float value, int id, bool descending) {
    const unsigned order = order_of(value);
    return (Key)(descending ? ~order : order) << 32 | (unsigned)id;
}

// One merge of a bitonic sort: forms runs of `size`, comparing pairs `stride` apart, then ever
// closer down to neighbors. `keys` are the `part` keys at offset `base` of the whole row.
__device__ __forceinline__ void merge_shared(Key* keys, int part, int size, int stride, int base) {
    for (; stride; stride /= 2) {
        __syncthreads();
        for (int i = threadIdx.x; i < part / 2; i += blockDim.x) {
            int low = 2 * i - (i & (stride - 1)), high = low + stride;
            Key a = keys[low], b = keys[high];
            if ((a > b) == (((base + low) & size) == 0)) keys[low] = b, keys[high] = a;
        }
    }
    __syncthreads();
}

// All merges up to `part`, a power of two. The result is ascending if `part` is the whole row.
__device__ __forceinline__ void sort_shared(Key* keys, int part, int base) {
    for (int size = 2; size <= part; size *= 2) merge_shared(keys, part, size, size / 2, base);
    __syncthreads();
}
