// The block types as files store them.
//
//   SIZE, BYTES     elements and bytes of a block
//   code(p, i)      all bits of the code of element i of the block at p
//   scale(p, j)     undecoded scale of group j of 32 elements, and the fields that groups share
//   value(p, i)     element i, by the same f32 operations in the same order as the NumPy codecs, so
//                   copies, conversions and gathers are bit-equal
#pragma once
#include "common.cuh"
#include "fields.cuh"
#include "iq.cuh"

// The undecoded scale of a group.
struct RawScale {
    unsigned own, shared;
};

__constant__ signed char IQ4_LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                           1,    13,   25,  38,  53,  69,  89,  113};
__constant__ signed char FP4_LEVELS[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// Multiplies without contraction to FMA.
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ unsigned bytes_at(const unsigned char* b, int n) {
    unsigned word = 0;
    for (int i = 0; i < n; ++i) word |= (unsigned)b[i] << 8 * i;
    return word;
}

namespace file {

__device__ __forceinline__ float half_at(const unsigned char* p) {
    return __half2float(__ushort_as_half((unsigned short)(p[0] | p[1] << 8)));
}

// A plain type: a block of one element.
template <class T>
struct Plain {
    using Type = T;
    static constexpr int SIZE = 1, BYTES = sizeof(T);
    static __device__ __forceinline__ float value(const unsigned char* p, int) { return to_f32(*(const T*)p); }
};

struct q8_0 {
    static constexpr int SIZE = 32, BYTES = 34;
    static __device__ __forceinline__ int code(const unsigned char* p, int i) { return p[2 + i]; }
    static __device__ __forceinline__ RawScale scale(const unsigned char* p, int) {
        return {bytes_at(p, 2), 0};
    }
    static __device__ float value(const unsigned char* p, int i) {
        return times((signed char)code(p, i), half_at(p));
    }
};
// q4_0, q5_0: d (q - 2^(BITS-1)). q4_1, q5_1: d q + m. Fields: d, m, fifth bits, nibbles.
template <int BITS, bool AFFINE>
struct Linear {
    static constexpr int SIZE = 32, HEAD = AFFINE ? 4 : 2, BYTES = HEAD + (BITS == 5 ? 4 : 0) + 16;
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        int q = nibble<16>(p + BYTES - 16, i);
        if constexpr (BITS == 5) q |= bit(p + HEAD, i) << 4;
        return q;
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* p, int) {
        return {bytes_at(p, HEAD), 0};
    }
    static __device__ float value(const unsigned char* p, int i) {
        if (!AFFINE) return times(code(p, i) - (1 << (BITS - 1)), half_at(p));
        return __fadd_rn(times(code(p, i), half_at(p)), half_at(p + 2));
    }
};
using q4_0 = Linear<4, false>;
using q4_1 = Linear<4, true>;
using q5_0 = Linear<5, false>;
using q5_1 = Linear<5, true>;

struct iq4_nl {
    static constexpr int SIZE = 32, BYTES = 18;
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        return nibble<16>(p + 2, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* p, int) {
        return {bytes_at(p, 2), 0};
    }
    static __device__ float value(const unsigned char* p, int i) {
        return times(IQ4_LEVELS[code(p, i)], half_at(p));
    }
};
// d sc q - dmin m. Fields: d, dmin, 12 bytes of 6-bit sc and m, fifth bits, nibbles.
template <int BITS>
struct Super {
    static constexpr int SIZE = 256, BYTES = BITS == 5 ? 176 : 144;
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        int q = nibble<32>(p + BYTES - 128, i);
        if constexpr (BITS == 5) q |= (p[16 + i % 32] >> i / 32 & 1) << 4;
        return q;
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* p, int j) {
        unsigned s, m;
        if (j < 4) {
            s = p[4 + j] & 63, m = p[8 + j] & 63;
        } else {
            s = (p[8 + j] & 15) | p[j] >> 6 << 4, m = p[8 + j] >> 4 | p[4 + j] >> 6 << 4;
        }
        return {s | m << 8, bytes_at(p, 4)};
    }
    static __device__ float value(const unsigned char* p, int i) {
        const unsigned s = scale(p, i / 32).own;
        return __fsub_rn(times(code(p, i), times(s & 255, half_at(p))), times(s >> 8, half_at(p + 2)));
    }
};
using q4_K = Super<4>;
using q5_K = Super<5>;

