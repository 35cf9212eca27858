// The block types whose codes stand in grids: an index names 8 codes (4 of iq3). What they say is
//
//   weight i = d / 8 * factor * level[code]
//
// with a whole factor for 16 weights. A code is what a grid says, in its low three bits, and a sign
// above them; `levels` has the level of each as a signed byte (grids.py: LEVELS).
#pragma once
#include "grids.cuh"  // made of the gguf package's by grids.py

struct Iq1Levels {  // 8 (-1, 0, 1) + 1, the same - 1
    static __device__ __forceinline__ uint4 levels() {
        return make_uint4(0x000901F9u, 0u, 0x0007FFF7u, 0u);
    }
};
struct Iq2Levels {  // 8 25 43 and their negatives
    static __device__ __forceinline__ uint4 levels() {
        return make_uint4(0x002B1908u, 0u, 0x00D5E7F8u, 0u);
    }
};
struct Iq3xxsLevels {  // 4 12 20 ... 52 62 and their negatives
    static __device__ __forceinline__ uint4 levels() {
        return make_uint4(0x1C140C04u, 0x3E342C24u, 0xE4ECF4FCu, 0xC2CCD4DCu);
    }
};
struct Iq3sLevels {  // 1 3 5 ... 15 and their negatives
    static __device__ __forceinline__ uint4 levels() {
        return make_uint4(0x07050301u, 0x0F0D0B09u, 0xF9FBFDFFu, 0xF1F3F5F7u);
    }
};

// Blocks of 256: code and factor of weight i of the block at p, and the bits of d. (Z keeps a grid
// out of kernels that do not look into it.)
namespace iq {

__device__ __forceinline__ unsigned word2(const unsigned char* p) { return p[0] | p[1] << 8; }
__device__ __forceinline__ unsigned word4(const unsigned char* p) {
    return word2(p) | word2(p + 2) << 16;
}
__device__ __forceinline__ int nibble_at(const unsigned char* p, int i) {
    return p[i / 2] >> i % 2 * 4 & 15;
}
// Code i of an entry of 8 (4), and sign i of 8.
__device__ __forceinline__ int of_8(unsigned entry, int i, unsigned signs) {
    return (entry >> 2 * (i % 8) & 3) | (signs >> i % 8 & 1) << 3;
}
__device__ __forceinline__ int of_4(unsigned entry, int i, unsigned signs) {
    return (entry >> 3 * (i % 4) & 7) | (signs >> i % 8 & 1) << 3;
}
// Seven signs; the eighth makes them even in number.
__device__ __forceinline__ unsigned even(unsigned signs) {
    signs &= 127;
    return signs | (__popc(signs) & 1) << 7;
}

struct StartsWithD {
    static __device__ __forceinline__ unsigned d(const unsigned char* p) { return word2(p); }
};

// d; for 32 weights: 4 indices, then 4 times 7 signs under 4 bits of scale.
struct iq2_xxs : StartsWithD, Iq2Levels {
    static constexpr int BYTES = 66;
    template <int Z = 0>
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        const unsigned char* q = p + 2 + i / 32 * 8;
        return of_8(iq2_xxs_grid<Z>[q[i / 8 % 4]], i, even(word4(q + 4) >> 7 * (i / 8 % 4)));
    }
    static __device__ __forceinline__ int factor(const unsigned char* p, int i) {
        return 2 * (p[9 + i / 32 * 8] >> 4) + 1;
    }
};

// d; for 8 weights: 9 bits of index, 7 signs; nibbles of scale.
struct iq2_xs : StartsWithD, Iq2Levels {
    static constexpr int BYTES = 74;
    template <int Z = 0>
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        unsigned q = word2(p + 2 + i / 8 * 2);
        return of_8(iq2_xs_grid<Z>[q & 511], i, even(q >> 9));
    }
    static __device__ __forceinline__ int factor(const unsigned char* p, int i) {
        return 2 * nibble_at(p + 66, i / 16) + 1;
    }
};

// d; indices; signs; bits 8 and 9 of indices; nibbles of scale.
struct iq2_s : StartsWithD, Iq2Levels {
    static constexpr int BYTES = 82;
    template <int Z = 0>
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        int index = p[2 + i / 8] | (p[66 + i / 32] >> i / 8 % 4 * 2 & 3) << 8;
        return of_8(iq2_s_grid<Z>[index], i, p[34 + i / 8]);
    }
    static __device__ __forceinline__ int factor(const unsigned char* p, int i) {
        return 2 * nibble_at(p + 74, i / 16) + 1;
    }
};

// d; indices; for 32 weights: 4 times 7 signs under 4 bits of scale.
struct iq3_xxs : StartsWithD, Iq3xxsLevels {
    static constexpr int BYTES = 98;
    template <int Z = 0>
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        unsigned signs = word4(p + 66 + i / 32 * 4) >> 7 * (i / 8 % 4);
        return of_4(iq3_xxs_grid<Z>[p[2 + i / 4]], i, even(signs));
    }
    static __device__ __forceinline__ int factor(const unsigned char* p, int i) {
        return 2 * (2 * (p[69 + i / 32 * 4] >> 4) + 1);
    }
};

// d; indices; their ninth bits; signs; nibbles of scale, for 32 weights each.
struct iq3_s : StartsWithD, Iq3sLevels {
    static constexpr int BYTES = 110;
    template <int Z = 0>
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        int index = p[2 + i / 4] | (p[66 + i / 32] >> i / 4 % 8 & 1) << 8;
        return of_4(iq3_s_grid<Z>[index], i, p[74 + i / 8]);
    }
    static __device__ __forceinline__ int factor(const unsigned char* p, int i) {
        return 8 * (2 * nibble_at(p + 106, i / 32) + 1);
    }
};

// d; indices; for 32 weights: 4 times 3 more bits of index, 3 bits of scale, the sign of 1.
struct iq1_s : StartsWithD, Iq1Levels {
    static constexpr int BYTES = 50;
    template <int Z = 0>
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        unsigned high = word2(p + 34 + i / 32 * 2);
        int index = p[2 + i / 8] | (high >> i / 8 % 4 * 3 & 7) << 8;
        return of_8(iq1_s_grid<Z>[index], i, high >> 15 ? 255 : 0);
    }
    static __device__ __forceinline__ int factor(const unsigned char* p, int i) {
        return 2 * (p[35 + i / 32 * 2] >> 4 & 7) + 1;
    }
};

// Indices; nibbles: three more bits of index, the sign of 1; four words: 4 times 3 bits of scale
// under a nibble of d.
struct iq1_m : Iq1Levels {
    static constexpr int BYTES = 56;
    template <int Z = 0>
    static __device__ __forceinline__ int code(const unsigned char* p, int i) {
        int high = nibble_at(p + 32, i / 8);
        return of_8(iq1_s_grid<Z>[p[i / 8] | (high & 7) << 8], i, high & 8 ? 255 : 0);
    }
    static __device__ __forceinline__ int factor(const unsigned char* p, int i) {
        return 2 * (word2(p + 48 + i / 64 * 2) >> i / 16 % 4 * 3 & 7) + 1;
    }
    static __device__ __forceinline__ unsigned d(const unsigned char* p) {
        return p[49] >> 4 | (p[51] & 0xF0) | (p[53] & 0xF0) << 4 | (p[55] & 0xF0) << 8;
    }
};

}  // namespace iq
