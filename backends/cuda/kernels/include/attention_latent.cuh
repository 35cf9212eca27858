// A block of attention to the latent cache; attention_latent.cu says how it works.
#pragma once
#include "attention_q8_0.cuh"
#include "staged.cuh"

constexpr int DV = 512;

// The threads for which a block has registers. With 16 rows and 8 warps they are more than it has,
// so that blocks of the next launch, which adds up the parts, find registers beside it.
template <int MI, int WM, int WN>
constexpr int BOUND = MI == 1 && WN == 8 ? 384 : 32 * WM * WN;

// Shared memory: queries, tiles, weights. With q8_0 there are two raw tiles and one decoded tile.
template <int DK, int M, int BN, bool Q8>
struct LatentShape {
    static constexpr int PITCH = DK * 2, RAW = DK / 32 * 34;
    static constexpr int Q = M * PITCH, TILE = BN * PITCH, P = M * BN * 2,
                         STAGE = Q8 ? BN * RAW : TILE;
    static constexpr int TILES = Q8 ? TILE + 2 * STAGE : 2 * STAGE, BYTES = Q + TILES + P;
};

// Sixteen rows of a block, as one of the BN / 8 warps that share them. A warp multiplies 32 keys of
// a tile by a quarter of their elements, so its queries stay in registers, and products read only
// the tile from shared memory. The quarters of a score meet there, where the queries were; then a
// warp has whole rows, two keys a lane, and knows their maxima without the other warps.
template <class T, int DK, int BN>
struct Slice {
    static constexpr int STEPS = DK / 64, PITCH = DK * 2;  // of 16 elements, in a quarter
    static constexpr int LANES = BN / 2;                   // that share a row of scores
    static_assert(4 * BN * sizeof(float) <= PITCH, "quarters take no more room than queries");
    u32 queries[STEPS][4], at[4];  // addresses in a tile; steps n and n + 4 are 128 bytes apart
    float *quarters;               // [4][16][BN]
    int lane, quarter, group;      // group: of 32 keys
    int row, key;                  // this lane's: two rows, two keys

    // `rows` are the addresses of the queries in shared memory.
    template <class Swizzled>
    __device__ __forceinline__ Slice(char *rows, int warp, Swizzled swizzled)
        : quarters((float *)rows), lane(threadIdx.x % 32), quarter(warp % 4), group(warp / 4),
          row(warp * (128 / BN) + lane / LANES * 2), key(lane % LANES * 2) {
        const int chunk = quarter * STEPS * 2;
#pragma unroll
        for (int n = 0; n < STEPS; ++n)
            ldmatrix(queries[n], shared_address(rows) +
                                     swizzled(lane & 15, chunk + 2 * n + (lane >> 4)));
#pragma unroll
        for (int n = 0; n < 4; ++n)
            at[n] = swizzled(group * 32 + (lane >> 4) * 8 + (lane & 7),
                             chunk + 2 * n + (lane >> 3 & 1));
    }
    __device__ __forceinline__ float *place(int quarter, int row, int key) const {
        return quarters + (quarter * 16 + row) * BN + (key ^ (row & 3) * 8);
    }
    // Writes this warp's quarters of the products with a tile. A barrier must follow.
    __device__ __forceinline__ void multiply(u32 tile) const {
        float s[4][4] = {};
#pragma unroll
        for (int n = 0; n < STEPS; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 b[4];
                ldmatrix(b, tile + at[n % 4] + n / 4 * 128 + half * 16 * PITCH);
                mma<T>(s[2 * half], queries[n], b[0], b[1]);
                mma<T>(s[2 * half + 1], queries[n], b[2], b[3]);
            }
#pragma unroll
        for (int c = 0; c < 4; ++c)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                *(float2 *)place(quarter, lane / 4 + 8 * r, group * 32 + c * 8 + lane % 4 * 2) =
                    make_float2(s[c][2 * r], s[c][2 * r + 1]);
    }
    // The products of this lane's rows and keys.
    __device__ __forceinline__ void sum(float (&s)[1][4]) const {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float2 x[4];
#pragma unroll
            for (int q = 0; q < 4; ++q) x[q] = *(const float2 *)place(q, row + r, key);
            s[0][2 * r] = (x[0].x + x[1].x) + (x[2].x + x[3].x);
            s[0][2 * r + 1] = (x[0].y + x[1].y) + (x[2].y + x[3].y);
        }
    }
    static __device__ __forceinline__ void row_max(float (&x)[2]) {
#pragma unroll
        for (int by = LANES / 2; by; by /= 2)
#pragma unroll
            for (int r = 0; r < 2; ++r) x[r] = fmaxf(x[r], __shfl_xor_sync(~0u, x[r], by));
    }
    static __device__ __forceinline__ float row_sum(float x) {
#pragma unroll
        for (int by = LANES / 2; by; by /= 2) x += __shfl_xor_sync(~0u, x, by);
        return x;
    }
};
struct NoSlice {
    int row = 0, key = 0;
};
template <bool SLICED, class T, int DK, int BN, class Swizzled>
__device__ __forceinline__ auto slice_of(char *rows, int warp, Swizzled swizzled) {
    if constexpr (SLICED)
        return Slice<T, DK, BN>(rows, warp, swizzled);
    else
        return NoSlice();
}