struct q6_K {
    static constexpr int SIZE = 256, BYTES = 210;
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        return nibble<64>(p, i) | pair_of_bits(p + 128, i) << 4;
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* p, int j) {
        return {bytes_at(p + 192 + 2 * j, 2), bytes_at(p + 208, 2)};
    }
    static __device__ float value(const unsigned char* p, int i) {
        return times(code(p, i) - 32, times(half_at(p + 208), (signed char)p[192 + i / 16]));
    }
};
struct q2_K {
    static constexpr int SIZE = 256, BYTES = 84;
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        return pair_of_bits(p + 16, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* p, int j) {
        return {bytes_at(p + 2 * j, 2), bytes_at(p + 80, 4)};
    }
    static __device__ float value(const unsigned char* p, int i) {
        int s = p[i / 16];
        float d = times(half_at(p + 80), s & 15), m = times(half_at(p + 82), s >> 4);
        return __fsub_rn(times(d, code(p, i)), m);
    }
};
struct q3_K {
    static constexpr int SIZE = 256, BYTES = 110;
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        return code_of_q3_K(p, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* p, int j) {
        unsigned first = scale_of_q3_K(p, 2 * j) & 255, last = scale_of_q3_K(p, 2 * j + 1) & 255;
        return {first | last << 8, bytes_at(p + 108, 2)};
    }
    static __device__ float value(const unsigned char* p, int i) {
        return times(times(half_at(p + 108), scale_of_q3_K(p, i / 16)), code(p, i) - 4);
    }
};
struct iq4_xs {
    static constexpr int SIZE = 256, BYTES = 136;
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        return nibble<16>(p + 8, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* p, int j) {
        unsigned s = (p[4 + j / 2] >> j % 2 * 4 & 15) | (bytes_at(p + 2, 2) >> 2 * j & 3) << 4;
        return {s - 32 & 255, bytes_at(p, 2)};
    }
    static __device__ float value(const unsigned char* p, int i) {
        return times(IQ4_LEVELS[code(p, i)], times(half_at(p), (signed char)scale(p, i / 32).own));
    }
};
struct mxfp4 {
    static constexpr int SIZE = 32, BYTES = 17;
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        return nibble<16>(p + 1, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* p, int) { return {p[0], 0}; }
    static __device__ float value(const unsigned char* p, int i) {
        return times(FP4_LEVELS[code(p, i)], ldexpf(1.0f, p[0] - 128));
    }
};
// Four groups of 16 with a scale of 4 exponent and 3 mantissa bits, halved.
struct nvfp4 {
    static constexpr int SIZE = 64, BYTES = 36;
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        return nibble<8>(p + 4, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* p, int j) {
        unsigned first = p[2 * j], last = p[2 * j + 1];  // 0x7F is NaN
        return {(first == 0x7F ? 0 : first) | (last == 0x7F ? 0 : last) << 8, 0};
    }
    static __device__ float value(const unsigned char* p, int i) {
        int s = p[i / 16], e = s >> 3 & 15, m = s & 7;
        float d = s == 0 || s == 0x7F ? 0 : e ? ldexpf(8 + m, e - 11) : ldexpf(m, -10);
        return times(d, FP4_LEVELS[code(p, i)]);
    }
};
struct q1_0 {  // d where a bit is set, else -d
    static constexpr int SIZE = 128, BYTES = 18;
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        return bit(p + 2, i);
    }
    static __device__ __forceinline__ RawScale scale(const unsigned char* p, int) {
        return {0, bytes_at(p, 2)};
    }
    static __device__ float value(const unsigned char* p, int i) {
        return times(2 * code(p, i) - 1, half_at(p));
    }
};
// d (q - 1). Fields: CODES bytes of q, d.
template <int CODES, int (*CODE)(const unsigned char*, int)>
struct Ternary {
    static constexpr int SIZE = 256, BYTES = CODES + 2;
    static __device__ __forceinline__ int code(const unsigned char* p, int i) { return CODE(p, i); }
    static __device__ __forceinline__ RawScale scale(const unsigned char* p, int) {
        return {0, bytes_at(p + CODES, 2)};
    }
    static __device__ float value(const unsigned char* p, int i) {
        return times(half_at(p + CODES), code(p, i) - 1);
    }
};
using tq1_0 = Ternary<52, digit_of_3>;
using tq2_0 = Ternary<64, pair_of_bits>;

// Every product in `value` is exact, so their order does not matter.
template <class B>
struct InGrid {
    static constexpr int SIZE = 256, BYTES = B::BYTES;
    static __device__ __forceinline__ int code(const unsigned char* p, int i) { return B::code(p, i); }
    static __device__ __forceinline__ RawScale scale(const unsigned char* p, int j) {
        return {B::parts(p, j).own, B::d(p)};
    }
    static __device__ float value(const unsigned char* p, int i) {
        const uint4 levels = B::levels();
        const int code = B::code(p, i);
        unsigned four = code & 8 ? (code & 4 ? levels.w : levels.z) : code & 4 ? levels.y : levels.x;
        int level = (signed char)(four >> code % 4 * 8);
        float d = __half2float(__ushort_as_half((unsigned short)B::d(p)));
        return times(level, times(d, 0.125f * B::factor(p, i)));
    }
};
GRID_TYPES

// Element i of a row whose blocks are nb0 bytes apart.
template <class B>
__device__ __forceinline__ float element(const char* row, long long nb0, int i) {
    return B::value((const unsigned char*)row + i / B::SIZE * nb0, i % B::SIZE);
}

}  // namespace file
