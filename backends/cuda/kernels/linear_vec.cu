// Products with few columns of b, bound by reading the weights.
//
// Block types: activations become 16-bit fixed-point numbers in groups of 32 (24-bit where the
// result must be as accurate as f32). They are split into signed bytes, so the integer dot products
// with the codes are exact. A block of 4 warps takes a tile of 8 rows. The lanes of a warp are 8
// rows by 4 groups, so a warp reads 512 contiguous bytes of codes and only 4 groups of activations.
//
// Types with grids (iq.cuh): each block copies the grid to shared memory before it waits for its
// predecessor. Lost: one lookup for an index and its 4 signs. Its table of 16 KB has no room for
// copies, and lanes take 3.5 turns at the banks (benchmarks/notes.md has the count).
// @kernel hot quantize<{float|__half|__nv_bfloat16}, {2|3}>
// @kernel hot vec<{BLOCKS}, 1, 2, 1, {1|2}, {Groups|Soon}>
// @kernel hot vec<{BLOCKS}, 1, 2, 1, 1, Tensor>
// @kernel vec<{BLOCKS}, {2|4|8}, 2, 1, 1, Tensor>
// @kernel vec<{BLOCKS}, {2|4|8}, 2, 1, {1|2}, Groups>
// @kernel hot vec_teams<{q1_0|q4_0|q4_1|q5_0|q5_1|iq4_nl|mxfp4|nvfp4|iq4_xs}>
// @kernel hot vec_teams<{q2_K|q3_K|q4_K|tq2_0|iq2_xs|iq3_xxs}>
// @kernel vec<{BLOCKS}, {1|8}, 3, 1, 1, Groups>
// @kernel hot vec<{BLOCKS}, {1|8}, 2, 2, 1, Groups>
// @kernel hot vec<{SOME}, 1, 2, 2, 1, Tensor>
// @kernel hot vec_joined<{BLOCKS}, 1, {1|2}>
// @kernel vec_joined<{BLOCKS}, {2|4|8}, 1>
// @kernel hot vec_normed<{BLOCKS}, {NormedRow|SummedRow}>
// @kernel hot vec_sent<{BLOCKS}, {Groups|Tensor}>
// @kernel hot vec_id<{BLOCKS}, 2, 2, 1, Groups>
// @kernel hot vec_id<{BLOCKS}, 2, 1, 2, Tensor>
// @kernel hot vec_id<{SOME}, 2, 1, 1, Tensor>
// @kernel hot vec_id<{SOME}, 2, 1, {1|2}, Groups>
// @kernel vec_id<{SOME}, 2, 2, 1, Tensor>
// @kernel vec_id<{BLOCKS}, 3, 1, 1, Groups>
// @kernel vec<{SOME}, {1|8}, 2, 2, 1, Groups, float>
// @kernel hot vec_id<{SOME|mxfp4|q2_K}, 2, 2, 1, Groups, float>
// @kernel vec<Raw<{EVERY}>, 1, 2, 1, 1, Groups>
// @kernel vec<Raw<{SOME}>, 8, 2, 1, 1, Groups>
// @kernel vec_id<Raw<{SOME}>, {2|3}, 1, 1, Groups>
// @kernel vec_plain<{float|__half|__nv_bfloat16}, float, 1, {1|4}, {true|false}>
// @kernel vec_plain<float, float, {4|8}, 4, {true|false}>
// @kernel vec_plain_id<{float|__half|__nv_bfloat16}, float, {true|false}>
#include "linear_vec.cuh"
#include "rounds.cuh"

using namespace tiles;

// Quantizes b [k, columns] to groups. Eight lanes per group.
template <class T, int LEVELS>
__global__ void __launch_bounds__(256)
    quantize(Tensor b, unsigned char* out, int groups, long long columns) {
    begin();
    long long word = blockIdx.x * 256ll + threadIdx.x, group = word / 8;
    if (group >= groups * columns) return;  // exits by whole groups of lanes
    const char* row =
        row_at(b, group / groups) + (group % groups * 32 + (threadIdx.x & 7) * 4) * b.nb[0];
    float x[4];
    for (int i = 0; i < 4; ++i) x[i] = to_f32(*(const T*)(row + i * b.nb[0]));
    put_fixed<LEVELS>(x, out + group * group_bytes<LEVELS>);
}

constexpr int MOST_WARPS = 8, TEAM_WARPS = 4, MOST_TEAMS = 7;

