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

    // The dot product of half a group with its 4 code words, in units of the step.
    __device__ __forceinline__ float dot(const unsigned* words, int half) const {
        int sums[LEVELS];
#pragma unroll
        for (int i = 0; i < LEVELS; ++i) {
            uint4 v = levels[2 * i + half];
            int s = __dp4a((int)words[0], (int)v.x, 0);
            s = __dp4a((int)words[1], (int)v.y, s);
            s = __dp4a((int)words[2], (int)v.z, s);
            sums[i] = __dp4a((int)words[3], (int)v.w, s);
        }
        float high = (float)(sums[0] * 256 + sums[1]);
        if constexpr (LEVELS == 2) return high;
        return fmaf(high, 256.0f, (float)sums[LEVELS - 1]);
    }
};

// The dot product of a decoded group of weights and the same group of a column.
template <class F, int LEVELS>
__device__ __forceinline__ float dot_group(const unsigned (&words)[8], Scale s,
                                           const Fixed<LEVELS>& x) {
    float first = x.dot(words, 0), last = x.dot(words + 4, 1);
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
                             !(F::code_runs && F::super_bytes == 4)>
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
    // Calls use(i, words, scales) with the decoded group i of each row.
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
                unsigned words[ROWS][8];
                Scale scales[ROWS];
#pragma unroll
                for (int r = 0; r < ROWS; ++r) {
                    code_words<F>(table, own[r], words[r]);
                    scales[r] = F::scale(own[r].scale.own, own[r].scale.shared);
                }
                if constexpr (!LOADS_FIRST)
                    if (more) fetch(load, a, i + (a + AHEAD) * step);
                use(i + a * step, words, scales);
            }
    }
};

}  // namespace tiles
