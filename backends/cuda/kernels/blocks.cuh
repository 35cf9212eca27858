// Blocks as a file holds them, read where no layout could be chosen: inputs, states, parts of
// weights. Slower: everything is put together from single bytes.
#pragma once
#include "formats.cuh"

template <class F>
struct Raw : F {
    using Source = Tensor;
};

template <class F>
struct Block;
#define BLOCK(NAME, WEIGHTS, BYTES)                             \
    template <>                                                 \
    struct Block<NAME> {                                        \
        static constexpr int weights = WEIGHTS, nbytes = BYTES; \
    };
BLOCK(q4_0, 32, 18)
BLOCK(q4_1, 32, 20)
BLOCK(q5_0, 32, 22)
BLOCK(q5_1, 32, 24)
BLOCK(q8_0, 32, 34)
BLOCK(iq4_nl, 32, 18)
BLOCK(mxfp4, 32, 17)
BLOCK(q4_K, 256, 144)
BLOCK(q5_K, 256, 176)
BLOCK(q6_K, 256, 210)
BLOCK(iq4_xs, 256, 136)
#undef BLOCK

// The code of weight i of group j of a block, all its bits.
template <class F>
__device__ __forceinline__ int code_of(const unsigned char* b, int j, int i) {
    constexpr int bytes = Block<F>::nbytes;
    if constexpr (F::code_runs == 2) return b[2 + i];
    if constexpr (Block<F>::weights == 32) {
        int code = b[bytes - 16 + i % 16] >> i / 16 * 4 & 15;
        if constexpr (F::high == 4) code |= (b[bytes - 20 + i / 8] >> i % 8 & 1) << 4;
        return code;
    } else if constexpr (F::high == 8) {  // q6_K: runs of 128 weights, 64 bytes of nibbles each
        int code = b[j / 4 * 64 + j % 2 * 32 + i] >> j % 4 / 2 * 4 & 15;
        return code | (b[128 + j / 4 * 32 + i] >> j % 4 * 2 & 3) << 4;
    } else if constexpr (F::table) {  // iq4_xs
        return b[8 + j * 16 + i % 16] >> i / 16 * 4 & 15;
    } else {
        int code = b[bytes - 128 + j / 2 * 32 + i] >> j % 2 * 4 & 15;
        if constexpr (F::high == 4) code |= (b[16 + i] >> j & 1) << 4;
        return code;
    }
}

__device__ __forceinline__ unsigned bytes_at(const unsigned char* b, int n) {
    unsigned word = 0;
    for (int i = 0; i < n; ++i) word |= (unsigned)b[i] << 8 * i;
    return word;
}

// The scale of group j of a block, and what its groups share.
template <class F>
__device__ __forceinline__ RawScale scale_of(const unsigned char* b, int j) {
    if constexpr (F::super_bytes == 0) return {bytes_at(b, F::scale_bytes), 0};
    if constexpr (F::high == 8) return {bytes_at(b + 192 + 2 * j, 2), bytes_at(b + 208, 2)};
    if constexpr (F::table) {
        unsigned s = (b[4 + j / 2] >> j % 2 * 4 & 15) | (bytes_at(b + 2, 2) >> 2 * j & 3) << 4;
        return {s - 32 & 255, bytes_at(b, 2)};
    }
    unsigned s, m;
    if (j < 4) {
        s = b[4 + j] & 63, m = b[8 + j] & 63;
    } else {
        s = (b[8 + j] & 15) | b[j] >> 6 << 4, m = b[8 + j] >> 4 | b[4 + j] >> 6 << 4;
    }
    return {s | m << 8, bytes_at(b, 4)};
}

template <class F>
struct Row<Raw<F>> {
    static constexpr int inside = Block<F>::weights / 32;
    const unsigned char* blocks;

    Row() = default;
    __device__ __forceinline__ Row(const Tensor& a, int matrix, int tile, int row)
        : blocks(a.row<unsigned char>(min(tile * 8 + row, a.ne[1] - 1), matrix % a.ne[2],
                                      matrix / a.ne[2])) {}
    __device__ __forceinline__ const unsigned char* block(int group) const {
        return blocks + (long long)(group / inside) * Block<F>::nbytes;
    }
    __device__ __forceinline__ unsigned code_word(int group, int run, int t) const {
        unsigned word = 0;
        for (int i = 0; i < 4; ++i) {
            int first = code_of<F>(block(group), group % inside, 16 * run + 4 * t + i);
            if constexpr (F::code_runs == 2) {
                word |= (unsigned)first << 8 * i;
            } else {
                int second = code_of<F>(block(group), group % inside, 16 + 4 * t + i);
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
    __device__ __forceinline__ uint2 high_bits(int group) const {
        unsigned high[2] = {};
        if constexpr (F::high != 0)
            for (int i = 0; i < 32; ++i) {
                unsigned bits = code_of<F>(block(group), group % inside, i) >> 4;
                if (F::high == 4)
                    high[0] |= bits << (i % 4 * 8 + i / 4);
                else
                    high[i / 16] |= bits << (i % 4 * 8 + i / 4 % 4 * 2);
            }
        return make_uint2(high[0], high[1]);
    }
    __device__ __forceinline__ RawScale scale(int group) const {
        return scale_of<F>(block(group), group % inside);
    }
};
