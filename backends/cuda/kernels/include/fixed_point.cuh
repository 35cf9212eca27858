// Activations in fixed point, in groups of 32: LEVELS runs of 32 signed bytes (highest first), then
// {step, sum of the first 16, sum of the last 16, sum}.
#pragma once
#include "common.cuh"

template <int LEVELS>
constexpr int group_bytes = 32 * LEVELS + 16;

// What follows the bytes of a group, of values that have yet to be multiplied by a factor.
struct FixedEnd {
    float step;
    int first, last;  // sums of 16 numbers

    __device__ __forceinline__ void put(float4* at, float factor) const {
        const float by = step * factor, low = by * first, high = by * last;
        *at = make_float4(by, low, high, low + high);
    }
};

// In one instruction, 1 ulp off; x and the result are normal.
__device__ __forceinline__ float reciprocal_of(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Encodes a group, all but its end, which is the first lane's. Lanes 8 i to 8 i + 7 of a warp have
// four adjacent values each; the other lanes need not take part. WHOLE: all lanes do, which takes a
// third of the instructions off: the compiler does not know which lanes a mask of 8 has. Then only
// those store that have a real group.
template <int LEVELS, bool WHOLE = false>
__device__ __forceinline__ FixedEnd put_levels(const float (&x)[4], unsigned char* at,
                                               bool real = true) {
    const int lane = threadIdx.x & 7;
    const unsigned mask = WHOLE ? ~0u : 0xFFu << (threadIdx.x & 24);
    float most = fmaxf(fmaxf(fabsf(x[0]), fabsf(x[1])), fmaxf(fabsf(x[2]), fabsf(x[3])));
    float sound = x[0] + x[1] + x[2] + x[3];  // NaN or infinite if some x is
    for (int i = 1; i < 8; i *= 2) {
        most = fmaxf(most, __shfl_xor_sync(mask, most, i));
        sound += __shfl_xor_sync(mask, sound, i);
    }
    // 127 in every byte, minus a little where rounding could carry past it.
    constexpr float top = LEVELS == 2 ? 127 * 257 : 127 * 65793 - 16;
    // A step below 2^-126 would lose bits; f32 products treat such a group as zero anyway.
    // Products in place of quotients: what they are off moves no value past the top.
    float step = most * (1 / top), inverse = step < 1.1754944e-38f ? 0.0f : reciprocal_of(step);
    unsigned packed[LEVELS] = {};
    int sum = 0;
    for (int i = 0; i < 4; ++i) {
        int q = __float2int_rn(x[i] * inverse);
        sum += q;
        for (int level = LEVELS - 1; level >= 0; --level) {
            int low = (int)(signed char)q;
            packed[level] |= (unsigned)(low & 255) << 8 * i;
            q = (q - low) >> 8;
        }
    }
    sum += __shfl_xor_sync(mask, sum, 1);
    sum += __shfl_xor_sync(mask, sum, 2);
    int other = __shfl_xor_sync(mask, sum, 4);
    if (isnan(sound) || isinf(most)) step = __int_as_float(0x7FC00000);
    if (!WHOLE || real)
        for (int level = 0; level < LEVELS; ++level)
            ((unsigned*)(at + 32 * level))[lane] = packed[level];
    return {step, sum, other};
}

template <int LEVELS, bool WHOLE = false>
__device__ __forceinline__ void put_fixed(const float (&x)[4], unsigned char* at, bool real = true) {
    const FixedEnd end = put_levels<LEVELS, WHOLE>(x, at, real);
    if ((threadIdx.x & 7) == 0 && (!WHOLE || real)) end.put((float4*)(at + 32 * LEVELS), 1.0f);
}
