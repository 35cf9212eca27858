// Products of rows in tiles and columns in fixed point: what the kernels share.
#pragma once
#include "fixed_point.cuh"
#include "raw.cuh"

namespace tiles {

// Columns in fixed point that an earlier kernel has written.
using Groups = const unsigned char*;

// A group of a column. load(i) reads its i-th 16 bytes.
template <int LEVELS>
struct Fixed {
    uint4 levels[2 * LEVELS];
    float step, first_sum, last_sum, sum;

    template <class Load>
    __device__ __forceinline__ explicit Fixed(Load load) {
#pragma unroll
        for (int i = 0; i < 2 * LEVELS; ++i) levels[i] = load(i);
        uint4 bits = load(2 * LEVELS);
        step = __uint_as_float(bits.x), first_sum = __uint_as_float(bits.y);
        last_sum = __uint_as_float(bits.z), sum = __uint_as_float(bits.w);
    }

    // The dot product of half a group with its codes, in units of the step.
    template <class Codes>
    __device__ __forceinline__ float dot(const Codes& codes, int half) const {
        int sums[LEVELS] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j)
            codes.each(half, j, [&](unsigned word) {
#pragma unroll
                for (int i = 0; i < LEVELS; ++i) {
                    const uint4 v = levels[2 * i + half];
                    const unsigned x = j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
                    sums[i] = __dp4a((int)word, (int)x, sums[i]);
                }
            });
        float high = (float)(sums[0] * 256 + sums[1]);
        if constexpr (LEVELS == 2) return high;
        return fmaf(high, 256.0f, (float)sums[LEVELS - 1]);
    }
};

// The codes of a group, to be multiplied by columns. APART: of a type with a table, each word is the
// sum of two lookups, which are multiplied one after the other. Then 28 instructions decode a group;
// with a choice between the two it is 44. For one column: dot products have units of their own, but
// there are twice as many.
template <class F, bool APART>
struct Codes {
    unsigned words[8];

    Codes() = default;
    __device__ __forceinline__ Codes(const Table<F>& table, const RawGroup<F>& raw) {
        code_words<F>(table, raw, words);
    }
    // Word j of a half.
    template <class Use>
    __device__ __forceinline__ void each(int half, int j, Use use) const {
        use(words[4 * half + j]);
    }
};
template <class F>
struct Codes<F, true> {
    uint4 words, table;

    Codes() = default;
    __device__ __forceinline__ Codes(const Table<F>& table, const RawGroup<F>& raw)
        : words(raw.codes[0]), table(table.apart) {}
    template <class Use>
    __device__ __forceinline__ void each(int half, int j, Use use) const {
        const unsigned both = j == 0 ? words.x : j == 1 ? words.y : j == 2 ? words.z : words.w;
        const unsigned own = both >> 16 * half;
        use(permute(table.x, table.y, own));
        use(permute(table.z, table.w, own ^ 0x8888));
    }
};
template <class F>
using CodesFor = Codes<F, F::table>;

// The dot product of a group of weights and the same group of a column.
template <class F, int LEVELS, bool APART>
__device__ __forceinline__ float dot_group(const Codes<F, APART>& codes, Scale s,
                                           const Fixed<LEVELS>& x) {
    float first = x.dot(codes, 0), last = x.dot(codes, 1);
    float y = F::split ? x.step * fmaf(s.s1, last, s.s0 * first) : x.step * (s.s0 * (first + last));
    if constexpr (F::split && (F::affine || F::bias))
        y = fmaf(-s.m1, x.last_sum, fmaf(-s.m0, x.first_sum, y));
    else if constexpr (F::affine || F::bias)
        y = fmaf(-s.m0, x.sum, y);
    return y;
}

// Loads above it are issued before those below. Without it, the assembler moves the loads of the
// next round to the end of this one, which saves registers, and there they are waited for at once.
__device__ __forceinline__ void issue_loads() {
#if __CUDA_ARCH__
    __syncwarp(__activemask());  // nothing depends on it
#endif
}

// The groups first, first + step, .. below n of ROWS rows; AHEAD rounds of them are on their way
// from memory. load(r, i): group i of row r, undecoded, also for i past the end.
//
// LOADS_FIRST: the next round is loaded before this one is decoded. Codes of 8 bits are so many
// bytes that enough are on their way anyway, and take too many registers. q4_K and q5_K have none
// to spare in kernels that must do with 64, nor have short codes of one row.
template <class F, int ROWS, int AHEAD,
          bool LOADS_FIRST = AHEAD == 1 && ROWS == 2 && F::code_runs < 2 &&
                             !(F::code_runs && F::super_bytes == 4),
          class C = CodesFor<F>>
struct Rounds {
    RawGroup<F> raw[AHEAD][ROWS];
    const int first, step, n;

    template <class Load>
    __device__ __forceinline__ Rounds(Load load, int first, int step, int n)
        : first(first), step(step), n(n) {
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) fetch(load, a, first + a * step);
    }
    template <class Load>
    __device__ __forceinline__ void fetch(Load load, int a, int i) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) raw[a][r] = load(r, i);
    }
    // Calls use(i, codes, scales) with group i of each row.
    template <class Load, class Use>
    __device__ __forceinline__ void each(const Table<F>& table, Load load, Use use) {
        for (int i = first; i < n; i += AHEAD * step)
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                if (a && i + a * step >= n) break;
                const bool more = i + (a + AHEAD) * step < n;
                RawGroup<F> own[ROWS];
#pragma unroll
                for (int r = 0; r < ROWS; ++r) own[r] = raw[a][r];
                if constexpr (LOADS_FIRST) {
                    if (more) fetch(load, a, i + (a + AHEAD) * step);
                    issue_loads();
                }
                C codes[ROWS];
                Scale scales[ROWS];
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    codes[r] = C(table, own[r]);
                    scales[r] = F::scale(own[r].scale.own, own[r].scale.shared);
                }
                if constexpr (!LOADS_FIRST)
                    if (more) fetch(load, a, i + (a + AHEAD) * step);
                use(i + a * step, codes, scales);
            }
    }
};

}  // namespace tiles
