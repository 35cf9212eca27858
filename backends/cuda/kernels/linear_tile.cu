// Products with many columns: a block computes 128 rows (or 64 of up and 64 of gate) by N columns
// on the tensor cores. Weights go from global memory to registers and are decoded there, directly
// into the A fragments of m16n8k16. A warp's 16 rows are two tiles of 8; with up and gate, one tile
// of each, so both values of an element meet in one thread. Activations (f16, scaled by row; see
// linear_prepare.cu) pass through shared memory, in rows of 64 values swizzled as wgmma requires.
// If there are too few blocks to fill the GPU, several split the k of a tile and each writes a
// partial sum.
// @kernel tile<{BLOCKS}, {1|2}, {32|64|128}, true>
// @kernel tile<{SOME}, {1|2}, {32|64|128}, false>
// @kernel hot 90a tile<{q8_0|iq4_nl}, {1|2}, {32|64|128}, {true|false}>
// @kernel tile<{q8_0|q6_K|iq4_nl|mxfp4}, 2, {32|64|128}, {true|false}, float>
// @kernel tile<Dense<{__half|__nv_bfloat16}>, 1, {32|64|128}, true>
// @kernel tile<Raw<{SOME}>, 1, 64, {true|false}>
#include "linear_fragments.cuh"
#include "linear_mma.cuh"
#include "raw.cuh"

using namespace tiles;

constexpr int DEPTH = 64;  // values of k per step
constexpr int THREADS = 256;

// -- weights to fragments -------------------------------------------------------------------------

template <class F>
struct TileRow : Row<F> {
    int t;
    TileRow() = default;
    __device__ __forceinline__ TileRow(const typename F::Source& a, int matrix, int tile, int row,
                                       int t)
        : Row<F>(a, matrix, min(tile, (rows_of(a) - 1) / 8), row), t(t) {
        this->hold(t);
    }
    __device__ __forceinline__ RawWords<F> load(int group) const {
        return raw_words<F>(*this, group, Row<F>::holds ? 0 : t);
    }
};

template <class T>
constexpr unsigned offset_of<Dense<T>> = 0;

template <class T>
struct TileRow<Dense<T>> {
    const char* at;
    TileRow() = default;
    __device__ __forceinline__ TileRow(const Tensor& a, int matrix, int tile, int row, int t)
        : at(a.data + matrix % a.ne[2] * a.nb[2] + matrix / a.ne[2] * a.nb[3] +
             min(tile * 8 + row, a.ne[1] - 1) * a.nb[1] + t * 8) {}
    __device__ __forceinline__ uint4 load(int group) const {
        uint2 first = *(const uint2*)(at + group * 64),
              second = *(const uint2*)(at + group * 64 + 32);
        return make_uint4(first.x, first.y, second.x, second.y);
    }
};
template <class T>
struct tiles::Table<Dense<T>> {
    __device__ __forceinline__ Table(unsigned, bool) {}
};
template <class T>
__device__ __forceinline__ void decode(const Table<Dense<T>>&, const uint4& raw, int,
                                       unsigned (&pairs)[4]) {
    // Copy to separate registers: the tensor cores still read them when `raw` is loaded again.
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("mov.b32 %0, %1;" : "=r"(pairs[i]) : "r"(words[i]));
}

// -- the product ----------------------------------------------------------------------------------

constexpr int STAGES = 4;

// With at most this many columns, two blocks share the tensor cores of an SM, registers permitting.
// mma.sync needs more registers, and so do types with high bits. Those with grids and one scale a
// group spill 12 to 28 bytes for it, but one block would decode with two warps a scheduler.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
constexpr int TWO_BLOCKS = 128;
#else
constexpr int TWO_BLOCKS = 64;
#endif
template <class F>
constexpr int has_high = F::high != 0;
template <class T>
constexpr int has_high<Dense<T>> = 0;
template <class F>
constexpr int needs_registers = has_high<F> && !(F::grid && F::scale_bytes == 0);
template <class T>
constexpr int needs_registers<Dense<T>> = 0;
template <class F>
constexpr bool is_small = F::code_runs == 1 && F::super_bytes == 0;
template <class T>
constexpr bool is_small<Dense<T>> = false;

// How many steps ahead to load weights: with few columns nothing else hides memory latency.
template <class F, int N>
constexpr int ahead_of = N > 64        ? 1
                         : has_high<F> ? 1
                         : is_small<F> ? 3
                                       : 2;

