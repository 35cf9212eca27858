// The parts of mma.cuh that kernels for 8.0 use, on a block of host threads. Include it after
// block.hpp, host.hpp and attention_words.hpp.
#pragma once

inline unsigned shared_address(const void* p) {
    return (unsigned)((const char*)p - block->memory.data());
}
inline char* at_shared(unsigned at) { return block->memory.data() + at; }

template <>
inline unsigned pack2<__half>(float a, float b) {
    const __half2 both = {(__half)a, (__half)b};
    return bits_as<unsigned>(both);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
    return byte_permutation(a, b, selector);
}

inline void copy16(unsigned to, const void* from, bool real) {
    if (real) std::memcpy(at_shared(to), from, 16);
    else std::memset(at_shared(to), 0, 16);
}
inline void copy4(unsigned to, const void* from, bool real) {
    if (real) std::memcpy(at_shared(to), from, 4);
    else std::memset(at_shared(to), 0, 4);
}
inline void warpgroup_sync(int) { wait(block->warps[threadIdx.x / 128 * 128 + 1], 128); }
inline void copies_commit() {}
template <int N>
void copies_wait() {}
template <int N>
void wgmma_hold(float (&)[N]) {}

// x of all lanes of the warp.
template <class T>
std::vector<T> of_warp(const T& x) {
    static std::vector<char> memory(64 * 32 * 64);
    char* mine = memory.data() + threadIdx.x / 32 * (32 * 64);
    static_assert(sizeof(T) <= 64);
    std::memcpy(mine + threadIdx.x % 32 * 64, &x, sizeof x);
    __syncwarp();
    std::vector<T> all(32);
    for (int lane = 0; lane < 32; ++lane) std::memcpy(&all[lane], mine + lane * 64, sizeof x);
    __syncwarp();
    return all;
}

inline void ldmatrix(unsigned (&r)[4], unsigned at) {
    const auto rows = of_warp(at);
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i)
        std::memcpy(&r[i], at_shared(rows[8 * i + lane / 4]) + lane % 4 * 4, 4);
}

// Each matrix transposed: a lane gets column lane / 4 of rows 2 (lane % 4) and one more.
inline void ldmatrix_trans(unsigned (&r)[4], unsigned at) {
    const auto rows = of_warp(at);
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half)
            std::memcpy((char*)&r[i] + 2 * half,
                        at_shared(rows[8 * i + lane % 4 * 2 + half]) + lane / 4 * 2, 2);
}

template <class T>
float number(unsigned word, int i) {
    T x;
    std::memcpy(&x, (const char*)&word + 2 * i, 2);
    if constexpr (sizeof(T) == 2 && !std::is_same_v<T, __half>) return __bfloat162float(x);
    else return (float)x;
}

// m16n8k16; see mma.cuh for the fragments.
template <class T>
void mma(float (&d)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
    struct Registers {
        unsigned a[4], b[2];
    };
    const auto all = of_warp(Registers{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    for (int e = 0; e < 4; ++e)
        for (int k = 0; k < 16; ++k) {
            const int from = k % 8 / 2, row = e / 2, column = 2 * t + e % 2;
            const float x = number<T>(all[4 * g + from].a[row + k / 8 * 2], k % 2);
            d[e] += x * number<T>(all[4 * column + from].b[k / 8], k % 2);
        }
}
