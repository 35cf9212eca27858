// Blocks as a file holds them, read where no layout could be chosen: inputs, states, parts of
// weights. Slower: everything is put together from single bytes.
#pragma once
#include "fields.cuh"
#include "formats.cuh"

template <class F>
struct Raw : F {
    using Source = Tensor;
};

__device__ __forceinline__ unsigned bytes_at(const unsigned char* b, int n) {
    unsigned word = 0;
    for (int i = 0; i < n; ++i) word |= (unsigned)b[i] << 8 * i;
    return word;
}

// code: of weight i of the block at b, all its bits; scale: of group j, and what groups share.
// Blocks of 32: a scale (and minimum), perhaps fifth bits, codes.
template <class F>
struct Block {
    static constexpr int weights = 32, nbytes = F::scale_bytes + F::high + F::code_bytes;
    static __device__ __forceinline__ int code(const unsigned char* b, int i) {
        if constexpr (F::code_runs == 2) return b[2 + i];
        int code = nibble<16>(b + nbytes - 16, i);
        if constexpr (F::high == 4) code |= (b[nbytes - 20 + i / 8] >> i % 8 & 1) << 4;
        return code;
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* b, int) {
        return {bytes_at(b, F::scale_bytes), 0};
    }
};
template <>
struct Block<nvfp4> {
    static constexpr int weights = 64, nbytes = 36;
    static __device__ __forceinline__ int code(const unsigned char* b, int i) {
        return nibble<8>(b + 4, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* b, int j) {
        unsigned first = b[2 * j], last = b[2 * j + 1];  // 0x7F would be no number
        return {(first == 0x7F ? 0 : first) | (last == 0x7F ? 0 : last) << 8, 0};
    }
};
template <>
struct Block<q2_K> {
    static constexpr int weights = 256, nbytes = 84;
    static __device__ __forceinline__ int code(const unsigned char* b, int i) {
        return pair_of_bits(b + 16, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* b, int j) {
        return {bytes_at(b + 2 * j, 2), bytes_at(b + 80, 4)};
    }
};
template <>
struct Block<q3_K> {
    static constexpr int weights = 256, nbytes = 110;
    static __device__ __forceinline__ int code(const unsigned char* b, int i) {
        return code_of_q3_K(b, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* b, int j) {
        unsigned first = scale_of_q3_K(b, 2 * j) & 255, last = scale_of_q3_K(b, 2 * j + 1) & 255;
        return {first | last << 8, bytes_at(b + 108, 2)};
    }
};
// q4_K and q5_K.
template <class F>
struct SuperBlock {
    static constexpr int weights = 256, nbytes = F::high ? 176 : 144;
    static __device__ __forceinline__ int code(const unsigned char* b, int i) {
        int code = nibble<32>(b + nbytes - 128, i);
        if constexpr (F::high == 4) code |= (b[16 + i % 32] >> i / 32 & 1) << 4;
        return code;
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* b, int j) {
        unsigned s, m;
        if (j < 4) {
            s = b[4 + j] & 63, m = b[8 + j] & 63;
        } else {
            s = (b[8 + j] & 15) | b[j] >> 6 << 4, m = b[8 + j] >> 4 | b[4 + j] >> 6 << 4;
        }
        return {s | m << 8, bytes_at(b, 4)};
    }
};
template <>
struct Block<q4_K> : SuperBlock<q4_K> {};
template <>
struct Block<q5_K> : SuperBlock<q5_K> {};
template <>
struct Block<q6_K> {
    static constexpr int weights = 256, nbytes = 210;
    static __device__ __forceinline__ int code(const unsigned char* b, int i) {
        return nibble<64>(b, i) | pair_of_bits(b + 128, i) << 4;
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* b, int j) {
        return {bytes_at(b + 192 + 2 * j, 2), bytes_at(b + 208, 2)};
    }
};
template <>
struct Block<iq4_xs> {
    static constexpr int weights = 256, nbytes = 136;
    static __device__ __forceinline__ int code(const unsigned char* b, int i) {
        return nibble<16>(b + 8, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* b, int j) {
        unsigned s = (b[4 + j / 2] >> j % 2 * 4 & 15) | (bytes_at(b + 2, 2) >> 2 * j & 3) << 4;
        return {s - 32 & 255, bytes_at(b, 2)};
    }
};
template <>
struct Block<tq1_0> {
    static constexpr int weights = 256, nbytes = 54;
    static __device__ __forceinline__ int code(const unsigned char* b, int i) {
        return digit_of_3(b, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* b, int) {
        return {0, bytes_at(b + 52, 2)};
    }
};
template <>
struct Block<tq2_0> {
    static constexpr int weights = 256, nbytes = 66;
    static __device__ __forceinline__ int code(const unsigned char* b, int i) {
        return pair_of_bits(b, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* b, int) {
        return {0, bytes_at(b + 64, 2)};
    }
};
template <class B>
struct Block<InGrid<B>> {
    static constexpr int weights = 256, nbytes = B::BYTES;
    static __device__ __forceinline__ int code(const unsigned char* b, int i) {
        return B::code(b, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* b, int j) {
        unsigned first = B::factor(b, 32 * j), last = B::factor(b, 32 * j + 16);
        return {first | last << 8, B::d(b)};
    }
};

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
    __device__ __forceinline__ int code(int group, int i) const {
        unsigned j = group % (unsigned)inside;  // so, the compiler sees what is constant in 32 j + i
        return Block<F>::code(block(group), j * 32 | i);
    }
    __device__ __forceinline__ unsigned code_word(int group, int run, int t) const {
        unsigned word = 0;
        for (int i = 0; i < 4; ++i) {
            int first = code(group, 16 * run + 4 * t + i);
            if constexpr (F::code_runs == 2) {
                word |= (unsigned)first << 8 * i;
            } else {
                int second = code(group, 16 + 4 * t + i);
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
    // Two bits of each code, from bit `shift` on.
    __device__ __forceinline__ uint2 pairs(int group, int shift) const {
        unsigned words[2] = {};
        for (int i = 0; i < 32; ++i)
            words[i / 16] |= (unsigned)(code(group, i) >> shift & 3) << (i % 4 * 8 + i / 4 % 4 * 2);
        return make_uint2(words[0], words[1]);
    }
    __device__ __forceinline__ uint2 code_pairs(int group) const { return pairs(group, 0); }
    __device__ __forceinline__ uint2 high_bits(int group) const {
        constexpr int low = F::code_runs ? 4 : 2;
        if constexpr (F::high == 8) return pairs(group, low);
        unsigned bits = 0;
        if constexpr (F::high == 4)
            for (int i = 0; i < 32; ++i)
                bits |= (unsigned)(code(group, i) >> low) << (i % 4 * 8 + i / 4);
        return make_uint2(bits, 0);
    }
    __device__ __forceinline__ RawScale scale(int group) const {
        return Block<F>::scale(block(group), group % inside);
    }
};