// The columns of a block, by where they come from. start(g): waits for the predecessor and goes to
// group g; next(c, n): the group of column c, then goes n groups further.
template <class X, int COLS, int LEVELS>
struct Source;

template <int COLS, int LEVELS>
struct Source<Groups, COLS, LEVELS> {
    Groups at[COLS];

    __device__ __forceinline__ void set(int c, Groups x, unsigned column, int groups) {
        at[c] = x + (long long)column * groups * group_bytes<LEVELS>;
    }
    __device__ __forceinline__ void start(int group, int) {
        for (int c = 0; c < COLS; ++c) {
            at[c] += group * group_bytes<LEVELS>;
            asm volatile("" : "+l"(at[c]));  // one growing address instead of two added ones
        }
        begin();
    }
    __device__ __forceinline__ Fixed<LEVELS> next(int c, int step) {
        Fixed<LEVELS> group([&](int i) { return load_global(at[c] + 16 * i); });
        at[c] += step * group_bytes<LEVELS>;
        return group;
    }
};

// The same in a launch that releases its successor before it waits: `soon` in launch.py.
struct Soon {
    Groups groups;
};
template <int COLS, int LEVELS>
struct Source<Soon, COLS, LEVELS> : Source<Groups, COLS, LEVELS> {
    using Base = Source<Groups, COLS, LEVELS>;
    __device__ __forceinline__ void set(int c, Soon x, unsigned column, int groups) {
        Base::set(c, x.groups, column, groups);
    }
    __device__ __forceinline__ void start(int group, int groups) {
        release_successor();
        Base::start(group, groups);
    }
};

// Columns of f32. Each block makes them fixed point for itself, in shared memory; where blocks are
// few and short, that costs less than a launch. Their elements are adjacent and 16-byte aligned;
// several columns are rows of one dimension.
extern __shared__ uint4 column_groups[];
template <int COLS, int LEVELS>
struct Source<Tensor, COLS, LEVELS> {
    static constexpr int WORDS = group_bytes<LEVELS> / 16;
    const char *x, *last;
    long long step;
    int at, size;

    __device__ __forceinline__ void set(int c, const Tensor& b, unsigned column, int) {
        last = row_at(b, column);
        if (c == 0) x = last, step = b.nb[1];
    }
    __device__ __forceinline__ void start(int group, int groups) {
        begin();
        const int fours = groups * 8, threads = blockDim.y * 32;
        for (int i = threadIdx.y * 32 + threadIdx.x; i < COLS * fours; i += threads) {
            const int c = COLS == 1 ? 0 : i / fours;
            const char* own = x + c * step;
            if (own > last) own = last;
            const Pack<float, 4> four = *(const Pack<float, 4>*)(own + 16 * (i - c * fours));
            put_fixed<LEVELS>(four.v, (unsigned char*)(column_groups + i / 8 * WORDS));
        }
        __syncthreads();
        at = group * WORDS, size = groups * WORDS;
    }
    // Columns are asked for in order.
    __device__ __forceinline__ Fixed<LEVELS> next(int c, int step) {
        Fixed<LEVELS> group([&](int i) { return column_groups[c * size + at + i]; });
        if (c == COLS - 1) at += step * WORDS;
        return group;
    }
};

// Multiplies `MATS * TILES` tiles of rows (of up and gate, or adjacent ones, so that they share the
// cost of loading a column) by columns of activations. Thread i < MATS * TILES * COLS * 8 returns
// the value of row i % 8 of (mat, tile, column) i / 8. Groups are loaded a round or two before use,
// the first ones before the activations are complete. To fetch the rounds that follow into L2 then
// took a tenth of the rate. TEAM: so many warps of the block have a `tile` of their own; 0: all.
// APART: as in `Codes`, if the type has a table; some need more than 64 registers for it.
template <class F, int COLS, int LEVELS, int MATS, int TILES, int TEAM = 0,
          bool APART = COLS == 1 && LEVELS == 2, class X>
