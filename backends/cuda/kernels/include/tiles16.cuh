// Rows of a weight in tiles of 16, as the cpu backend stores it (backends/host_tiles.py): how a GPU
// reads a weight that the host computes with too.
//
// A tile is a sequence of groups of 32 weights of 16 rows, each SCALES bytes of scales and CODES of
// codes; before every 8 groups, SHARED bytes of what the groups of a block share. Bytes of one row
// are 4 apart from those of the next, so 4 weights of a row are one word.
#pragma once
#include "raw.cuh"

namespace tiles {

template <class F>
struct Tiles16 : F {
    static constexpr int BITS = F::code_bytes / 4, HIGH = F::high / 4;  // of a code: low and high
    // The scale of mxfp4, an exponent, is a bf16 there.
    static constexpr int SCALES = 16 * (F::wide ? 2 : F::scale_bytes), SHARED = 16 * F::super_bytes;
    static constexpr int GROUP = SCALES + 64 * (BITS + HIGH);

    static __device__ constexpr int bytes(int groups) {
        return groups * GROUP + (groups + 7) / 8 * SHARED;
    }
};

// One row of some groups of a tile; the number of the first is a multiple of 8.
template <class F>
struct Tiles16Row {
    using T = Tiles16<F>;
    const unsigned char* first;
    int row;

    __device__ __forceinline__ const unsigned char* group_at(int group) const {
        return first + group * T::GROUP + (group / 8 + 1) * T::SHARED;
    }
    __device__ __forceinline__ int code(int group, int i) const {
        const unsigned char* low = group_at(group) + T::SCALES;
        const int j = i / 4, lane = row * 4 + i % 4;
        if constexpr (T::BITS == 8) return low[64 * j + lane] ^ 128;
        int code;
        if constexpr (T::BITS == 4) code = low[64 * (j % 4) + lane] >> j / 4 * 4 & 15;
        if constexpr (T::BITS == 2) code = low[64 * (j / 4) + lane] >> j % 4 * 2 & 3;
        const unsigned char* high = low + 64 * T::BITS;
        if constexpr (T::HIGH == 1) code |= (high[8 * j + lane / 8] >> lane % 8 & 1) << T::BITS;
        if constexpr (T::HIGH == 2)
            code |= (high[64 * (j / 4) + lane] >> j % 4 * 2 & 3) << T::BITS;
        return code;
    }
    static __device__ __forceinline__ unsigned half(const unsigned char* p, int i) {
        return ((const unsigned short*)p)[i];
    }
    __device__ __forceinline__ RawScale scale(int group) const {
        const unsigned char *own = group_at(group), *shared = group_at(group / 8 * 8) - T::SHARED;
        if constexpr (F::wide) {  // 2^(e - 128); below 2^-126 it is subnormal
            const unsigned bits = half(own, row);
            return {bits < 128 ? bits >> 6 : (bits >> 7) + 1, 0};
        }
        RawScale s = {0, 0};
        if constexpr (F::super_bytes) {
            s.own = own[row];
            if constexpr (F::scale_bytes == 2) s.own |= (unsigned)own[16 + row] << 8;
            s.shared = half(shared, row);
            if constexpr (F::super_bytes == 4) s.shared |= half(shared, 16 + row) << 16;
        } else {
            s.own = half(own, row);
            if constexpr (F::scale_bytes == 4) s.own |= half(own, 16 + row) << 16;
        }
        return s;
    }
};

template <class F>
struct Row<Tiles16<F>> : Assembled<F, Tiles16Row<F>> {};

}  // namespace tiles
