// lightning_indexer: y[j, t] = sum_n w[n, t] max(0, q[:, n, t] . k[:, j]) + mask[j, t], on tensor
// cores, for rows of 128 elements of f16, bf16 or q8_0.
// @kernel scores<{__half|__nv_bfloat16|q8_0}, {32|64}, {false|true}>
// @kernel hot 90a scores<{__half|__nv_bfloat16|q8_0}, {32|64}, {false|true}>
// @kernel pack_queries<{__half|__nv_bfloat16}, {32|64}>
//
// Rows of the cache are the A of a product, and a token's heads are its B. A warpgroup loads its 64
// or 128 rows straight into registers as fragments, once, and multiplies them with one token after
// another. So a row is read once for a chunk of tokens, and products of heads never leave registers:
// relu, weights and the sum over heads follow in place. Elements of a row are in the order in which
// 16-byte loads put them into fragments; queries have the same order in shared memory.
//
// One token: the cache is read at its bandwidth, and each block rounds the queries itself. More
// tokens: `pack_queries` writes images of B to scratch, which are copied as they are. The next
// product runs while a warpgroup weights and sums the last one. If a token sees none of a
// warpgroup's rows, they are not multiplied, but written: -inf.
//
// q is scaled by a power of two for each head to magnitudes below 1, so that f16 cannot overflow;
// the weight has the inverse.
//
// Traffic: one token: rows, and the queries from L2 for each block. Chunks of tokens: a row and a
// token's image are read from L2 for each pair of a block of rows and a chunk.
//
// Designs that lost. By count: rows by way of shared memory take as much of its bandwidth as B does;
// heads as A and rows as B need a reduction over 8 lanes in place of 4 for each row. Measured on an
// H100: queries loaded behind the rows, one after another, 5.6 to 11.7 us for 8,192 rows of f16, 3.4
// now; chunks whose warpgroups all wait at each token, 290 TFLOP/s.
#include "indexer.cuh"
#include "attention_q8_0.cuh"
#include "linear_mma.cuh"

struct q8_0;
constexpr int D = 128, STEPS = D / 32;

template <class K> struct OperandOf { using Type = K; };
template <> struct OperandOf<q8_0> { using Type = __half; };
template <class A, class B> constexpr bool same_type = false;
template <class A> constexpr bool same_type<A, A> = true;

// An image of a token's N heads: B in two halves of 64 columns, in 128-byte rows that are swizzled
// as wgmma wants them, then the weights. In shared memory it takes a multiple of 1024 bytes.
template <int N> constexpr int B_BYTES = N * D * 2;
template <int N> constexpr int IMAGE = B_BYTES<N> + N * 4;
template <int N> constexpr int STAGE = B_BYTES<N> + 1024;
constexpr int STAGES = 4;
constexpr int RAW = 34 * STEPS;  // bytes of a row of q8_0

// The heads of a token that a warp rounds to an image: warp, warp + WARPS, .. of N. All loads start
// before the first is waited for.
template <class T, int N, int WARPS>
struct Heads {
    static constexpr int MINE = N / WARPS;
    float4 x[MINE];
    float w[MINE];

    __device__ __forceinline__ void load(const Indexer &a, int t, int i3, int group) {
        const int lane = threadIdx.x % 32, first = group * N + threadIdx.x / 32;
        const char *q = a.q + t * a.nb_q[1] + i3 * a.nb_q[2] + lane * 16;
        const char *from = a.w + t * a.nb_w[1] + i3 * a.nb_w[2];
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            x[i] = *(const float4 *)(q + (first + i * WARPS) * a.nb_q[0]);
            w[i] = *(const float *)(from + (first + i * WARPS) * a.nb_w[0]) * a.scale;
        }
    }
    __device__ __forceinline__ void store(char *image) const {
        const int lane = threadIdx.x % 32;
        // Elements 8t + 4h + 2u + {0, 1} of 32 go to 16h + 8u + 2t + {0, 1}.
        const int s = lane / 8, quad = lane % 8 / 2, chunk = s % 2 * 4 + lane % 2 * 2;
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            const int n = threadIdx.x / 32 + i * WARPS;
            const float4 v = x[i];
            const int e = exponent_of(v);
            const float down = __uint_as_float((127 - e) << 23);
            char *to = image + s / 2 * (N * 128) + n * 128 + quad * 4;
            *(u32 *)(to + ((chunk ^ (n & 7)) << 4)) = pack2<T>(v.x * down, v.y * down);
            *(u32 *)(to + ((chunk + 1 ^ (n & 7)) << 4)) = pack2<T>(v.z * down, v.w * down);
            if (lane == 0)
                ((float *)(image + B_BYTES<N>))[n] = w[i] * __uint_as_float((127 + e) << 23);
        }
    }
};