__device__ __forceinline__ float tile_product(const Weights<F>& weights, int matrix, int tile,
                                              Source<X, COLS, LEVELS>& x) {
    constexpr int ROWS = MATS * TILES, AHEAD = ROWS * COLS > 1 ? 1 : 2;
    constexpr bool LOADS_FIRST = COLS == 1 && ROWS == 2 && F::code_runs < 2 && (TEAM || !F::grid);
    const int warps = TEAM ? TEAM : blockDim.y, warp = TEAM ? threadIdx.y % TEAM : threadIdx.y;
    const int groups = groups_of(weights.w[0]), lane = threadIdx.x, step = 4 * warps;
    const int last_tile = (rows_of(weights.w[0]) - 1) / 8;
    Row<F> rows[ROWS];
    for (int r = 0; r < ROWS; ++r)
        rows[r] = Row<F>(weights.w[r / TILES], matrix, min(tile * TILES + r % TILES, last_tile),
                         lane % 8);
    const int first = 4 * warp + lane / 8;
    float sums[ROWS * COLS] = {};
    auto load = [&](int r, int group) { return load_group(rows[r], min(group, groups - 1)); };
    using C = Codes<F, APART && F::table>;
    Rounds<F, ROWS, AHEAD, LOADS_FIRST, C> rounds(load, first, step, groups);
    const Table<F> table(0);
    x.start(first, groups);
    table.ready();
    rounds.each(table, load, [&](int, const C(&codes)[ROWS], const Scale(&scales)[ROWS]) {
#pragma unroll
        for (int c = 0; c < COLS; ++c) {
            const Fixed<LEVELS> column = x.next(c, step);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                sums[r * COLS + c] += dot_group(codes[r], scales[r], column);
        }
    });
    __shared__ float parts[TEAM ? MOST_TEAMS * TEAM : MOST_WARPS][ROWS * COLS][8];
#pragma unroll
    for (int i = 0; i < ROWS * COLS; ++i) {
        sums[i] += __shfl_xor_sync(~0u, sums[i], 8);
        sums[i] += __shfl_xor_sync(~0u, sums[i], 16);
        if (lane < 8) parts[threadIdx.y][i][lane] = sums[i];
    }
    __syncthreads();
    const int i = warp * 32 + lane, first_warp = TEAM ? threadIdx.y - warp : 0;
    float total = 0;
    if (i < ROWS * COLS * 8)
        for (int w = 0; w < warps; ++w) total += parts[first_warp + w][i / 8][i % 8];
    return total;
}

// Joins the two values of a gated pair in the first one's thread; the second is COLS * 8 threads
// further.
template <int COLS, int MATS, class... Limit>
__device__ __forceinline__ float combine(float mine, int act, Limit... limit) {
    if constexpr (MATS == 1) return mine;
    __shared__ float gates[COLS * 8];
    int i = threadIdx.y * 32 + threadIdx.x;
    if (i >= COLS * 8 && i < 2 * COLS * 8) gates[i - COLS * 8] = mine;
    __syncthreads();
    return i < COLS * 8 ? gated(act, gates[i], mine, limit...) : 0.0f;
}

// grid: TILES tiles of rows, chunks of COLS columns, batches. MATS == 2: w[0] is up, w[1] is gate.
// Limit: float if the gated unit has a limit, else nothing.
template <class F, int COLS, int LEVELS, int MATS, int TILES, class X, class... Limit>
__global__ void __launch_bounds__(32 * MOST_WARPS)
    vec(Weights<F> weights, X x, Tensor y, Heads heads, int narrow, int act, Limit... limit) {
    unsigned first = blockIdx.z * heads.columns;
    int start = blockIdx.y * COLS, valid = min(COLS, heads.columns - start);
    Source<X, COLS, LEVELS> columns;
    for (int c = 0; c < COLS; ++c)
        columns.set(c, x, first + start + min(c, valid - 1), groups_of(weights.w[0]));
    float value = combine<COLS, MATS>(tile_product<F, COLS, LEVELS, MATS, TILES>(
                                          weights, heads.matrix(blockIdx.z), blockIdx.x, columns),
                                      act, limit...);
    int i = threadIdx.y * 32 + threadIdx.x, column = i / 8 % COLS, tile = i / 8 / COLS;
    int row = (blockIdx.x * TILES + tile) * 8 + i % 8;
    if (tile < TILES && column < valid && row < rows_of(weights.w[0]))
        put(y, row_at(y, first + start + column), row, value, narrow);
}

// A product of one column that is this GPU's part of a row that several add up: it also goes to them.
// grid: tiles of rows.
template <class F, class X>
__global__ void __launch_bounds__(32 * MOST_WARPS)
    vec_sent(Weights<F> weights, X x, float* y, const __grid_constant__ Round sum) {
    Source<X, 1, 2> column;
    column.set(0, x, 0, groups_of(weights.w[0]));
    const unsigned round = round_of(sum);
    const float value = tile_product<F, 1, 2, 1, 1>(weights, 0, blockIdx.x, column);
    const int i = threadIdx.y * 32 + threadIdx.x, row = blockIdx.x * 8 + i;
    if (i < 8 && row < rows_of(weights.w[0])) {
        y[row] = value;
        send(sum, round, row, value);
    }
}

