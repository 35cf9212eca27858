// Products with blocks as files store them, for tensors that could not be repacked: inputs, states,
// parts of weights. Slower, because everything is assembled from single bytes.
#pragma once
#include "formats.cuh"

namespace tiles {

template <class F>
struct Raw : F {
    using Source = Tensor;
};

// The rows of a file.
template <class F>
struct FileRow {
    const unsigned char* blocks;

    FileRow() = default;
    __device__ __forceinline__ FileRow(const Tensor& a, int matrix, int tile, int row)
        : blocks(a.row<unsigned char>(min(tile * 8 + row, a.ne[1] - 1), matrix % a.ne[2],
                                      matrix / a.ne[2])) {}
    // Goes some matrices of dimension 2 further.
    __device__ __forceinline__ void skip(const Tensor& a, int matrices) { blocks += matrices * a.nb[2]; }
    __device__ __forceinline__ void pin() { asm volatile("" : "+l"(blocks)); }
    __device__ __forceinline__ const unsigned char* block(int group) const {
        return blocks + (long long)(group / F::block_groups) * F::Blocks::BYTES;
    }
    __device__ __forceinline__ int code(int group, int i) const {
        unsigned j = group % (unsigned)F::block_groups;  // so 32 j + i has a constant part
        return F::Blocks::code(block(group), j * 32 | i);
    }
    __device__ __forceinline__ RawScale scale(int group) const {
        return F::Blocks::scale(block(group), group % F::block_groups);
    }
    // All of a group of a type with a grid.
    __device__ __forceinline__ Indexed indexed(int group) const {
        return F::Grid::parts(block(group), group % F::block_groups);
    }
};

// A row of a file or of other memory, as products read rows of tiles. `Codes` has code(group, i)
// and scale(group).
template <class F, class Codes>
struct Assembled : Codes {
    using Codes::Codes;
    static constexpr bool holds = false;
    __device__ __forceinline__ void hold(int) {}
    __device__ __forceinline__ void fetch(int) const {}
    __device__ __forceinline__ unsigned code_word(int group, int run, int t) const {
        unsigned word = 0;
        for (int i = 0; i < 4; ++i) {
            int first = this->code(group, 16 * run + 4 * t + i);
            if constexpr (F::code_runs == 2) {
                word |= (unsigned)first << 8 * i;
            } else {
                int second = this->code(group, 16 + 4 * t + i);
                word |= (unsigned)(first & 15) << (F::table ? 4 : 8) * i;
                word |= (unsigned)(second & 15) << (F::table ? 4 * i + 16 : 8 * i + 4);
            }
        }
        return word;
    }
    __device__ __forceinline__ uint4 code_run(int group, int run) const {
        return make_uint4(code_word(group, run, 0), code_word(group, run, 1),
                          code_word(group, run, 2), code_word(group, run, 3));
    }
    // Two bits of each code, starting at bit `shift`.
    __device__ __forceinline__ uint2 pairs(int group, int shift) const {
        unsigned words[2] = {};
        for (int i = 0; i < 32; ++i)
            words[i / 16] |= (unsigned)(this->code(group, i) >> shift & 3)
                             << (i % 4 * 8 + i / 4 % 4 * 2);
        return make_uint2(words[0], words[1]);
    }
    // The last bit of each code, bit `shift`.
    __device__ __forceinline__ uint2 bits(int group, int shift) const {
        constexpr int unrolled = F::code_bytes == 4 ? 8 : 32;  // with 32, one-bit codes spill on 8.0
        unsigned word = 0;
#pragma unroll unrolled
        for (int i = 0; i < 32; ++i)
            word |= (unsigned)(this->code(group, i) >> shift) << (i % 4 * 8 + i / 4);
        return make_uint2(word, 0);
    }
    __device__ __forceinline__ uint2 short_codes(int group, bool = false) const {
        if constexpr (F::grid) return this->indexed(group).codes;
        if constexpr (F::code_bytes == 4) return bits(group, 0);
        return pairs(group, 0);
    }
    __device__ __forceinline__ uint2 high_bits(int group) const {
        constexpr int low = F::code_runs ? 4 : 2;
        if constexpr (F::grid) return make_uint2(this->indexed(group).high, 0);
        if constexpr (F::high == 8) return pairs(group, low);
        if constexpr (F::high == 4) return bits(group, low);
        return {};
    }
};

template <class F>
struct Row<Raw<F>> : Assembled<F, FileRow<F>> {
    using Assembled<F, FileRow<F>>::Assembled;
};

}  // namespace tiles
