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
    return byte_permutation(a, b, selector & 0x7777);
}

inline void copy16(unsigned to, const void* from, bool real) {
    if (real) std::memcpy(at_shared(to), from, 16);
    else std::memset(at_shared(to), 0, 16);
}
inline void copy4(unsigned to, const void* from, bool real) {
    if (real) std::memcpy(at_shared(to), from, 4);
    else std::memset(at_shared(to), 0, 4);
}
inline Barrier named[16];
inline void threads_sync(int id, int threads) { wait(named[id], threads); }
inline void threads_arrive(int id, int threads) {
    if (++named[id].count == threads) named[id].count = 0, ++named[id].round;
}
inline void warpgroup_sync(int) { wait(block->warps[threadIdx.x / 128 * 128 + 1], 128); }
inline void copies_commit() {}
template <int N>
void copies_wait() {}
template <int N>
void wgmma_hold(float (&)[N]) {}
inline void wgmma_fence() {}
inline void wgmma_commit() {}
template <int N>
void wgmma_wait() {}
inline void fence_engines() {}
inline void bulk_copy(void* to, unsigned from, unsigned nbytes) {
    std::memcpy(to, at_shared(from), nbytes);
}
inline void bulk_copies_wait() {}
template <int N>
void registers_take() {}
template <int N>
void registers_give() {}

// What `host_map` of emulated.py writes in place of a driver's map.
struct TensorMap {
    char* data;
    unsigned long long size, swizzle, ne[4], nb[3], box[4], pad[2];
};
inline void tensor_copy(char* to, const TensorMap* map, unsigned long long* b, int x, int y, int z,
                        int w) {
    const int row = map->box[0] * map->size;
    int line = 0;
    for (int l = w; l < w + (int)map->box[3]; ++l)
        for (int k = z; k < z + (int)map->box[2]; ++k)
            for (int j = y; j < y + (int)map->box[1]; ++j, ++line)
                for (int i = 0; i < row; i += 4) {
                    const bool real = x + i / map->size < map->ne[0] && j < (int)map->ne[1] &&
                                      k < (int)map->ne[2] && l < (int)map->ne[3];
                    unsigned at = line * row + i, word = 0;
                    if (map->swizzle) at ^= (at >> 7 & 7) << 4;
                    if (real)
                        std::memcpy(&word, map->data + x * map->size + i + j * map->nb[0] +
                                               k * map->nb[1] + l * map->nb[2], 4);
                    std::memcpy(to + at, &word, 4);
                }
    arrivals(b).nbytes -= row * line;
    advance(arrivals(b));
}

inline void bulk_fetch(unsigned to, const void* from, unsigned nbytes, unsigned long long* b) {
    std::memcpy(at_shared(to), from, nbytes);
    arrivals(b).nbytes -= nbytes;
    advance(arrivals(b));
}

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

inline void stmatrix_trans(unsigned at, const unsigned (&r)[4]) {
    const auto rows = of_warp(at);
    const int lane = threadIdx.x % 32;
    for (int i = 0; i < 4; ++i)
        for (int half = 0; half < 2; ++half)
            std::memcpy(at_shared(rows[8 * i + lane % 4 * 2 + half]) + lane / 4 * 2,
                        (const char*)&r[i] + 2 * half, 2);
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

// A tile in shared memory; see mma.cuh. Chunks of 16 bytes are swizzled by their line of 128 bytes.
inline unsigned long long tile_descriptor(unsigned at, unsigned leading) {
    return (unsigned long long)leading << 32 | at;
}
inline unsigned long long further(unsigned long long tile, unsigned nbytes) { return tile + nbytes; }
template <class T>
float at_tile(unsigned at) {
    return number<T>(*(unsigned short*)at_shared(at ^ (at >> 7 & 7) << 4), 0);
}

// m64nNk16: a warp has 16 of the 64 rows, in fragments like those of mma. All of it happens at once,
// so this finds wrong addresses, not products that are used too early.
template <class T, int N, class A>
void wgmma(float (&d)[N / 2], A a, bool turned, unsigned long long b, int add) {
    const int lane = threadIdx.x % 32, leading = b >> 32;
    float x[2][16];
    for (int r = 0; r < 2; ++r)
        for (int k = 0; k < 16; ++k) x[r][k] = a(lane / 4 + 8 * r, k);
    for (int c = 0; c < N / 4; ++c) {
        const int n = c / 2 * 8 + lane % 4 * 2 + c % 2;
        float y[16];
        for (int k = 0; k < 16; ++k)
            y[k] = at_tile<T>((unsigned)b + (turned ? n / 64 * leading + k * 128 + n % 64 * 2
                                                    : n * 128 + k * 2));
        for (int r = 0; r < 2; ++r) {
            float& sum = d[c / 2 * 4 + r * 2 + c % 2];
            if (!add) sum = 0;
            for (int k = 0; k < 16; ++k) sum += x[r][k] * y[k];
        }
    }
}
template <class T, int N>
void wgmma_ss(float (&d)[N / 2], unsigned long long a, unsigned long long b, int add) {
    const unsigned at = (unsigned)a + threadIdx.x / 32 % 4 * (16 * 128);
    wgmma<T, N>(d, [&](int row, int k) { return at_tile<T>(at + row * 128 + k * 2); }, false, b, add);
}
inline void wgmma_columns(float (&d)[16], unsigned long long a, unsigned long long b, int add) {
    const unsigned at = (unsigned)a + threadIdx.x / 32 % 4 * 32;
    wgmma<__half, 32>(
        d, [&](int row, int k) { return at_tile<__half>(at + k * 128 + row * 2); }, false, b, add);
}
template <class T, int N>
void wgmma_rs(float (&d)[N / 2], const unsigned (&a)[4], unsigned long long b, int add) {
    struct Registers {
        unsigned a[4];
    };
    const auto all = of_warp(Registers{{a[0], a[1], a[2], a[3]}});
    wgmma<T, N>(
        d,
        [&](int row, int k) {
            return number<T>(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], k % 2);
        },
        true, b, add);
}
