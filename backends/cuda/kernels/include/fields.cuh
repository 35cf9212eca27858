// Reads single codes and scales from the fields of a block.
#pragma once

// Code i of 4-bit fields in runs of RUN bytes: the low nibbles of a run, then the high ones.
template <int RUN>
__device__ __forceinline__ int nibble(const unsigned char* field, int i) {
    int byte = field[i / (2 * RUN) * RUN + i % RUN];
    return i / RUN % 2 ? byte >> 4 : byte & 15;
}
// Code i of 2-bit fields: 4 runs of 32 in 32 bytes.
__device__ __forceinline__ int pair_of_bits(const unsigned char* field, int i) {
    return field[i / 128 * 32 + i % 32] >> (i / 32 % 4 * 2) & 3;
}
// Bit i of a field.
__device__ __forceinline__ int bit(const unsigned char* field, int i) {
    return field[i / 8] >> i % 8 & 1;
}
// Base-3 digit i of tq1_0. A byte holds up to five digits, the first one highest: 32 bytes of 5, 16
// of 5, 4 of 4.
__device__ __forceinline__ int digit_of_3(const unsigned char* p, int i) {
    int at = i < 160 ? i % 32 : i < 240 ? 32 + (i - 160) % 16 : 48 + (i - 240) % 4;
    int digit = i < 160 ? i / 32 : i < 240 ? (i - 160) / 16 : (i - 240) / 4;
    unsigned char q = p[at];
    for (int k = 0; k < digit; k++) q *= 3;
    return q * 3 >> 8;
}
// Code i of q3_K: three bits.
__device__ __forceinline__ int code_of_q3_K(const unsigned char* p, int i) {
    return pair_of_bits(p + 32, i) | (p[i % 32] >> i / 32 & 1) << 2;
}
// Scale g of q3_K: 16 scales of 6 bits in 12 bytes, low nibbles first.
__device__ __forceinline__ int scale_of_q3_K(const unsigned char* p, int g) {
    const unsigned char* s = p + 96;
    int low = g < 8 ? s[g] & 15 : s[g - 8] >> 4, high = s[8 + g % 4] >> (g / 4 * 2) & 3;
    return (low | high << 4) - 32;
}