// grid: tiles of rows times `splits` of k, tiles of columns, batches (or parts of tiles of lists). x: [columns][k_padded] of
// F::Half; scale: one per column. With splits, y holds the sums of the first split for all columns,
// then those of the second, and so on. late: the predecessor may have made the lists. Limit: float if the gated unit has a limit, else nothing.
template <class F, int MATS, int N, bool ROUTED, class... Limit>
__global__ void __launch_bounds__(THREADS, N << needs_registers<F> <= TWO_BLOCKS ? 2 : 1)
    tile(Weights<F> weights, const char* x, const float* scales, int k_padded, Tensor y,
         Columns columns, int narrow, int act, int splits, int late, Limit... limit) {
    constexpr int AHEAD = ahead_of<F, N>;
    extern __shared__ __align__(1024) char memory[];
    __shared__ char* targets[N];
    __shared__ float column_scales[N];
    __shared__ unsigned sources[N];
    const int thread = threadIdx.x, warp = thread / 32, g = thread % 32 / 4, t = thread % 4;

    // This block's columns, rows and part of k.
    constexpr bool CAN_SPLIT = MATS == 1 && N <= 64 && !ROUTED;
    const int part = CAN_SPLIT ? blockIdx.x % splits : 0,
              row_tile = CAN_SPLIT ? blockIdx.x / splits : blockIdx.x;
    int matrix, valid;
    if constexpr (ROUTED) {
        if (late) wait_for_predecessor();
        int4 mine = {};
        if (blockIdx.y < *columns.n_tiles) mine = columns.tiles[blockIdx.y];
        const int skip = blockIdx.z * N;  // a tile of the list may have more columns than this one
        matrix = mine.x, mine.y += skip, valid = min(mine.z - skip, N);
        if (valid <= 0) {
            begin();
            return;
        }
        if (thread < N && thread < valid) {
            Pair pair = pair_of(columns.routing, y, columns.order[mine.y + thread]);
            targets[thread] = pair.to, sources[thread] = pair.column;
        }
        if (matrix == columns.routing.experts) {  // pairs without an expert get zeros
            constexpr int ROWS = 128 / MATS;
            begin();
            __syncthreads();
            for (int i = thread; i < valid * ROWS; i += THREADS) {
                const int row = row_tile * ROWS + i % ROWS;
                if (row < rows_of(weights.w[0])) put(y, targets[i / ROWS], row, 0, narrow);
            }
            return;
        }
    } else {
        matrix = columns.heads.matrix(blockIdx.z);
        int start = blockIdx.y * N;
        valid = min(N, columns.heads.columns - start);
        if (thread < valid) {
            unsigned column = blockIdx.z * columns.heads.columns + start + thread;
            sources[thread] = column;
            if (CAN_SPLIT) column += part * gridDim.z * columns.heads.columns;
            targets[thread] = row_at(y, column);
        }
    }
    const int steps = k_padded / DEPTH, begins = CAN_SPLIT ? steps * part / splits : 0,
              ends = CAN_SPLIT ? steps * (part + 1) / splits : steps;
    // Weights first: they do not depend on the activations.
    const int groups = groups_of(weights.w[0]);
    const Table<F> table(offset_of<F>, true);
    TileRow<F> rows[2];
    for (int i = 0; i < 2; ++i)
        rows[i] =
            TileRow<F>(weights.w[MATS == 2 ? i : 0], matrix,
                       MATS == 2 ? row_tile * 8 + warp : row_tile * 16 + warp * 2 + i, g, t);
    decltype(rows[0].load(0)) raw[2 * AHEAD][2];
#pragma unroll
    for (int i = 0; i < 2 * AHEAD; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) raw[i][r] = rows[r].load(min(2 * begins + i, groups - 1));
    begin();
    if (thread < valid) column_scales[thread] = scales[sources[thread]];
    __syncthreads();

    // To copy activations, each thread takes 16 bytes of several rows.
    const int chunk = thread % 8, first_row = thread / 8;
    constexpr int COPIES = (N + 31) / 32;
    const char* from[COPIES];
    for (int i = 0; i < COPIES; ++i) {
        int row = first_row + 32 * i;
        from[i] = x + (row < valid ? sources[row] : 0) * (long long)k_padded * 2 + chunk * 16;
    }
    const unsigned base = (shared_address(memory) + 1023) & ~1023u;
    const Place first_stage = place_of(base);
    auto copy_stage = [&](int step) {
        if (step < ends) {
            unsigned to = base + step % STAGES * (N * 128);
#pragma unroll
            for (int i = 0; i < COPIES; ++i) {
                int row = first_row + 32 * i;
                if (N % 32 == 0 || row < N)
                    copy16(to + row * 128 + ((chunk ^ (row & 7)) << 4), from[i] + step * 128,
                           row < valid);
            }
        }
        copies_commit();
    };
#pragma unroll
    for (int i = 0; i < STAGES - 2; ++i) copy_stage(begins + i);

    unsigned a[2][2][4];  // fragments of the two halves of a step
    float sums[N / 2] = {};
    for (int round = begins; round < ends; round += AHEAD)
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ++ahead) {
            const int step = round + ahead;
            if (ahead && step >= ends) break;
            copies_wait<STAGES - 3>();
            fence_engines_for_wgmma();
            __syncthreads();
            // This stage was read two steps ago. Those products are complete; those of the last
            // step are not.
            copy_stage(step + STAGES - 2);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                // The other half's product keeps running while this half is decoded.
                wait_products<1>();
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    unsigned pairs[4];
                    decode(table, raw[2 * ahead + i][r], t, pairs);
                    raw[2 * ahead + i][r] = rows[r].load(min((step + AHEAD) * 2 + i, groups - 1));
                    a[i][0][r] = pairs[0], a[i][0][r + 2] = pairs[1];
                    a[i][1][r] = pairs[2], a[i][1][r + 2] = pairs[3];
                }
                begin_product<typename F::Half, N>(
                    sums, a[i], further(first_stage, step % STAGES * (N * 128)), 2 * i);
            }
        }
    wait_products<0>();

    // A thread has 2 columns of 2 rows in every 8 columns.
    const int first = (row_tile * 8 + warp) * (MATS == 2 ? 8 : 16) + g;
    const bool has_upper = first < rows_of(weights.w[0]), has_lower = first + 8 < rows_of(weights.w[0]);
    const long long upper_at = first * y.nb[0], lower_at = upper_at + 8 * y.nb[0];
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
        const int column = i / 2 * 8 + t * 2 + i % 2;
        const float scale = column_scales[column];
        float upper = sums[i / 2 * 4 + i % 2] * scale, lower = sums[i / 2 * 4 + i % 2 + 2] * scale;
        char* to = targets[column];
        if (MATS == 2) upper = gated(act, lower, upper, limit...);
        if (column < valid && has_upper) put(to + upper_at, upper, narrow);
        if (MATS == 1 && column < valid && has_lower) put(to + lower_at, lower, narrow);
    }
}
