// How the latent kernels write parts on 9.0.
#pragma once
#include "attention.cuh"

// A block's sums on their way to their parts. In fragments they are pieces of 32 bytes; written like
// that, the parts of 128 heads (16.8 MB) take 6 us on an H100. So they meet in shared memory, from
// where the copy engine writes whole rows.
template <int D>
struct Staged {
    static constexpr int PITCH = 4 * D + 32;  // the 8 rows of a fragment are in different banks
    char *memory;

    __device__ __forceinline__ void put(int row, int column, float x, float y) const {
        *(float2 *)(memory + row * PITCH + 4 * column) = make_float2(x, y);
    }
    // Sends row `index` of the block, after a barrier before which all that put called fence_engines.
    // Memory is free when the call returns.
    __device__ __forceinline__ void send(const Attention &a, int i3, const Row &row, int index,
                                         int split) const {
        if (row.query < 0) return;
        bulk_copy(part_sums(a, part_index(a, i3, row.query, row.head, split)),
                  shared_address(memory) + index * PITCH, 4 * D);
        bulk_copies_wait();
    }
};
// Becomes NaN with the first of some numbers that is not finite; 0 before.
__device__ __forceinline__ float spoilt_by(float spoilt, float x) { return fmaf(x, 0.f, spoilt); }
