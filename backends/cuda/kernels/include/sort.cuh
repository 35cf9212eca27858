// Sorting rows by keys in which the id is the low half: no two are equal, so the order is settled.
#pragma once
#include "common.cuh"

typedef unsigned long long Key;
#define LAST_KEY 0xFFFFFFFFFFFFFFFFull

// Keys in the order of the values, equal ones by id. -0 equals 0; NaN, of whatever sign, is larger
// than every number, so that a row that holds it says so.
__device__ __forceinline__ Key sort_key(float value, int id, bool descending) {
    int bits = value == value ? __float_as_int(value + 0.0f) : 0x7FC00000;
    bits ^= (bits >> 31) & 0x7FFFFFFF;
    unsigned order = (unsigned)bits ^ 0x80000000u;
    return (Key)(descending ? ~order : order) << 32 | (unsigned)id;
}

// One merge of a bitonic sort: runs of `size`, from pairs `stride` apart down to neighbours, on the
// `part` keys that stand at `base` of the whole.
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

// All merges up to `part`, a power of two. Ascending where `part` is the whole.
__device__ __forceinline__ void sort_shared(Key* keys, int part, int base) {
    for (int size = 2; size <= part; size *= 2) merge_shared(keys, part, size, size / 2, base);
    __syncthreads();
}
