// Products with many columns on 9.0: a ring of stages in shared memory, filled by one warpgroup and
// multiplied by two. A block computes 128 rows (or 64 of up and 64 of gate) by up to 256 columns,
// then its next tile; the ring goes on without a break, so the next tile is fetched while this one
// is multiplied and stored.
//
// A thread of warpgroup 0 has the tensor copy engine fetch 64 values of k a stage: weights as tiles
// of 8 rows (formats.cuh), and activations (f16, scaled by row; see linear_prepare.cu). Warpgroups 1
// and 2 have 64 rows each. They decode weights from shared memory into the A fragments of wgmma while
// their last three products run.
//
// If experts take the columns, activations are in their order. One thread fetches weights and another
// activations, and two warps list where results go. Codes are read half a part ahead. Short rows leave
// through shared memory, 16 bytes a thread: two or four at a time, as they are in registers, kept the
// tensor cores waiting at the end of each tile.
//
// Traffic of a step: 32 KB of activations from L2, 4.5 KB of weights (iq4_nl). A step is 170
// instructions of a consumer warp, of which a scheduler has two, and 1024 clocks of the tensor
// cores. In linear_tile.cu, the kernel for all GPUs, four warps with 180 have 1024 clocks, and
// weights come straight to registers: few loads are then under way, as a warp has six barriers for
// them.
//
// Experts of few columns (up to 32 or 64 a tile) have four warpgroups that multiply, each 64 of 256 rows,
// and stages of 128 values of k. So they read columns half as often as with 128 rows, and weights as
// pieces of 512 bytes. A stage is 284 instructions of 16 warps, 1136 clocks, of which the unit for
// shifts and logic is busy 1060, and 1024 clocks of the tensor cores. In linear_tile.cu, each step
// waits for all loads of weights that are under way, at the fence for the copies of columns.
//
// Lost: columns of experts copied row by row by the warps of warpgroup 0, which held experts at
// 0.65 of the rate of other products; 128 columns a block (more decoding for each product: 0.74 of
// the rate), 64 columns in two blocks an SM (no faster than linear_tile.cu), a choice of more than
// four widths (too few registers: the assembler then makes every wgmma wait for the one before).
// @kernel 90a hot ring<{q8_0|iq4_nl}, {1|2}, {true|false}>
// @kernel 90a hot ring<{q8_0|iq4_nl}, {1|2}, true, {32|64}>
#include "linear_fragments.cuh"
#include "linear_mma.cuh"
#include "short_rows.cuh"

using namespace tiles;

// Kernel parameters start at 0x210 on 9.0, and tensor maps must be 64-byte aligned.
struct RingArgument {
    u64 pad[6];
    TensorMap planes[8];  // codes, high, scales, supers of one matrix, or of up, then of gate
    TensorMap x;
    const float* scales;  // of the rows that x maps
    Tensor y;
    Columns columns;
    int n_rows, row_tiles, matrix_tiles;  // tiles of 128 rows, and of 8 in a matrix
    int box, column_tiles, batches;       // columns of a box of x; if not routed, of a tile
    int steps, stages, narrow, act, limited;  // narrow: 1 f16, 2 short rows (short_rows.cuh)
    float limit;
    // With up and gate (silu), short rows are what the next product reads: in the order of experts,
    // with their scales, and with a 1 where a row has a number that f16 cannot hold.
    float* own_scales;
    int* are_long;
    // If not routed, with one matrix: a second one behind it, with planes of its own, that reads the
    // same columns. Its tiles of rows come after `first_tiles`.
    Tensor second_y;
    int second_rows, first_tiles;
};

constexpr int MOST_STAGES = 16, PRODUCERS = 128;
constexpr int LISTERS = PRODUCERS - 64;  // threads that list targets, if routed
constexpr int HANDED = 1 << 14;          // bytes of short rows on their way from registers
constexpr int SHORT = 2;

// What depends on the most columns of a tile. PARTS: of 64 values of k in a stage; AT_ONCE: products
// that are begun together.
template <int COLUMNS>
struct Sizes {
    static constexpr bool FEW = COLUMNS < 256;
    static constexpr int ROWS = FEW ? 256 : 128, CONSUMERS = 2 * ROWS, PARTS = FEW ? 2 : 1;
    static constexpr int AT_ONCE = FEW ? 2 : 1;
    static constexpr int X_PART = COLUMNS * 128, X = PARTS * X_PART;  // bytes of activations
    // Of a thread, in all as many as at the start: 640 x 96, or 384 x 168.
    static constexpr int REGISTERS = FEW ? 112 : 240;
    // Bytes of short rows on their way, of a warpgroup.
    static constexpr int OUT = HANDED / (CONSUMERS / 128);
};

