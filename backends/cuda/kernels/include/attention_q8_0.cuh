// Loads rows of q8_0 blocks (f16 scale, 32 int8) and decodes them to tiles of f16.
#pragma once
#include "mma.cuh"

// Copies rows of BYTES (a multiple of 4, as are their addresses) contiguously into shared memory;
// rows from `real` on become zeros.
template <int ROWS, int BYTES>
__device__ __forceinline__ void fetch_raw(u32 to, const char *from, long long step, int real,
                                          int thread, int threads) {
    static_assert(BYTES % 4 == 0, "copies are of 4 bytes");
    for (int i = thread; i < ROWS * (BYTES / 4); i += threads) {
        const int r = i / (BYTES / 4), c = i % (BYTES / 4);
        copy4(to + i * 4, r < real ? from + r * step + c * 4 : from, r < real);
    }
}

// Decodes such rows to f16 rows of D, stored at `at(row, chunk of 8)`. Each thread takes
// whole blocks. An int8 byte b is the f16 with bits 0x6400 + (b ^ 128) minus 1152: exact. The only
// rounding is in the product with the scale.
template <int ROWS, int D, class At>
__device__ __forceinline__ void decode_raw_to(const char *raw, int thread, int threads, At at) {
    constexpr int BLOCKS = D / 32;
    for (int i = thread; i < ROWS * BLOCKS; i += threads) {
        const u16 *block = (const u16 *)(raw + i * 34);
        const __half2 d = __half2half2(*(const __half *)block);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            u32 x[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const u32 two = block[1 + 4 * c + n] ^ 0x8080u;
                const u32 bits = __byte_perm(two, 0x64646464u, 0x4140);
                const __half2 y =
                    __hmul2(__hsub2(*(const __half2 *)&bits, __floats2half2_rn(1152.f, 1152.f)), d);
                x[n] = *(const u32 *)&y;
            }
            *(uint4 *)at(i / BLOCKS, i % BLOCKS * 4 + c) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}

// The same for whole warps, where addresses of rows are multiples of 4: a lane takes a row, so lanes
// read words in different banks, and write chunks in different ones if `at` swizzles them by row.
// Rows from `real` on become zeros.
template <int ROWS, int D, class At>
__device__ __forceinline__ void decode_rows_to(const char *raw, int real, int warp, int warps, At at) {
    constexpr int BLOCKS = D / 32;
    static_assert(ROWS % 32 == 0 && BLOCKS % 2 == 0, "pairs of blocks are whole words");
    const __half2 offset = __floats2half2_rn(1152.f, 1152.f);
    for (int i = warp; i < ROWS / 32 * BLOCKS; i += warps) {
        const int b = i % BLOCKS, r = i / BLOCKS * 32 + threadIdx.x % 32;
        u32 words[8];
        u16 bits = 0;
        if (r < real) {
            const u32 *from = (const u32 *)(raw + r * (BLOCKS * 34) + b / 2 * 68);
            if (b % 2) {
                bits = from[8] >> 16;
#pragma unroll
                for (int n = 0; n < 8; ++n) words[n] = from[9 + n];
            } else {
                u32 word = from[0];
                bits = word & 0xffff;
#pragma unroll
                for (int n = 0; n < 8; ++n) {
                    const u32 next = from[1 + n];
                    words[n] = __funnelshift_r(word, next, 16);
                    word = next;
                }
            }
        } else {
#pragma unroll
            for (int n = 0; n < 8; ++n) words[n] = 0;
        }
        const __half2 d = __half2half2(__ushort_as_half(bits));
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            u32 x[4];
#pragma unroll
            for (int n = 0; n < 4; ++n) {
                const u32 four = words[2 * c + n / 2] ^ 0x80808080u;
                const u32 two = __byte_perm(four, 0x64646464u, n % 2 ? 0x4342 : 0x4140);
                const __half2 y = __hmul2(__hsub2(*(const __half2 *)&two, offset), d);
                x[n] = *(const u32 *)&y;
            }
            *(uint4 *)at(r, b * 4 + c) = make_uint4(x[0], x[1], x[2], x[3]);
        }
    }
}

template <int ROWS, int D>
__device__ __forceinline__ void decode_raw(const char *raw, char *tile, int pitch, int thread,
                                           int threads) {
    decode_raw_to<ROWS, D>(raw, thread, threads,
                           [&](int r, int c) { return tile + r * pitch + c * 16; });
}