// Walks the share `part` of a's keys, for the rows of blockIdx.y and .z. All threads of a block
// call it. It waits for the predecessor, as late as it may, and releases the successor.
template <class T, int DK, int MI, int WM, int WN, int BN, bool Q8, bool LIST>
__device__ __forceinline__ void latent_block(const Attention &a, int part) {
    constexpr int WARPS = WM * WN, THREADS = 32 * WARPS;
    constexpr int M = 16 * MI * WM, NT = BN / 8 / WN, NV = DV / 8 / WN;
    constexpr bool SLICED = MI == 1;
    static_assert(!SLICED || NT == 1, "a slice has BN / 8 warps");
    constexpr int PITCH_P = BN * 2;
    using Shape = LatentShape<DK, M, BN, Q8>;
    constexpr int PITCH = Shape::PITCH, RAW = Shape::RAW;
    extern __shared__ __align__(128) char memory[];
    // Sums wait in the ring where there is room.
    constexpr bool STAGED = BULK && M * Staged<DV>::PITCH <= Shape::TILES;
    __shared__ float factors[M], tops[WN][M], totals[WN][M];
    constexpr int LAST = SLICED ? 1 : 0;  // of `tops`: where the maxima are in the end
    __shared__ u64 full[2];
    __shared__ bool damaged;  // a sum is not finite
    __shared__ __align__(8) float biases[2][LIST ? BN : 1];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, wm = warp / WN, wn = warp % WN;
    const int r0 = blockIdx.y * M;
    const int head_kv = blockIdx.z % a.heads_kv, i3 = blockIdx.z / a.heads_kv;
    const int pitch = a.pitch_of<LIST>(), q0 = r0 / pitch, q1 = (r0 + M - 1) / pitch;
    char *queries = memory, *ring = memory + Shape::Q, *weights = ring + Shape::TILES;
    const auto swizzled = [](int row, int chunk) {
        return row * PITCH + (chunk ^ (row & 7)) * 16;
    };

    auto list = list_of<LIST, BN, THREADS>(a, i3, q0, part);
    Queries<T, DK, M, WARPS, !LIST> loaded;
    loaded.find(a, i3, head_kv, r0, warp, pitch);
    bool waits = a.early == ALL;  // later on
    if (a.early == NOTHING) wait_for_predecessor();
    if constexpr (LIST) {
        loaded.load();
        if (a.early == QUERIES) wait_for_predecessor();
    }
    const int live = a.live();
    list.start([&] { return Row(a, i3, head_kv, r0, live, pitch); });
    const auto walk = walk_of<LIST, BN>(a, i3, q0, q1, live, part);
    int now = walk.alive(walk.first), next = now;
    const char *k = a.k + head_kv * a.nb_k[1] + i3 * a.nb_k[2];
    // Copies a thread's eighth of a row: chunks 8 apart are 128 bytes apart in the tile too.
    const auto copy_row = [&](char *to, int j, const char *from, bool real) {
        const int chunk = threadIdx.x % 8;
        const u32 at = shared_address(to) + swizzled(j, chunk);
        from += chunk * 16;
#pragma unroll
        for (int c = 0; c < PITCH; c += 128) copy16(at + c, from + c, real);
    };
    // Whether tiles of q8_0 are in one piece, so that the copy engine can bring them.
    const bool whole = Q8 && !LIST && a.nb_k[0] == RAW && u64(k) % 16 == 0 && a.n_kv % 4 == 0;
    if constexpr (Q8 && !LIST && BULK) {
        if (threadIdx.x == 0) {
            for (int s = 0; s < 2; ++s) barrier_init(full + s, 1);
            fence_barriers();
        }
        __syncthreads();
    }
    // Where this thread's rows of tile t are, computed here; keys that are not there are not read.
    constexpr int PLACES = BN * 8 / THREADS;
    struct Places {
        const char *from[PLACES];
        u32 real;
    };
    const auto places_of = [&](int t) {
        Places p{};
#pragma unroll
        for (int i = 0; i < PLACES; ++i) {
            const int j = t * BN + threadIdx.x / 8 + i * (THREADS / 8);
            p.from[i] = k + (j < live ? j * a.nb_k[0] : 0);
            p.real |= u32(j < live) << i;
            asm volatile("" : "+l"(p.from[i]));
        }
        return p;
    };
    const auto fetch = [&](int t, int stage, const Places &places) {
        const int j0 = t * BN;
        char *to = ring + (Q8 ? Shape::TILE : 0) + stage * Shape::STAGE;
        if constexpr (LIST) {
            list.fetch(t, biases[stage], [&](int i, int id) {
                const int j = list.place(i);
                const char *from = k + (id < 0 ? 0 : id * a.nb_k[0]);
                if constexpr (Q8) {
#pragma unroll 3
                    for (int c = threadIdx.x % 8 * 4; c < RAW; c += 32)
                        copy4(shared_address(to) + j * RAW + c, from + c, id >= 0);
                } else {
                    copy_row(to, j, from, id >= 0);
                }
            });
        } else if (BULK && whole) {
            if (threadIdx.x == 0) {
                const u32 nbytes = min(BN, a.n_kv - j0) * RAW;
                barrier_expect(full + stage, nbytes);
                bulk_fetch(shared_address(to), k + j0 * RAW, nbytes, full + stage);
            }
        } else if constexpr (Q8) {
            fetch_raw<BN, RAW>(shared_address(to), k + j0 * a.nb_k[0], a.nb_k[0], live - j0,
                               threadIdx.x, THREADS);
        } else {
#pragma unroll
            for (int i = 0; i < PLACES; ++i)
                copy_row(to, threadIdx.x / 8 + i * (THREADS / 8), places.from[i],
                         places.real >> i & 1);
        }
    };
    constexpr bool IN_ORDER = !LIST && !Q8;
    Places places{};
    if constexpr (IN_ORDER) places = places_of(next);
    if constexpr (!LIST) {
        // Keys of the first tile come as far as L2. With more of them, the launch before is slowed down.
        const int j = now * BN + threadIdx.x;
        if (a.early != NOTHING && a.early != ALL && threadIdx.x < BN && now < walk.end && j < live)
            fetch_early(k + j * a.nb_k[0], Q8 ? RAW : PITCH);
        if (a.early == SPANS) wait_for_predecessor();
        loaded.load();
        if (a.early == QUERIES) wait_for_predecessor();
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        if (next < walk.end) {
            fetch(next, s, places);
            next = walk.alive(next + 1);
            if constexpr (IN_ORDER) places = places_of(next);
        }
        copies_commit();
    }
    if (!waits) release_successor();
    loaded.store(a, factors, warp,
                 [&](int r, int i) { return (u32 *)(queries + swizzled(r, i / 8) + i % 8 * 2); });
    __syncthreads();

    const int row0 = wm * MI * 16 + lane / 4;  // this thread's first row of sums in the block
    const auto slice = slice_of<SLICED, T, DK, BN>(queries + wm * (16 * PITCH), wn, swizzled);
    // The rows whose scores this thread turns to weights.
    const auto own = [&](int i, int r) {
        return SLICED ? wm * 16 + slice.row + r : row0 + 16 * i + 8 * r;
    };
    float sums[MI][NV][4] = {}, m[MI][2], l[MI][2], factor[MI][2], slope[MI][2];
#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            m[i][r] = -INF, l[i][r] = 0;
            factor[i][r] = factors[own(i, r)];
            if (LIST) slope[i][r] = Row(a, i3, head_kv, r0 + own(i, r), live, pitch).slope;
        }

    for (int stage = 0, parity = 0; now < walk.end; stage ^= 1) {
        if (BULK && whole) {
            barrier_wait(full + stage, parity);
            parity ^= stage;
        } else {
            copies_wait<1>();
        }
        __syncthreads();
        const char *tile = ring + (Q8 ? 0 : stage * Shape::STAGE);
        if constexpr (Q8) {
            decode_rows_to<BN, DK>(ring + Shape::TILE + stage * Shape::STAGE,
                                   LIST ? BN : live - now * BN, warp, WARPS,
                                   [&](int r, int c) { return ring + swizzled(r, c); });
            __syncthreads();
        }
        const u32 at_q = shared_address(queries), at_k = shared_address(tile);
        const bool bias = walk.biased(now), special = bias || a.softcap > 0 || walk.edge(now);
        // Turns products of a row to scores; returns the factor still to be applied.
        const auto score = [&](auto &s, int i, int r, int place) {
            if constexpr (LIST) {
                listed(a, s, 2 * r, factor[i][r], slope[i][r], biases[stage] + place);
                return 1.f;
            }
            if (!special) return factor[i][r];
            return masked(a, Row(a, i3, head_kv, r0 + own(i, r), live, pitch), s, 2 * r, factor[i][r],
                          now * BN + place, bias);
        };
        // The weight of a pair of keys goes to shared memory.
        const auto weigh = [&](float x, float y, int row, int key) {
            *(u32 *)(weights + row * PITCH_P + (key / 8 ^ (row & (BN / 8 - 1))) * 16 + key % 8 * 2) =
                pack2<T>(x, y);
            return x + y;
        };
        float lost[MI][2];
        if constexpr (SLICED) {
            slice.multiply(at_k);
            __syncthreads();
            float s[1][4], left[2], top[2];
            slice.sum(s);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                left[r] = score(s, 0, r, slice.key);
                top[r] = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
            }
            slice.row_max(top);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                top[r] = fmaxf(m[0][r], top[r] * left[r]);
                const float base = finite(top[r]), less = exp2_fast(m[0][r] - base);
                const float x = exp2_fast(fmaf(s[0][2 * r], left[r], -base));
                const float y = exp2_fast(fmaf(s[0][2 * r + 1], left[r], -base));
                m[0][r] = top[r];
                l[0][r] = l[0][r] * less + weigh(x, y, own(0, r), slice.key);
                if (slice.key == 0) tops[0][own(0, r)] = less;
            }
            __syncthreads();
