// Groups of weights to A fragments of m16n8k16 (see mma.cuh), for products on the tensor cores.
#pragma once
#include "formats.cuh"

template <class T>
__device__ __forceinline__ unsigned pack2(float low, float high);  // of mma.cuh

namespace tiles {

// The part of one row's group that a thread needs: word t of each code run (weights 4 t to 4 t + 3
// and the same 16 further), or all short codes.
template <class F>
struct RawWords {
    unsigned first, second;
    uint2 high;
    RawScale scale;
};

// `row` reads the group from global or shared memory; word: which word of a run is the thread's.
template <class F, class R>
__device__ __forceinline__ RawWords<F> raw_words(const R& row, int group, int word) {
    RawWords<F> raw = {};
    if constexpr (F::code_runs == 0) {
        const uint2 codes = row.short_codes(group);
        raw.first = codes.x, raw.second = codes.y;
    } else {
        raw.first = row.code_word(group, 0, word);
    }
    if constexpr (F::code_runs == 2) raw.second = row.code_word(group, 1, word);
    raw.high = row.high_bits(group);
    raw.scale = whole_scale<F>(row.scale(group), raw.high);
    return raw;
}

__device__ __forceinline__ unsigned bits_of(__half2 x) { return *(unsigned*)&x; }

// Words of 4 codes, weights 4 t to 4 t + 3 and the same 16 further, and their scales.
template <class F>
struct Unpacked {
    unsigned words[2], own;
    Scale s;

    __device__ __forceinline__ Unpacked(const Table<F>& table, const RawWords<F>& raw, int t)
        : words{raw.first, raw.second},
          own(raw.scale.own),
          s(F::scale(raw.scale.own, raw.scale.shared)) {
        if constexpr (F::grid) {
            const Indexed q = {make_uint2(raw.first, raw.second), raw.high.x, raw.scale.own};
            unpack_indexed(table, q, t, words[0], words[1]);
        } else if constexpr (F::code_runs == 1) {
            unpack(table, raw.first, raw.high, t, words[0], words[1]);
        } else if constexpr (F::code_runs == 0) {
            unpack_short<F>(make_uint2(raw.first, raw.second), raw.high, t, words[0], words[1]);
        }
    }
    // Two weights of word i: the first two or, if j, the last two.
    __device__ __forceinline__ unsigned pair(const Table<F>& table, int i, int j) const {
        const float scale = i ? s.s1 : s.s0, low = i ? s.m1 : s.m0;
        if constexpr (F::wide) {
            const auto code = [&](int n) { return (signed char)(words[i] >> 8 * n); };
            return pack2<__nv_bfloat16>(scale * code(2 * j), scale * code(2 * j + 1));
        } else {
            // The f16 with bits 0x6400 + n is 1024 + n, for a byte n.
            constexpr int zero = F::table || F::grid || F::code_runs == 2 ? 128 : F::bias;
            const unsigned word = F::code_runs == 2 ? words[i] ^ 0x80808080u : words[i];
            const __half2 bias = __half2half2(__ushort_as_half((unsigned short)(0x6400 + zero)));
            const __half2 by = F::half_scale ? __half2half2(__ushort_as_half((unsigned short)own))
                                             : __float2half2_rn(scale);
            const unsigned raised = permute(word, table.magic, j ? 0x4342 : 0x4140);
            const __half2 code = __hsub2(*(const __half2*)&raised, bias);
            return bits_of(F::affine ? __hfma2(code, by, __float2half2_rn(-low))
                                     : __hmul2(code, by));
        }
    }
};

// pairs[0], [1]: weights 4 t to 4 t + 3; pairs[2], [3]: the same 16 further.
template <class F>
__device__ __forceinline__ void decode(const Table<F>& table, const RawWords<F>& raw, int t,
                                       unsigned (&pairs)[4]) {
    const Unpacked<F> unpacked(table, raw, t);
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = unpacked.pair(table, i / 2, i % 2);
}

// The offset that makes table entries unsigned, where the decoder needs that.
template <class F>
constexpr unsigned offset_of = F::wide ? 0 : 0x80808080u;

}  // namespace tiles