// A product of one column whose pairs of tiles are on the GPU at once, a team of warps each. A block
// has all teams of a multiprocessor. Beside blocks of one team that is a twentieth of the time, of
// types with grids, whose table they share, an eighth.
// grid: blocks of blockDim.y / TEAM_WARPS teams.
template <class F>
__global__ void __launch_bounds__(32 * TEAM_WARPS * MOST_TEAMS, 1)
    vec_teams(Weights<F> weights, Groups x, Tensor y, int narrow) {
    const int team = threadIdx.y / TEAM_WARPS, pair = blockIdx.x * (blockDim.y / TEAM_WARPS) + team;
    Source<Groups, 1, 2> column;
    column.set(0, x, 0, groups_of(weights.w[0]));
    const float value = tile_product<F, 1, 2, 1, 2, TEAM_WARPS>(weights, 0, pair, column);
    const int i = threadIdx.y % TEAM_WARPS * 32 + threadIdx.x, row = pair * 16 + i;
    if (i < 16 && row < rows_of(weights.w[0])) put(y, y.data, row, value, narrow);
}

// Several products of the same columns, whose weights have one type. Product i takes the blocks
// from first[i] on, each TILES tiles of rows, and its results are step[i] elements apart.
constexpr int MOST_JOINED = 8;
template <class F>
struct Joined {
    typename F::Source w[MOST_JOINED];
    float* y[MOST_JOINED];
    int first[MOST_JOINED], step[MOST_JOINED], n;
};

// Left to itself, the compiler takes 48 registers for one tile of a type with a grid, and spills.
template <class F, int COLS, int TILES>
__global__ void __launch_bounds__(32 * MOST_WARPS, F::grid && COLS == 1 && TILES == 1 ? 4 : 0)
    vec_joined(const __grid_constant__ Joined<F> p, Groups x, int n) {
    int own = 0;
    for (int i = 1; i < p.n; ++i) own += blockIdx.x >= p.first[i];
    const Weights<F> weights = {{p.w[own], p.w[own]}};
    Source<Groups, COLS, 2> columns;
    for (int c = 0; c < COLS; ++c) columns.set(c, x, min(c, n - 1), groups_of(weights.w[0]));
    const int block = blockIdx.x - p.first[own];
    const float value = tile_product<F, COLS, 2, 1, TILES>(weights, 0, block, columns);
    const int i = threadIdx.y * 32 + threadIdx.x, column = i / 8 % COLS, tile = i / 8 / COLS;
    const int row = (block * TILES + tile) * 8 + i % 8;
    if (tile < TILES && column < n && row < rows_of(weights.w[0]))
        p.y[own][column * p.step[own] + row] = value;
}