// The weights of a stage: tiles of 8 rows, two groups a part; of fields that groups share, a block.
template <class F, class S>
struct WeightStage {
    static constexpr int GROUPS = 2 * S::PARTS, UNITS = S::ROWS * GROUPS;
    static constexpr int CODES = UNITS * F::code_bytes, HIGH = UNITS * F::high,
                         SCALES = UNITS * F::scale_bytes, SUPERS = S::ROWS * F::super_bytes;
    static constexpr int BYTES = CODES + HIGH + SCALES + SUPERS;
};

// A row of weights in a stage; has the interface of `Row`.
template <class F, class S>
struct StageRow {
    using Stage = WeightStage<F, S>;
    const char* stage;
    int tile, row, t;

    __device__ __forceinline__ const char* at(int group, int bytes) const {
        return stage + (tile * Stage::GROUPS + group) * 8 * bytes;
    }
    __device__ __forceinline__ unsigned code_word(int group, int run, int word) const {
        return *(const unsigned*)(at(group, F::code_bytes) + run * 128 + row * 16 + word * 4);
    }
    __device__ __forceinline__ uint2 short_codes(int group) const {
        const char* from = at(group, F::code_bytes) + row * F::code_bytes;
        if constexpr (F::code_bytes == 4) return make_uint2(*(const unsigned*)from, 0);
        return *(const uint2*)from;
    }
    template <int BYTES>
    static __device__ __forceinline__ unsigned small(const char* from) {
        if constexpr (BYTES == 1) return *(const u8*)from;
        if constexpr (BYTES == 2) return *(const u16*)from;
        if constexpr (BYTES == 4) return *(const unsigned*)from;
        return 0;
    }
    __device__ __forceinline__ uint2 high_bits(int group) const {
        const char* from = at(group, F::high) + Stage::CODES + row * F::high;
        if constexpr (F::high == 8) return *(const uint2*)from;
        return make_uint2(small<F::high>(from), 0);
    }
    __device__ __forceinline__ RawScale scale(int group) const {
        const char* own = at(group, F::scale_bytes) + Stage::CODES + Stage::HIGH +
                          row * F::scale_bytes;
        const char* shared = stage + Stage::CODES + Stage::HIGH + Stage::SCALES +
                             (tile * 8 + row) * F::super_bytes;
        return {small<F::scale_bytes>(own), small<F::super_bytes>(shared)};
    }
};

// A place in the ring, and how often it came round.
struct Turn {
    int stage = 0;
    u32 phase = 0;
    __device__ __forceinline__ void next(int stages) {
        if (++stage == stages) stage = 0, phase ^= 1;
    }
};

// A tile of results.
struct Part {
    int row_tile, matrix, first, valid;  // first: a column, or an entry of `order`
    bool second;
};
template <bool ROUTED>
__device__ __forceinline__ Part part_of(const RingArgument& a, int number) {
    if constexpr (ROUTED) {  // the rows of an expert one after another: they share columns
        const int4 mine = a.columns.tiles[number / a.row_tiles];
        return {number % a.row_tiles, mine.x, mine.y, mine.z, false};
    } else {  // the columns of a tile of rows: they share weights
        const int start = number % a.column_tiles * a.box, rest = number / a.column_tiles;
        const int z = rest / a.row_tiles, row_tile = rest % a.row_tiles;
        const bool second = row_tile >= a.first_tiles;
        return {second ? row_tile - a.first_tiles : row_tile, a.columns.heads.matrix(z),
                z * a.columns.heads.columns + start, min(a.box, a.columns.heads.columns - start),
                second};
    }
}

template <int N>
struct Size {
    static constexpr int value = N;
};