#pragma unroll
            for (int r = 0; r < 2; ++r) lost[0][r] = tops[0][row0 + 8 * r];
        } else {
            // Scores of this warp's rows and its NT x 8 keys. Even and odd steps have separate
            // sums.
            float s[MI][NT][4] = {}, odd[MI][NT][4] = {};
#pragma unroll 2
            for (int n = 0; n < DK / 32; ++n) {
                u32 b[NT][4];
#pragma unroll
                for (int i = 0; i < NT; ++i)
                    ldmatrix(b[i],
                             at_k + swizzled((wn * NT + i) * 8 + (lane & 7), n * 4 + (lane >> 3)));
#pragma unroll
                for (int i = 0; i < MI; ++i) {
                    const int r = (wm * MI + i) * 16 + (lane & 15);
                    u32 x[4], y[4];
                    ldmatrix(x, at_q + swizzled(r, n * 4 + (lane >> 4)));
                    ldmatrix(y, at_q + swizzled(r, n * 4 + 2 + (lane >> 4)));
#pragma unroll
                    for (int c = 0; c < NT; ++c) {
                        mma<T>(s[i][c], x, b[c][0], b[c][1]);
                        mma<T>(odd[i][c], y, b[c][2], b[c][3]);
                    }
                }
            }
            const int place = wn * NT * 8 + 2 * (lane & 3);
            float left[MI][2];
#pragma unroll
            for (int i = 0; i < MI; ++i) {
#pragma unroll
                for (int c = 0; c < NT; ++c)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s[i][c][e] += odd[i][c][e];
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    left[i][r] = score(s[i], i, r, place);
                    float top = -INF;
#pragma unroll
                    for (int c = 0; c < NT; ++c)
                        top = fmaxf(top, fmaxf(s[i][c][2 * r], s[i][c][2 * r + 1]));
                    top = quad_max(top) * left[i][r];
                    if (lane % 4 == 0) tops[wn][own(i, r)] = top;
                }
            }
            __syncthreads();
            // The maximum of each row over all warps.