// The same behind a norm that has yet to scale the column, of up to NORMED_WARPS * 4 groups. Blocks
// are few, so that they read it from L2 few times: two tiles of rows, all weights in registers before
// the column is complete. A warp makes what it multiplies fixed point itself, a group by the 8 lanes
// that need it, so the only barrier is that of the sums. The first block writes x + plus to `sum`, if
// present. V2-Lite: 4.2 MB of weights, 228 blocks that read 2 MB of the column.
// Lost: norms in the prologue of vec_joined, whose 456 blocks read 24 KB each and had two more
// barriers (benchmarks/notes.md). Four tiles a block are 0.2 us slower.
// With parts to add up, 64 registers are not enough for types of 8 bits or with high bits. Then blocks
// are alone on a multiprocessor, where each GPU has a part of the heads.
constexpr int NORMED_WARPS = 16, NORMED_TILES = 2;
template <class F, class X>
constexpr int normed_blocks = sizeof(X) > sizeof(NormedRow) && (F::code_runs == 2 || F::high) ? 1 : 2;
template <class F, class X>
__global__ void __launch_bounds__(32 * NORMED_WARPS, normed_blocks<F, X>)
    vec_normed(const __grid_constant__ Joined<F> p, const __grid_constant__ X x, float* sum) {
    const int lane = threadIdx.x, warp = threadIdx.y, group = 4 * warp + lane / 8;
    int own = 0;
    for (int i = 1; i < p.n; ++i) own += blockIdx.x >= p.first[i];
    const typename F::Source& w = p.w[own];
    const int groups = groups_of(w), tile = (blockIdx.x - p.first[own]) * NORMED_TILES;
    const int near = min(group, groups - 1), at = 32 * near + lane % 8 * 4;
    RawGroup<F> raw[NORMED_TILES];
#pragma unroll
    for (int t = 0; t < NORMED_TILES; ++t)
        raw[t] = load_group(Row<F>(w, 0, min(tile + t, w.tiles - 1), lane % 8), near);
    const Pack<float, 4> by = weights_at(row_of(x), at);
    const Table<F> table(0);
    const unsigned round = round_of(x);
    begin();
    Pack<float, 4> values = values_of(x, ask(x, round, at), round, at);
    table.ready();
    __shared__ uint4 columns[NORMED_WARPS * 4][group_bytes<2> / 16];
    const bool real = group < groups;
    float sums[NORMED_TILES], squares = real ? squares_of(values) : 0;
    if (sum && blockIdx.x == 0 && real) *(Pack<float, 4>*)(sum + at) = values;
    multiply(values, by);
    put_fixed<2, true>(values.v, (unsigned char*)columns[group]);
    __syncwarp();
    const Fixed<2> column([&](int j) { return columns[group][j]; });
#pragma unroll
    for (int t = 0; t < NORMED_TILES; ++t) {
        const Scale scale = F::scale(raw[t].scale.own, raw[t].scale.shared);
        const float y = dot_group(CodesFor<F>(table, raw[t]), scale, column);
        sums[t] = real ? y : 0;
    }
    __shared__ float parts[NORMED_WARPS][NORMED_TILES * 8], parts_of_squares[NORMED_WARPS];
#pragma unroll
    for (int t = 0; t < NORMED_TILES; ++t) {
        sums[t] += __shfl_xor_sync(~0u, sums[t], 8);
        sums[t] += __shfl_xor_sync(~0u, sums[t], 16);
        if (lane < 8) parts[warp][t * 8 + lane] = sums[t];
    }
    squares = warp_reduce<Sum>(squares);
    if (lane == 0) parts_of_squares[warp] = squares;
    __syncthreads();
    const int row = tile * 8 + lane;
    if (warp || lane >= NORMED_TILES * 8 || row >= rows_of(w)) return;
    float total = 0, all = 0;
#pragma unroll
    for (int i = 0; i < NORMED_WARPS; ++i) total += parts[i][lane], all += parts_of_squares[i];
    p.y[own][row] = total * factor_of(row_of(x), all);
}

// With up and gate of a type without high bits and with a lone f16 scale, 64 registers are
// enough. Then a multiprocessor holds 8 blocks of 4 warps, and the experts of a token are one wave.
template <class F, int MATS>
constexpr int id_blocks = MATS == 2 && F::half_scale && F::high == 0 ? 4 : 0;

// grid: TILES tiles of rows, pairs of token and slot. late: the predecessor may have chosen the
// experts.
template <class F, int LEVELS, int MATS, int TILES, class X, class... Limit>
__global__ void __launch_bounds__(32 * MOST_WARPS, id_blocks<F, MATS>)
    vec_id(Weights<F> weights, X x, Tensor y, Routing routing, int act, int late, Limit... limit) {
    if (late) wait_for_predecessor();
    Pair pair = pair_of(routing, y, blockIdx.y);
    float value = 0;
    if (pair.expert >= 0) {
        Source<X, 1, LEVELS> column;
        column.set(0, x, pair.column, groups_of(weights.w[0]));
        constexpr bool APART = LEVELS == 2 && id_blocks<F, MATS> == 0;
        const float mine = tile_product<F, 1, LEVELS, MATS, TILES, 0, APART>(weights, pair.expert,
                                                                             blockIdx.x, column);
        value = combine<1, MATS>(mine, act, limit...);
    } else {
        begin();
    }
    int i = threadIdx.y * 32 + threadIdx.x, row = blockIdx.x * TILES * 8 + i;
    if (i < TILES * 8 && row < rows_of(weights.w[0])) put(y, pair.to, row, value, 0);
}

constexpr int PLAIN_ROWS = 4;

// -- plain types ----------------------------------------------------------------------------------