// grid: a block for each multiprocessor.
template <class F, int MATS, bool ROUTED, int COLUMNS = 256>
__global__ void __launch_bounds__(PRODUCERS + Sizes<COLUMNS>::CONSUMERS, 1)
    ring(const __grid_constant__ RingArgument a) {
    begin();
    using S = Sizes<COLUMNS>;
    using Weights = WeightStage<F, S>;
    constexpr int TILE_ROWS = S::ROWS / MATS, CONSUMERS = S::CONSUMERS;
    static_assert(!S::FEW || ROUTED);
    const Columns& columns = a.columns;
    extern __shared__ char unaligned[];
    // Where a column goes, in words from the start of y; likewise its scale. If routed, two tiles
    // take turns: `listed` when they are there, `done` when they are read. Else each consumer has
    // its own.
    __shared__ __align__(16) u32 targets[2][COLUMNS];
    __shared__ u64 full[MOST_STAGES], empty[MOST_STAGES], listed[2], done[2];
    char* memory = unaligned + (-shared_address(unaligned) & 1023);
    char* ring_w = memory + a.stages * S::X;
    float* const column_scales = (float*)(ring_w + a.stages * Weights::BYTES);
    char* const handed = (char*)(column_scales + 2 * COLUMNS);  // if rows are short
    // The compiler can tell that this is the same in all lanes.
    const int thread = threadIdx.x, lane = thread % 32,
              warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
    const Table<F> table(offset_of<F>, true);
    if (thread == 0) {
        for (int s = 0; s < a.stages; ++s) {
            barrier_init(full + s, ROUTED ? 2 : 1);
            barrier_init(empty + s, CONSUMERS / 32);
        }
        for (int i = 0; i < 2; ++i) {
            barrier_init(listed + i, LISTERS);
            barrier_init(done + i, CONSUMERS / 32);
        }
        fence_barriers();
    }
    // Short rows of pairs without an expert are not written.
    const int tiles = ROUTED ? columns.n_tiles[a.narrow == SHORT] : a.column_tiles * a.batches;
    const int parts = a.row_tiles * tiles;
    Turn turn, tile;
    __syncthreads();

    if (warp < 4) {
        registers_give<24>();
        if (ROUTED && warp >= 2) {
            for (int number = blockIdx.x; number < parts; number += gridDim.x) {
                const Part part = part_of<ROUTED>(a, number);
                if (part.matrix == columns.routing.experts) continue;
                barrier_wait(done + tile.stage, tile.phase ^ 1);
#pragma unroll 1
                for (int i = thread - 64; i < part.valid; i += LISTERS) {
                    const float scale = a.scales[part.first + i];
                    u32& target = targets[tile.stage][i];
                    column_scales[tile.stage * COLUMNS + i] =
                        MATS == 1 && a.narrow == SHORT ? 1 / SHORT_UNIT : scale;
                    if (MATS == 2 && a.narrow == SHORT) {
                        const RowScale unit = gated_unit(scale);
                        target = __float_as_uint(unit.by);
                        if (part.row_tile == 0) a.own_scales[part.first + i] = unit.back;
                        continue;
                    }
                    const int pair = columns.order[part.first + i];
                    target = (target_of(columns.routing, a.y, pair) - a.y.data) / 4;
                }
                barrier_arrive(listed + tile.stage);
                tile.next(2);
            }
        }
        // A copy takes its thread 70 clocks or more. If routed, one fetches weights and one columns.
        if (lane || warp >= (ROUTED ? 2 : 1)) return;
        const bool fetches_weights = !ROUTED || warp == 0, fetches_columns = !ROUTED || warp == 1;
        for (int number = blockIdx.x; number < parts; number += gridDim.x) {
            const Part part = part_of<ROUTED>(a, number);
            if (ROUTED && part.matrix == columns.routing.experts) continue;
            const int first_tile = part.matrix * a.matrix_tiles + part.row_tile * (TILE_ROWS / 8);
            // Only boxes with columns; the last may end with those of the next expert.
            const int columns_read = (part.valid + a.box - 1) / a.box * a.box;
            for (int step = 0; step < a.steps; step += S::PARTS, turn.next(a.stages)) {
                u64* const ready = full + turn.stage;
                barrier_wait(empty + turn.stage, turn.phase ^ 1);
                barrier_expect(ready, (fetches_weights ? Weights::BYTES : 0) +
                                          (fetches_columns ? columns_read * S::PARTS * 128 : 0));
                if (fetches_columns)
#pragma unroll
                    for (int part_k = 0; part_k < S::PARTS; ++part_k)
                        for (int column = 0; column < columns_read; column += a.box)
                            tensor_copy(
                                memory + turn.stage * S::X + part_k * S::X_PART + column * 128, &a.x,
                                ready, (step + part_k) * 64, part.first + column, 0, 0);
                if (!fetches_weights) continue;
                char* to = ring_w + turn.stage * Weights::BYTES;
                const auto fetch = [&](int plane, int bytes, int x) {
#pragma unroll
                    for (int m = 0; m < MATS; ++m)
                        tensor_copy(to + m * (bytes / MATS),
                                    &a.planes[4 * (MATS == 1 ? part.second : m) + plane], ready, x,
                                    first_tile, 0, 0);
                    to += bytes;
                };
                fetch(0, Weights::CODES, step * 4 * F::code_bytes);
                if constexpr (F::high > 0) fetch(1, Weights::HIGH, step * 4 * F::high);
                if constexpr (F::scale_bytes > 0)
                    fetch(2, Weights::SCALES, step * 4 * F::scale_bytes);
                if constexpr (F::super_bytes > 0)
                    fetch(3, Weights::SUPERS, 2 * step / F::block_groups * 2 * F::super_bytes);
            }
        }
        return;
    }

    registers_take<S::REGISTERS>();
    const int own = warp - 4, group = own / 4, g = lane / 4, t = lane % 4, mine = thread % 128;
    const Place x_at = place_of(shared_address(memory));
    u32 fragments[4][4];  // of the four products of a step
    float sums[COLUMNS / 2];
    for (int number = blockIdx.x; number < parts; number += gridDim.x) {
        const Part part = part_of<ROUTED>(a, number);
        const int first_row = part.row_tile * TILE_ROWS;
        if (ROUTED && part.matrix == columns.routing.experts) {  // pairs without an expert get zeros
            for (int start = own * 32; start < part.valid; start += CONSUMERS) {
                const int entry = part.first + min(start + lane, part.valid - 1);
                const u32 target = (target_of(columns.routing, a.y, columns.order[entry]) - a.y.data) / 4;
                for (int i = 0; i < min(32, part.valid - start); ++i) {  // the warp has a pair
                    char* const to = a.y.data + __shfl_sync(~0u, target, i) * 4ull;
                    for (int row = first_row + lane; row < min(first_row + TILE_ROWS, a.n_rows); row += 32)
                        put(to + row * (a.narrow ? 2 : 4), 0, a.narrow);
                }
            }
            continue;
        }
        const bool second = !ROUTED && MATS == 1 && part.second;
        const Tensor& y = second ? a.second_y : a.y;
        const int n_rows = second ? a.second_rows : a.n_rows;
        const int which = ROUTED ? tile.stage : group;
        if constexpr (!ROUTED) {
            warpgroup_sync(1 + group);  // all have read what the last tile left
            for (int i = mine; i < part.valid; i += 128) {
                targets[which][i] = (row_at(y, part.first + i) - y.data) / 4;
                copy4(shared_address(column_scales + which * COLUMNS + i), a.scales + part.first + i,
                      true);
            }
            copies_commit();
        }
        const auto multiply = [&](auto size) {
            constexpr int n = decltype(size)::value;
            float(&part_sums)[n / 2] = *(float(*)[n / 2]) & sums;
#pragma unroll
            for (int i = 0; i < n / 2; ++i) part_sums[i] = 0;
            const auto words = [&](int stage, int group, int r) {
                // One matrix: a thread's two rows are adjacent.
                const StageRow<F, S> row = {ring_w + stage * Weights::BYTES,
                                            MATS == 2 ? r * (S::ROWS / 16) + own : own * 2 + g / 4,
                                            MATS == 2 ? g : g % 4 * 2 + r, t};
                return raw_words<F>(row, group, t);
            };
            RawWords<F> raw[2][2];
            const auto read = [&](int stage, int part_k, int i) {
#pragma unroll
                for (int r = 0; r < 2; ++r) raw[i][r] = words(stage, 2 * part_k + i, r);
            };
            // Scales are not read ahead: there are too few registers.
            const auto with_scale = [&](int stage, int part_k, int i, int r) {
                if constexpr (!ROUTED) return raw[i][r];
                RawWords<F> all = words(stage, 2 * part_k + i, r);
                all.first = raw[i][r].first, all.second = raw[i][r].second;
                return all;
            };
            int last = -1;
            bool there = false;
            if constexpr (ROUTED) {
                barrier_wait(full + turn.stage, turn.phase);
                read(turn.stage, 0, 0), read(turn.stage, 0, 1);
            }
            for (int step = 0; step < a.steps; step += S::PARTS) {
                const int stage = turn.stage;
                if (!ROUTED) barrier_wait(full + stage, turn.phase);
                turn.next(a.stages);
                // Experts read codes half a part ahead. Waits between products would make the
                // assembler run these one after another, so the next stage must be there by now.
                if (ROUTED && step + S::PARTS < a.steps && !there)
                    barrier_wait(full + turn.stage, turn.phase);
#pragma unroll
                for (int part_k = 0; part_k < S::PARTS; ++part_k) {
                    const bool ends = part_k == S::PARTS - 1;
                    if constexpr (!ROUTED) read(stage, part_k, 0), read(stage, part_k, 1);
                    if (ROUTED && ends) {  // asked early: the answer takes 100 clocks
                        Turn then = turn;
                        then.next(a.stages);
                        there = barrier_passed(full + then.stage, then.phase);
                    }
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        const Unpacked<F> unpacked[2] = {
                            Unpacked<F>(table, with_scale(stage, part_k, i, 0), t),
                            Unpacked<F>(table, with_scale(stage, part_k, i, 1), t)};
                        if constexpr (ROUTED) read(ends ? turn.stage : stage, ends ? 0 : part_k + 1, i);
#pragma unroll
                        for (int k = 0; k < 2; ++k) {
                            const int first = 2 * i + k / S::AT_ONCE * S::AT_ONCE;
                            if (k % S::AT_ONCE == 0) {
                                // The products of the other fragments keep running. What the
                                // tensor cores read must not be written before this wait, not even
                                // to be moved later.
                                wait_products<4 / S::AT_ONCE - 1>();
                                const bool free = part_k == 0 && first == 4 - S::AT_ONCE;
                                if (free && lane == 0 && last >= 0) barrier_arrive(empty + last);
                            }
                            u32(&fragment)[4] = fragments[2 * i + k];
#pragma unroll
                            for (int r = 0; r < 2; ++r)
                                fragment[r] = unpacked[r].pair(table, k, 0),
                                fragment[r + 2] = unpacked[r].pair(table, k, 1);
                            if (k % S::AT_ONCE == S::AT_ONCE - 1)
                                begin_product<typename F::Half, n>(
                                    part_sums, *(u32(*)[S::AT_ONCE][4]) & fragments[first],
                                    further(x_at, stage * S::X + part_k * S::X_PART), first);
                        }
                    }
                }
                last = stage;
            }
            wait_products<0>();
            if (lane == 0) barrier_arrive(empty + last);
        };
        if constexpr (S::FEW) multiply(Size<COLUMNS>());
        else if (part.valid <= 128) multiply(Size<128>());
        else if (part.valid <= 192) multiply(Size<192>());
        else if (part.valid <= 224) multiply(Size<224>());
        else multiply(Size<256>());

        if constexpr (ROUTED) {
            barrier_wait(listed + tile.stage, tile.phase);
        } else {
            copies_wait<0>();
            warpgroup_sync(1 + group);
        }
        // A thread has 2 columns of 2 rows in every 8 columns.
        const int row = first_row + (MATS == 2 ? (thread - PRODUCERS) / 4 : own * 16 + 2 * g);
        const int end = row < n_rows ? part.valid : 0;
        char* const base = y.data + row * (a.narrow ? 2 : 4);
        const auto store = [&](auto finish) {
#pragma unroll
            for (int i = 0; i < COLUMNS / 2; i += 4) {
                if (i % 16 == 0 && 2 * i >= part.valid) break;
                const int column = 2 * i + 2 * t;
                const uint2 to = *(const uint2*)&targets[which][column];
                const float2 scale = *(const float2*)&column_scales[which * COLUMNS + column];
                if (column < end)
                    finish(base + to.x * 4ull, sums[i] * scale.x, sums[i + 2] * scale.x, column);
                if (column + 1 < end)
                    finish(base + to.y * 4ull, sums[i + 1] * scale.y, sums[i + 3] * scale.y,
                           column + 1);
            }
        };
        const auto silu = [](float up, float gate) {
            return gate * reciprocal_fast(1.0f + exp2_fast(-1.44269504f * gate)) * up;
        };
        const bool plain = MATS == 2 && a.act == 0 && !a.limited;
        if (ROUTED && a.narrow == SHORT) {
            // Through shared memory, so that 4 or 8 threads write 16 bytes each of a column.
            constexpr int PITCH = 128 / MATS, EACH = PITCH / 16,
                          PIECE = S::OUT / PITCH < COLUMNS ? S::OUT / PITCH : COLUMNS;
            char* const out = handed + group * S::OUT;
            const int place = MATS == 2 ? place_in_row(own % 4 * 8 + g) : own % 4 * 16 + 2 * g;
            // Of column 2 t; no two threads of a warp use the same bank, except for one word.
            char* const first_out =
                out + (MATS == 2 ? (t / 2 * 4 + t % 2) * PITCH + (place / 8 ^ t / 2 * 2) * 16
                                 : 2 * t * PITCH + (place / 8 ^ 2 * t) * 16) + place % 8 * 2;
            const int begin_row = first_row + group * (64 / MATS);
#pragma unroll
            for (int start = 0; start < COLUMNS; start += PIECE) {
                if (start >= part.valid) break;
                warpgroup_sync(1 + group);  // all have read the piece before
                const auto each = [&](auto finish) {
#pragma unroll
                    for (int i = start / 2; i < (start + PIECE) / 2; i += 4) {
                        if (i % 16 == 0 && 2 * i >= part.valid) break;
                        const int column = 2 * i + 2 * t;
                        char* const to = first_out + (2 * i - start) * PITCH;
                        if constexpr (MATS == 2) {
                            const float2 scale = *(const float2*)&column_scales[which * COLUMNS + column],
                                         unit = *(const float2*)&targets[which][column];
                            finish(to, silu(sums[i] * scale.x, sums[i + 2] * scale.x) * unit.x, 0, column);
                            finish(to + 2 * PITCH,
                                   silu(sums[i + 1] * scale.y, sums[i + 3] * scale.y) * unit.y, 0,
                                   column + 1);
                        } else {
                            constexpr float unit = 1 / SHORT_UNIT;
                            finish(to, sums[i] * unit, sums[i + 2] * unit, column);
                            finish(to + PITCH, sums[i + 1] * unit, sums[i + 3] * unit, column + 1);
                        }
                    }
                };
                const auto write = [](char* to, u32 halves) {
                    if constexpr (MATS == 2) *(u16*)to = (u16)halves;
                    else *(u32*)to = halves;
                };
                u32 largest = 0;
                each([&](char* to, float first, float second, int) {
                    write(to, pack2<__half>(first, second));
                    largest = max(largest, size_of(first, second));
                });
                if (largest >= SHORT_END)
                    each([&](char* to, float first, float second, int column) {
                        if (column >= end || size_of(first, second) < SHORT_END) return;
                        const u32 one = to_short(first), two = to_short(second);
                        write(to, permute(one, two, 0x5410));
                        if constexpr (MATS == 2) {
                            *(u16*)(a.y.data + (part.first + column) * a.y.nb[1] + a.y.nb[2] +
                                    2 * place_in_row(row)) = (u16)(one >> 16);
                            a.are_long[part.first + column] = 1;
                        } else {
                            *(u32*)(base + targets[which][column] * 4ull + 2 * a.n_rows) =
                                permute(one, two, 0x7632);
                        }
                    });
                warpgroup_sync(1 + group);
#pragma unroll
                for (int i = mine / EACH; i < PIECE; i += 128 / EACH) {
                    const int own_column = start + (MATS == 2 ? i & ~3 | i % 2 * 2 | i / 2 % 2 : i),
                              chunk = mine % EACH, at_row = begin_row + 8 * chunk;
                    if (own_column >= part.valid || at_row >= a.n_rows) continue;
                    char* const to = MATS == 2
                                         ? a.y.data + (part.first + own_column) * a.y.nb[1]
                                         : a.y.data + targets[which][own_column] * 4ull;
                    *(uint4*)(to + 2 * at_row) = *(const uint4*)(
                        out + i * PITCH + (chunk ^ (MATS == 2 ? i / 4 % 2 * 2 : i & 6)) * 16);
                }
            }
        } else if (MATS == 1 && a.narrow) {
            store([](char* to, float first, float second, int) {
                *(u32*)to = pack2<__half>(first, second);
            });
        } else if (MATS == 1) {
            store([](char* to, float first, float second, int) {
                *(float2*)to = make_float2(first, second);
            });
        } else if (plain && !a.narrow) {
            store([&](char* to, float up, float gate, int) { *(float*)to = silu(up, gate); });
        } else {
            store([&](char* to, float up, float gate, int) {
                put(to, a.limited ? gated(a.act, gate, up, a.limit) : gated(a.act, gate, up),
                    a.narrow);
            });
        }
        __syncwarp();
        if (ROUTED && lane == 0) barrier_arrive(done + tile.stage);
        tile.next(2);
    }
}