// grid: tokens, groups of N heads, n3.
template <class T, int N>
__global__ void __launch_bounds__(256) pack_queries(const __grid_constant__ Indexer a) {
    begin();
    const int t = blockIdx.x, group = blockIdx.y, i3 = blockIdx.z;
    const long long number = ((long long)i3 * a.n_tokens + t) * gridDim.y + group;
    Heads<T, N, 8> heads;
    heads.load(a, t, i3, group);
    heads.store(a.images + number * IMAGE<N>);
}

// sums = A B (FIRST) or sums += A B for 32 elements, as in begin_product.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
template <class T, int N>
__device__ __forceinline__ void wgmma_first(float (&d)[N / 2], const u32 (&a)[4], u64 b);
#define FIRST(T, NAME, N, NAMES, OUTS, A, B, C, D, E)                                            \
    template <>                                                                                  \
    __device__ __forceinline__ void wgmma_first<T, N>(float (&d)[N / 2], const u32(&a)[4],       \
                                                      u64 b) {                                   \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                  \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" NAMES  \
                     "}, {%" #A ",%" #B ",%" #C ",%" #D "}, %" #E ", p, 1, 1, 0;\n}"             \
                     : OUTS                                                                      \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                      \
    }
FIRST(__half, "f16", 32, NAMES32, ARGS(D32(0)), 16, 17, 18, 19, 20)
FIRST(__nv_bfloat16, "bf16", 32, NAMES32, ARGS(D32(0)), 16, 17, 18, 19, 20)
FIRST(__half, "f16", 64, NAMES64, ARGS(D64(0)), 32, 33, 34, 35, 36)
FIRST(__nv_bfloat16, "bf16", 64, NAMES64, ARGS(D64(0)), 32, 33, 34, 35, 36)
#undef FIRST
#endif

// Starts the products of 16 rows of each warp with N heads.
template <class T, int N>
__device__ __forceinline__ void start(float (&sums)[N / 2], const u32 (&a)[STEPS][2][4], u32 b) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < STEPS; ++s)
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const u64 at = tile_descriptor(b + s / 2 * (N * 128) + s % 2 * 64 + k * 32, 16);
            if (s == 0 && k == 0) wgmma_first<T, N>(sums, a[s][k], at);
            else wgmma_by_rows<T, N>(sums, a[s][k], at);
        }
    wgmma_commit();
#else
#pragma unroll
    for (float &x : sums) x = 0;
#pragma unroll
    for (int s = 0; s < STEPS; ++s) begin_product<T, N>(sums, a[s], b + s / 2 * (N * 128), s % 2 * 2);
#endif
}

// Fragments of a warp's 16 rows of a tile of 64: rows g and g + 8 for lanes 4g to 4g + 3.
using Fragments = u32[STEPS][2][4];

__device__ __forceinline__ void put(u32 (&to)[2][4], const uint4 &x, const uint4 &y) {
    to[0][0] = x.x, to[0][1] = y.x, to[0][2] = x.y, to[0][3] = y.y;
    to[1][0] = x.z, to[1][1] = y.z, to[1][2] = x.w, to[1][3] = y.w;
}

// What a warpgroup does with tiles.
template <class K, int N>
struct Tiles {
    using T = typename OperandOf<K>::Type;
    const Indexer &a;
    const char *k, *out, *mask;
    int live, lane, warp;

    __device__ Tiles(const Indexer &a)
        : a(a), k(a.k + blockIdx.z * a.nb_k[1]), out(a.out + blockIdx.z * a.nb_out[1]),
          mask(a.mask ? a.mask + blockIdx.z % a.mask_batch * a.nb_mask[1] : nullptr), live(a.live()),
          lane(threadIdx.x % 32), warp(threadIdx.x / 32 % 4) {}

    // A lane's own row: lanes 0 and 1 of a quad have rows g and g + 8, so have 2 and 3.
    __device__ int own(int tile) const { return tile * 64 + warp * 16 + lane / 4 + lane % 2 * 8; }

    // What is added to the score of the own row: -inf if the token does not see it.
    __device__ float bias(int tile, int t) const {
        const int j = own(tile);
        if (j >= live) return __int_as_float(0xFF800000);
        return mask ? __half2float(((const __half *)(mask + t * a.nb_mask[0]))[j]) : 0;
    }

