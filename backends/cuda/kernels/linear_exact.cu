// Products of f32 accuracy with many columns and few rows of weights on the tensor cores, such as the
// router of a prompt. y [rows, columns] = w [k, rows]^T x [k, columns], f32 sums.
//
// A number, scaled so that the largest of its row's 64 values of k lies in [2^14, 2^15), is the sum of
// two f16 numbers, exact to 22 bits. Three of their four products are enough: what is left out is
// 2^-22 of a product, and its sign is random. Tensor cores do not round their sums, they cut them, so
// a chain of products ends after 64 values of k, and f32 instructions add up the chains.
//
// A block has 64 rows, 16 columns a warp, and some values of k: grid (splits, column tiles, row
// tiles). It splits its weights, up to 256 values of k (64 KB) at a time, into fragments in shared
// memory, before it waits if they are constants; these are read 16 bytes a lane. Each lane copies its
// own numbers of its warp's columns to shared memory, up to four chains ahead, and splits them in
// registers. For 64 values of k a warp has 96 mma, 8 clocks each of a scheduler; two warps share it,
// and all eight read 160 KB of shared memory, 1,280 clocks.
//
// Elements of y are adjacent. Sums that are not finite are computed again, one by one.
// @kernel hot exact<float, float, {true|false}>
// @kernel exact<{__half|__nv_bfloat16}, float, {true|false}>
#include "halves.cuh"
#include "linear_common.cuh"
#include "mma.cuh"

constexpr int ROWS = 64, WARP_COLUMNS = 16, DEPTH = 64;  // DEPTH: of a chain
constexpr int CHAIN_WORDS = ROWS * DEPTH;                // of weights of 64 values of k: two halves each

struct Exact {
    Tensor w, x, y;
    int rows, columns, k, depth, parts;  // depth: most values of k at a time; parts: of a split
    // stages: chains of x that are copied ahead; paired: two adjacent elements of y can be written at
    // once.
    int stages, paired, resident;
};

// Four adjacent elements, zeros from k on. VECTOR: one load.
template <bool VECTOR, class T>
__device__ __forceinline__ void load_four(float* to, const char* row, long long step, int at, int k) {
    if constexpr (VECTOR) {
        Pack<T, 4> four = {};
        if (at < k) four = *(const Pack<T, 4>*)(row + at * sizeof(T));
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i] = to_f32(four.v[i]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            to[i] = at + i < k ? to_f32(*(const T*)(row + (at + i) * step)) : 0.0f;
    }
}

// 16 rows of 64 numbers: a lane has of rows g and g + 8 every number 16 j + 4 t + i.
struct Raw {
    float v[2][16];

    template <bool VECTOR, class T>
    __device__ __forceinline__ void load(const char* first, const char* second, long long step, int k0,
                                         int k) {
        const int at = k0 + threadIdx.x % 4 * 4;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            load_four<VECTOR, T>(v[0] + 4 * j, first, step, at + 16 * j, k);
            load_four<VECTOR, T>(v[1] + 4 * j, second, step, at + 16 * j, k);
        }
    }
};

// The same as fragments of four mma, whose k is in the order of the lanes' numbers: words are rows g
// and g + 8 of the first two numbers, then of the other two.
struct Fragments {
    u32 high[4][4], low[4][4];
    float back[2];

    __device__ __forceinline__ explicit Fragments(const Raw& raw) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float most = 0;
#pragma unroll
            for (int i = 0; i < 16; ++i) most = fmaxf(most, fabsf(raw.v[r][i]));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 1));
            most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));
            const RowScale scale = row_scale(most);
            back[r] = scale.back;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float x = raw.v[r][2 * i] * scale.by, y = raw.v[r][2 * i + 1] * scale.by;
                const u32 both = pack2<__half>(x, y);
                const float x_left = x - __half2float(__ushort_as_half((u16)both)),
                            y_left = y - __half2float(__ushort_as_half((u16)(both >> 16)));
                high[i / 2][i % 2 * 2 + r] = both;
                low[i / 2][i % 2 * 2 + r] = pack2<__half>(x_left, y_left);
            }
        }
    }
};

// As two B fragments, of rows g and g + 8.
__device__ __forceinline__ uint4 by_rows(const u32 (&words)[4]) {
    return make_uint4(words[0], words[2], words[1], words[3]);
}