// Multiplies rows of a by columns of b. A block takes ROWS rows; its warps split k. VECTOR: both have
// contiguous, 16-byte aligned elements, and k is a multiple of a vector. Thread i < COLS * ROWS
// returns row i % ROWS of column i / ROWS. A row's sum does not depend on ROWS.
template <class A, class B, int COLS, int ROWS, bool VECTOR>
__device__ __forceinline__ float rows_product(const Tensor& a, const char* first_row, int rows,
                                              const char* const (&x)[COLS], long long nb_b) {
    constexpr int N = VECTOR ? 16 / sizeof(A) : 1;
    const int k = a.ne[0], lane = threadIdx.y * 32 + threadIdx.x, step = 32 * blockDim.y * N;
    float sums[COLS][ROWS] = {};
    const char* row[ROWS];
    for (int r = 0; r < ROWS; ++r) row[r] = first_row + min(r, rows - 1) * a.nb[1];
#pragma unroll (8 / ROWS)
    for (int i = lane * N; i < k; i += step) {
        Pack<A, N> w[ROWS];
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
            if constexpr (VECTOR)
                w[r] = *(const Pack<A, N>*)(row[r] + i * sizeof(A));
            else
                w[r].v[0] = *(const A*)(row[r] + i * a.nb[0]);
#pragma unroll
        for (int c = 0; c < COLS; ++c) {
            Pack<B, N> v;
            if constexpr (VECTOR)
                v = *(const Pack<B, N>*)(x[c] + i * sizeof(B));
            else
                v.v[0] = *(const B*)(x[c] + i * nb_b);
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
#pragma unroll
                for (int j = 0; j < N; ++j)
                    sums[c][r] = fmaf(to_f32(w[r].v[j]), to_f32(v.v[j]), sums[c][r]);
        }
    }
    __shared__ float parts[MOST_WARPS][COLS * ROWS];
#pragma unroll
    for (int i = 0; i < COLS * ROWS; ++i) {
        float s = sums[i / ROWS][i % ROWS];
        for (int d = 16; d; d /= 2) s += __shfl_xor_sync(~0u, s, d);
        if (threadIdx.x == 0) parts[threadIdx.y][i] = s;
    }
    __syncthreads();
    float total = 0;
    if (lane < COLS * ROWS)
        for (int warp = 0; warp < blockDim.y; ++warp) total += parts[warp][lane];
    return total;
}

// grid: groups of ROWS rows, chunks of COLS columns, batches.
template <class A, class B, int COLS, int ROWS, bool VECTOR>
__global__ void __launch_bounds__(32 * MOST_WARPS)
    vec_plain(Tensor a, Tensor b, Tensor y, Heads heads, int narrow) {
    const int at = blockIdx.x * ROWS, matrix = heads.matrix(blockIdx.z);
    const char* rows =
        a.data + at * a.nb[1] + matrix % a.ne[2] * a.nb[2] + matrix / a.ne[2] * a.nb[3];
    if (VECTOR) {  // a router's rows of 8 KB are one line for each thread
        const int thread = threadIdx.y * 32 + threadIdx.x, r = thread % ROWS,
                  from = thread / ROWS * 128;
        if (at + r < a.ne[1] && from < a.ne[0] * (int)sizeof(A))
            fetch_early(rows + r * a.nb[1] + from);
    }
    begin();
    unsigned first = blockIdx.z * heads.columns;
    int start = blockIdx.y * COLS, valid = min(COLS, heads.columns - start);
    const char* columns[COLS];
    for (int c = 0; c < COLS; ++c) columns[c] = row_at(b, first + start + min(c, valid - 1));
    float value = rows_product<A, B, COLS, ROWS, VECTOR>(a, rows, a.ne[1] - at, columns, b.nb[0]);
    int i = threadIdx.y * 32 + threadIdx.x, row = at + i % ROWS;
    if (i / ROWS < valid && row < a.ne[1])
        put(y, row_at(y, first + start + i / ROWS), row, value, narrow);
}

// grid: groups of PLAIN_ROWS rows, pairs of token and slot.
template <class A, class B, bool VECTOR>
__global__ void __launch_bounds__(32 * MOST_WARPS)
    vec_plain_id(Tensor a, Tensor b, Tensor y, Routing routing) {
    begin();
    Pair pair = pair_of(routing, y, blockIdx.y);
    int at = blockIdx.x * PLAIN_ROWS;
    float value = 0;
    if (pair.expert >= 0) {
        const char* const columns[1] = {row_at(b, pair.column)};
        const char* rows = a.data + at * a.nb[1] + pair.expert * a.nb[2];
        value = rows_product<A, B, 1, PLAIN_ROWS, VECTOR>(a, rows, a.ne[1] - at, columns, b.nb[0]);
    }
    int i = threadIdx.y * 32 + threadIdx.x, row = at + i;
    if (i < PLAIN_ROWS && row < a.ne[1]) put(y, pair.to, row, value, 0);
}