    // Loads fragments of f16 or bf16 rows. Past the last row it is loaded again.
    __device__ void load(Fragments &rows, int tile) const {
        const int g = tile * 64 + warp * 16 + lane / 4;
        const char *low = k + min(g, a.n_kv - 1) * a.nb_k[0] + lane % 4 * 16;
        const char *high = k + min(g + 8, a.n_kv - 1) * a.nb_k[0] + lane % 4 * 16;
#pragma unroll
        for (int s = 0; s < STEPS; ++s)
            put(rows[s], *(const uint4 *)(low + s * 64), *(const uint4 *)(high + s * 64));
    }
    // The same for q8_0: starts copies of the tile's rows as they are ..
    __device__ void fetch(char *raw, int tile) const {
        const int real = max(0, min(64, a.n_kv - tile * 64));
        const char *from = k + (real ? tile * 64 : 0) * a.nb_k[0];
        fetch_raw<64, RAW>(shared_address(raw), from, a.nb_k[0], real, threadIdx.x % 128, 128);
    }
    // .. and decodes them to fragments.
    __device__ void decode(Fragments &rows, const char *raw) const {
        const char *low = raw + (warp * 16 + lane / 4) * RAW;
#pragma unroll
        for (int s = 0; s < STEPS; ++s) put(rows[s], eight(low, s), eight(low + 8 * RAW, s));
    }
    // The eight elements of a lane in block s of a row.
    __device__ uint4 eight(const char *row, int s) const {
        const char *block = row + s * 34;
        const __half2 d = __half2half2(*(const __half *)block);
        const u32 *at = (const u32 *)(block + 2 + lane % 4 * 8 - (s % 2 ? 0 : 2));
        u32 low, high;
        if (s % 2) low = at[0], high = at[1];  // odd blocks have their codes at multiples of 4
        else low = __funnelshift_r(at[0], at[1], 16), high = __funnelshift_r(at[1], at[2], 16);
        return make_uint4(two(low, 0x4140, d), two(low, 0x4342, d), two(high, 0x4140, d),
                          two(high, 0x4342, d));
    }
    // As in attention_q8_0.cuh: exact but for the product with the scale.
    static __device__ u32 two(u32 codes, u32 selector, __half2 d) {
        const u32 bits = __byte_perm(codes ^ 0x80808080u, 0x64646464u, selector);
        const __half2 y =
            __hmul2(__hsub2(*(const __half2 *)&bits, __floats2half2_rn(1152.f, 1152.f)), d);
        return *(const u32 *)&y;
    }

    // Adds the weighted products of N heads to the scores of rows g and g + 8.
    static __device__ void add(float (&y)[2], const float (&sums)[N / 2], const float *weights) {
        const int t = threadIdx.x % 4;
        float more[2] = {};  // two chains of sums are half as long
#pragma unroll
        for (int n = 0; n < N / 8; ++n) {
            const float2 w = *(const float2 *)(weights + 8 * n + 2 * t);
            y[0] = fmaf(w.x, relu(sums[4 * n]), y[0]);
            y[1] = fmaf(w.x, relu(sums[4 * n + 2]), y[1]);
            more[0] = fmaf(w.y, relu(sums[4 * n + 1]), more[0]);
            more[1] = fmaf(w.y, relu(sums[4 * n + 3]), more[1]);
        }
        y[0] += more[0], y[1] += more[1];
    }
    // Writes the score of the own row.
    __device__ void write(int tile, int t, const float (&y)[2], float bias) const {
        float x[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            x[r] = y[r] + __shfl_xor_sync(~0u, y[r], 1);
            x[r] += __shfl_xor_sync(~0u, x[r], 2);
        }
        const int j = own(tile);
        if (lane % 4 < 2 && j < a.n_kv)
            ((float *)(out + t * a.nb_out[0]))[j] = hides(bias) ? bias : (lane % 2 ? x[1] : x[0]) + bias;
    }
};