template <class W, class X, bool VECTOR>
__global__ void __launch_bounds__(256, 1) exact(const __grid_constant__ Exact a) {
    extern __shared__ __align__(16) u32 shared[];
    // [chain][16 rows of 64][16 of 64 values of k][high or low][lane][4], backs [chain][row],
    // numbers of x [stage][8][thread][4].
    float* const backs = (float*)(shared + a.depth / DEPTH * CHAIN_WORDS);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32, g = lane / 4, t = lane % 4;
    const int first_row = blockIdx.z * ROWS;
    const int first = blockIdx.x * a.parts * a.depth, end = min(first + a.parts * a.depth, a.k);
    const auto row_of = [&](int i) { return a.w.row<char>(min(first_row + i, a.rows - 1), 0, 0); };
    const auto split_weights = [&](int k0) {
        const int chains = (min(a.depth, end - k0) + DEPTH - 1) / DEPTH;
        for (int unit = warp; unit < 4 * chains; unit += warps) {
            const int chain = unit / 4, row = unit % 4 * 16 + g;
            Raw raw;
            raw.load<VECTOR, W>(row_of(row), row_of(row + 8), a.w.nb[0], k0 + chain * DEPTH, end);
            const Fragments own(raw);
            uint4* const to = (uint4*)(shared + unit * (CHAIN_WORDS / 4)) + lane;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                to[64 * j] = by_rows(own.high[j]);
                to[64 * j + 32] = by_rows(own.low[j]);
            }
            if (t == 0) backs[chain * ROWS + row] = own.back[0];
            if (t == 1) backs[chain * ROWS + row + 8] = own.back[1];
        }
    };
    if (!a.resident) begin();
    split_weights(first);
    if (a.resident) begin();

    const int column = (blockIdx.y * warps + warp) * WARP_COLUMNS + g;
    const char* const columns[2] = {row_at(a.x, min(column, a.columns - 1)),
                                    row_at(a.x, min(column + 8, a.columns - 1))};
    float4* const own = (float4*)(backs + a.depth / DEPTH * ROWS) + threadIdx.x;
    const auto place = [&](int stage, int i) { return own + (stage * 8 + i) * blockDim.x; };
    // Of a chain, into a stage. Past the end, it only commits.
    const auto fetch = [&](int at, int stage) {
        if (at < end) {
            if constexpr (VECTOR && sizeof(X) == 4) {
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const int k = at + i / 2 * 16 + 4 * t;
                    copy16(shared_address(place(stage, i)), columns[i % 2] + (k < end ? k : 0) * 4,
                           k < end);
                }
            } else {
                Raw raw;
                raw.load<VECTOR, X>(columns[0], columns[1], a.x.nb[0], at, end);
#pragma unroll
                for (int i = 0; i < 8; ++i) {
                    const float* const v = raw.v[i % 2] + i / 2 * 4;
                    *place(stage, i) = make_float4(v[0], v[1], v[2], v[3]);
                }
            }
        }
        copies_commit();
    };
    for (int stage = 0; stage < a.stages; ++stage) fetch(first + stage * DEPTH, stage);
    float sums[8][4] = {};  // of 8 rows, of columns g and g + 8 rows 2 t and 2 t + 1
    int stage = 0;
    for (int k0 = first; k0 < end; k0 += a.depth) {
        if (k0 > first) {
            __syncthreads();
            split_weights(k0);
        }
        __syncthreads();
        const int last = min(k0 + a.depth, end);
        for (int at = k0, chain = 0; at < last; at += DEPTH, ++chain) {
            if (a.stages == 4) copies_wait<3>();
            else if (a.stages == 3) copies_wait<2>();
            else if (a.stages == 2) copies_wait<1>();
            else copies_wait<0>();
            Raw raw;
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                const float4 four = *place(stage, i);
                float* const v = raw.v[i % 2] + i / 2 * 4;
                v[0] = four.x, v[1] = four.y, v[2] = four.z, v[3] = four.w;
            }
            const Fragments x(raw);
            fetch(at + a.stages * DEPTH, stage);
            if (++stage == a.stages) stage = 0;
            float products[8][4] = {};
            const uint4* const weights = (const uint4*)(shared + chain * CHAIN_WORDS) + lane;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                u32 high[8][2], low[8][2];
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const uint4 two_high = weights[i * 256 + j * 64];
                    const uint4 two_low = weights[i * 256 + j * 64 + 32];
                    high[2 * i][0] = two_high.x, high[2 * i][1] = two_high.y;
                    high[2 * i + 1][0] = two_high.z, high[2 * i + 1][1] = two_high.w;
                    low[2 * i][0] = two_low.x, low[2 * i][1] = two_low.y;
                    low[2 * i + 1][0] = two_low.z, low[2 * i + 1][1] = two_low.w;
                }
                // No mma needs the sums of one of the seven before it.
                const auto multiply = [&](const u32(&own)[4], const u32(&w)[8][2]) {
#pragma unroll
                    for (int n = 0; n < 8; ++n) mma<__half>(products[n], own, w[n][0], w[n][1]);
                };
                multiply(x.low[j], high);
                multiply(x.high[j], low);
                multiply(x.high[j], high);
            }
#pragma unroll
            for (int n = 0; n < 8; ++n) {
                const float2 back = *(const float2*)(backs + chain * ROWS + 8 * n + 2 * t);
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    sums[n][e] += products[n][e] * (e % 2 ? back.y : back.x) * x.back[e / 2];
            }
        }
    }
    float all = 0;  // NaN if a sum is not finite
    const auto row_of_y = [&](int c) {
        return (float*)row_at(a.y, blockIdx.x * a.columns + column + 8 * c) + first_row;
    };
#pragma unroll
    for (int c = 0; c < 2; ++c) {
        if (column + 8 * c >= a.columns) break;
        float* const to = row_of_y(c) + 2 * t;
#pragma unroll
        for (int n = 0; n < 8; ++n) {
            const float2 own = make_float2(sums[n][2 * c], sums[n][2 * c + 1]);
            const int row = first_row + 8 * n + 2 * t;
            all += own.x * 0 + own.y * 0;
            if (a.paired) {
                if (row < a.rows) *(float2*)(to + 8 * n) = own;
            } else {
                if (row < a.rows) to[8 * n] = own.x;
                if (row + 1 < a.rows) to[8 * n + 1] = own.y;
            }
        }
    }
    if (all == 0) return;
    for (int i = 0; i < 32; ++i) {
        const int c = i / 16, row = i / 2 % 8 * 8 + 2 * t + i % 2;
        if (column + 8 * c >= a.columns || first_row + row >= a.rows) continue;
        float* const to = row_of_y(c) + row;
        if (fabsf(*to) <= 3.4028235e38f) continue;
        const char *w = row_of(row), *x = c ? columns[1] : columns[0];
        float sum = 0;
        for (int at = first; at < end; ++at)
            sum += to_f32(*(const W*)(w + at * a.w.nb[0])) * to_f32(*(const X*)(x + at * a.x.nb[0]));
        *to = sum;
    }
}