#pragma unroll
            for (int i = 0; i < MI; ++i)
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    float top = m[i][r];
#pragma unroll
                    for (int w = 0; w < WN; ++w) top = fmaxf(top, tops[w][own(i, r)]);
                    const float base = finite(top);
                    lost[i][r] = exp2_fast(m[i][r] - base);
                    m[i][r] = top;
                    l[i][r] *= lost[i][r];
#pragma unroll
                    for (int c = 0; c < NT; ++c) {
                        const float x = exp2_fast(fmaf(s[i][c][2 * r], left[i][r], -base));
                        const float y = exp2_fast(fmaf(s[i][c][2 * r + 1], left[i][r], -base));
                        l[i][r] += weigh(x, y, own(i, r), place + 8 * c);
                    }
                }
            __syncthreads();
        }
        // Sums of this warp's rows and its NV x 8 columns.
#pragma unroll
        for (int i = 0; i < MI; ++i)
#pragma unroll
            for (int c = 0; c < NV; ++c) {
                sums[i][c][0] *= lost[i][0], sums[i][c][1] *= lost[i][0];
                sums[i][c][2] *= lost[i][1], sums[i][c][3] *= lost[i][1];
            }
        const u32 at_p = shared_address(weights);
        const int v_chunk = a.v_start / 8 + wn * NV + (lane >> 4);