// One token. A warpgroup has every `step`-th tile; while it multiplies one, the next is on its way.
// Queries are loaded before rows: behind them, they would arrive last.
// grid: blocks, 1, n3.
template <class K, int N>
__device__ __forceinline__ void one_token(const Indexer &a, char *memory) {
    using Mine = Tiles<K, N>;
    using T = typename Mine::T;
    constexpr bool RAW_ROWS = same_type<K, q8_0>;
    const int groups = a.heads / N, warpgroup = threadIdx.x / 128;
    const int tiles = (a.n_kv + 63) / 64, step = 4 * gridDim.x;
    Heads<T, N, 16> heads;
    if (a.early == NOTHING) begin();
    heads.load(a, 0, blockIdx.z, 0);
    if (a.early == QUERIES) begin();
    const Mine mine(a);
    Fragments rows[2];
    float bias[2];
    // Two buffers for each warpgroup, of which one has arrived where the other is awaited.
    char *raw = memory + groups * STAGE<N> + warpgroup * (2 * 64 * RAW);
    const auto load = [&](int which, int tile) {
        if (tile < tiles) {
            bias[which] = mine.bias(tile, 0);
            if constexpr (RAW_ROWS) mine.fetch(raw + which * (64 * RAW), tile);
            else mine.load(rows[which], tile);
        }
        if constexpr (RAW_ROWS) copies_commit();
    };
    const int first = warpgroup * gridDim.x + blockIdx.x;
    load(0, first);
    load(1, first + step);
    if (a.early == ALL) begin();
    heads.store(memory);
    for (int group = 1; group < groups; ++group) {
        heads.load(a, 0, blockIdx.z, group);
        heads.store(memory + group * STAGE<N>);
    }
    fence_engines_for_wgmma();
    __syncthreads();
    for (int start_tile = first; start_tile < tiles; start_tile += 2 * step)
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            const int tile = start_tile + which * step;
            if (tile >= tiles) break;
            if constexpr (RAW_ROWS) {
                copies_wait<1>();
                warpgroup_sync(1 + warpgroup);
                mine.decode(rows[which], raw + which * (64 * RAW));
                warpgroup_sync(1 + warpgroup);
            }
            const float own = bias[which];
            float y[2] = {}, sums[N / 2];
            for (int group = 0; group < groups; ++group) {
                const char *image = memory + group * STAGE<N>;
                start<T, N>(sums, rows[which], shared_address(image));
                wait_products<0>();
                wgmma_hold(sums);
                if (group == groups - 1) load(which, tile + 2 * step);
                Mine::add(y, sums, (const float *)(image + B_BYTES<N>));
            }
            mine.write(tile, 0, y, own);
        }
}

// The images of a chunk's tokens on their way through STAGES places in shared memory. Warpgroups may
// be at different steps: on 9.0 one thread starts the copies, and warps report what they have read.
template <int N>
struct Images {
    char *memory;
    const char *from;
    int steps;

#if __CUDA_ARCH__ >= 900
    u64 *full, *empty;

    __device__ Images(char *memory, const char *from, int steps) : memory(memory), from(from), steps(steps) {
        __shared__ u64 barriers[2 * STAGES];
        full = barriers, empty = barriers + STAGES;
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; ++i)
                barrier_init(full + i, 1), barrier_init(empty + i, blockDim.x / 32);
            fence_barriers();
        }
        __syncthreads();
    }
    __device__ __forceinline__ void copy(int step) const {
        if (threadIdx.x || step >= steps) return;
        const int at = step % STAGES;
        if (step >= STAGES) barrier_wait(empty + at, step / STAGES + 1 & 1);
        barrier_expect(full + at, IMAGE<N>);
        asm volatile(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                shared_address(memory + at * STAGE<N>)),
            "l"(from + (long long)step * IMAGE<N>), "r"(IMAGE<N>), "r"(shared_address(full + at))
            : "memory");
    }
    __device__ __forceinline__ void wait(int step) const {
        barrier_wait(full + step % STAGES, step / STAGES & 1);
    }
    __device__ __forceinline__ void release(int step) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(empty + step % STAGES);
    }
#else
    __device__ Images(char *memory, const char *from, int steps) : memory(memory), from(from), steps(steps) {}
    __device__ __forceinline__ void copy(int step) const {
        if (step < steps) {
            const u32 to = shared_address(memory) + step % STAGES * STAGE<N>;
            const char *image = from + (long long)step * IMAGE<N>;
            for (int i = threadIdx.x * 16; i < IMAGE<N>; i += blockDim.x * 16)
                copy16(to + i, image + i, true);
        }
        copies_commit();
    }
    __device__ __forceinline__ void wait(int) const {
        copies_wait<2>();
        __syncthreads();
    }
    __device__ __forceinline__ void release(int) const {}
#endif
};

// The mask of a token over the 128 rows of a warpgroup: a lane has four, each warp has all. So each
// warp knows by itself whether the warpgroup sees some of them.
struct Seen {
    u32 words[2];

    template <class Mine>
    __device__ Seen(const Mine &mine, int tile0, int t) {
        const int j = tile0 * 64 + mine.lane * 4;
        const u16 *at = (const u16 *)(mine.mask + t * mine.a.nb_mask[0]) + j;
        words[0] = words[1] = 0;
        if (j + 4 <= mine.live && (!mine.mask || ((u64)at & 7) == 0)) {
            if (mine.mask) {
                const uint2 four = *(const uint2 *)at;
                words[0] = four.x, words[1] = four.y;
            }
            return;
        }
#pragma unroll
        for (int e = 0; e < 4; ++e) {
            const u32 half = j + e >= mine.live ? 0xFC00 : mine.mask ? at[e] : 0;  // -inf
            words[e / 2] |= half << e % 2 * 16;
        }
    }
    __device__ bool any() const {
        return __any_sync(~0u, words[0] != 0xFC00FC00 || words[1] != 0xFC00FC00);
    }
    // The bias of a lane's own row of a tile.
    template <class Mine>
    __device__ float bias(const Mine &mine, int tile) const {
        const int r = mine.own(tile), from = r / 4;
        const u32 low = __shfl_sync(~0u, words[0], from), high = __shfl_sync(~0u, words[1], from);
        return __half2float(__ushort_as_half((r & 2 ? high : low) >> r % 2 * 16 & 0xFFFF));
    }
};

// Chunks of tokens: a warpgroup has two tiles. grid: blocks of rows, chunks, n3.
template <class K, int N>
__device__ __forceinline__ void more_tokens(const Indexer &a, char *memory) {
    using Mine = Tiles<K, N>;
    using T = typename Mine::T;
    const int groups = a.heads / N;
    const int t0 = blockIdx.y * a.chunk, t1 = min(a.n_tokens, t0 + a.chunk);
    const int steps = (t1 - t0) * groups;
    const int tile0 = (blockIdx.x * (blockDim.x / 128) + threadIdx.x / 128) * 2;
    const Mine mine(a);
    Fragments rows[2];
    if constexpr (same_type<K, q8_0>) {
        char *raw = memory + threadIdx.x / 128 * (128 * RAW);
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) mine.fetch(raw + tile * (64 * RAW), tile0 + tile);
        copies_commit();
        copies_wait<0>();
        __syncthreads();
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) mine.decode(rows[tile], raw + tile * (64 * RAW));
        fence_engines_for_wgmma();  // copies of images follow what was read here
        __syncthreads();
    } else {
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) mine.load(rows[tile], tile0 + tile);
    }
    const Images<N> images(
        memory, a.images + ((long long)blockIdx.z * a.n_tokens + t0) * groups * IMAGE<N>, steps);
    images.copy(0);
    images.copy(1);
    Seen next(mine, tile0, t0), now = next;
    float y[2][2] = {};
    bool visible = false;
    int t = t0, group = 0;
    for (int step = 0; step < steps; ++step) {
        images.copy(step + 2);
        if (group == 0) {
            now = next, visible = now.any();
            if (t + 1 < t1) next = Seen(mine, tile0, t + 1);
        }
        images.wait(step);
        if (visible) {
            const char *image = memory + step % STAGES * STAGE<N>;
            const float *weights = (const float *)(image + B_BYTES<N>);
            float first[N / 2], second[N / 2];
            fence_engines_for_wgmma();
            start<T, N>(first, rows[0], shared_address(image));
            start<T, N>(second, rows[1], shared_address(image));
            wait_products<1>();
            wgmma_hold(first);
            Mine::add(y[0], first, weights);
            wait_products<0>();
            wgmma_hold(second);
            Mine::add(y[1], second, weights);
        }
        images.release(step);
        if (++group < groups) continue;
#pragma unroll
        for (int tile = 0; tile < 2; ++tile) {
            mine.write(tile0 + tile, t, y[tile], now.bias(mine, tile));
            y[tile][0] = y[tile][1] = 0;
        }
        ++t, group = 0;
    }
}

// MANY: tokens in chunks, from images; else one token.
template <class K, int N, bool MANY>
__global__ void __launch_bounds__(MANY ? 384 : 512, 1) scores(const __grid_constant__ Indexer a) {
    extern __shared__ __align__(1024) char memory[];
    if constexpr (MANY) {
        begin();
        more_tokens<K, N>(a, memory);
    } else {
        one_token<K, N>(a, memory);
    }
}