#pragma unroll
        for (int n = 0; n < BN / 16; ++n) {
            u32 x[MI][4];
#pragma unroll
            for (int i = 0; i < MI; ++i) {
                const int r = (wm * MI + i) * 16 + (lane & 15);
                ldmatrix(x[i],
                         at_p + r * PITCH_P + ((2 * n + (lane >> 4)) ^ (r & (BN / 8 - 1))) * 16);
            }
#pragma unroll
            for (int c = 0; c < NV; c += 2) {
                u32 b[4];
                ldmatrix_trans(b, at_k + swizzled(n * 16 + (lane & 15), v_chunk + c));
#pragma unroll
                for (int i = 0; i < MI; ++i) {
                    mma<T>(sums[i][c], x[i], b[0], b[1]);
                    mma<T>(sums[i][c + 1], x[i], b[2], b[3]);
                }
            }
        }
        now = walk.alive(now + 1);
        if (next < walk.end) {
            __syncthreads();  // all have read the tile that is replaced
            fetch(next, stage, places), next = walk.alive(next + 1);
            if constexpr (IN_ORDER) places = places_of(next);
        }
        copies_commit();
        if (waits) begin(), waits = false;
    }

#pragma unroll
    for (int i = 0; i < MI; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float sum;
            if constexpr (SLICED) sum = slice.row_sum(l[i][r]);
            else sum = quad_sum(l[i][r]);
            if (SLICED ? slice.key == 0 : lane % 4 == 0) {
                totals[SLICED ? 0 : wn][own(i, r)] = sum;
                tops[LAST][own(i, r)] = m[i][r];
            }
        }
    if (threadIdx.x == 0) damaged = false;
    __syncthreads();
    // Sums are the first that is written; the launch before may still read older ones.
    if (waits) begin();
    if constexpr (STAGED) {
        const Staged<DV> staged{ring};
        float spoilt = 0;
#pragma unroll
        for (int i = 0; i < MI; ++i)
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int c = 0; c < NV; ++c) {
                    const float x = sums[i][c][2 * r], y = sums[i][c][2 * r + 1];
                    spoilt = spoilt_by(spoilt_by(spoilt, x), y);
                    staged.put(row0 + 16 * i + 8 * r, (wn * NV + c) * 8 + (lane & 3) * 2, x, y);
                }
        if (spoilt != 0) damaged = true;
        fence_engines();
        __syncthreads();
        if (!damaged && (a.splits > 1 || !a.out)) {
            if (threadIdx.x >= M) return;
            const Row row(a, i3, head_kv, r0 + threadIdx.x, live, pitch);
            if (row.query < 0) return;
            float total = 0;
#pragma unroll
            for (int w = 0; w < (SLICED ? 1 : WN); ++w) total += totals[w][threadIdx.x];
            *part_stats(a, part_index(a, i3, row.query, row.head, part)) =
                make_float2(tops[LAST][threadIdx.x], total);
            staged.send(a, i3, row, threadIdx.x, part);
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < MI; ++i) {
        bool odd[2] = {};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int index = row0 + 16 * i + 8 * r;
            const Row row(a, i3, head_kv, r0 + index, live, pitch);
            float total = 0;
#pragma unroll
            for (int w = 0; w < (SLICED ? 1 : WN); ++w) total += totals[w][index];
            l[i][r] = total;
            if (SLICED) m[i][r] = tops[LAST][index];
            if (row.query < 0) continue;
            const End to(a, i3, row, part, m[i][r], total, wn == 0 && lane % 4 == 0);
#pragma unroll
            for (int c = 0; c < NV; ++c)
                odd[r] |= to.put((wn * NV + c) * 8 + (lane & 3) * 2, sums[i][c][2 * r],
                                 sums[i][c][2 * r + 1]);
        }
        if constexpr (!LIST)
            repair_rows<NV * 8>(a, i3, head_kv, r0 + (wm * MI + i) * 16, walk.first * BN,
                                walk.end * BN, part, wn * NV * 8, odd, m[i], l[i],
                                latent_source_of<Stored<T, Q8>>(a, i3, head_kv));
    }
}
