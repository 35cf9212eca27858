// Shared by all kernels of flash_attn_ext: the argument, the rows of scores, masks, softmax, and
// how a row ends.
//
// A row of scores is one query of one head. The `ratio` heads that share a key head are rows of one
// block: row R is query R / pitch of head  head_kv ratio + R % pitch. The pitch is the ratio, but with
// lists of keys a block has one query only: there the pitch is rounded up to whole blocks, and rows
// past the ratio are empty.
// Scores are in units of log2: e^x = 2^(x log2 e), and 2^x is one instruction.
//
// A key hidden from a row must not affect it, even if its K or V row holds NaN or infinity. Its
// score is always replaced by -inf. Its values are multiplied by a weight of 0, but 0 * NaN is NaN,
// so the values need more. Two designs.
// (a) Clear, in shared memory, the rows of V that no row of the block sees. This costs a pass over
// every tile with a hidden key, and it is wrong where the rows of a block differ: the NaN of one
// sequence in a cache reaches the others.
// (b) Check the finished sums, one comparison each. If one is not finite, `repair` looks for the
// cause among the hidden keys. If it finds one there, it computes the row again in f32, key by key,
// without the hidden keys. This costs nothing in the loop and is right for each row separately:
// taken. A repaired row takes about a thousand times as long; a row whose visible keys give NaN
// does not.
#pragma once
#include "mma.cuh"

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
#define INF __int_as_float(0x7f800000)
// Keys and queries per cell in the map of an explicit mask.
constexpr int CELL = 64;
// Flags of a cell: some element is not 0; some element is not -inf.
enum { NONZERO = 1, LIVE = 2 };

// The argument of every kernel here (Attention in attention/arguments.py). Strides are in bytes.
struct Attention {
    const char *q, *k, *v;
    const char *mask;   // f16, or null
    const char *sinks;  // f32, or null
    const int *kv_len;  // null: all keys count
    const char *pos;    // i32: row i sees keys up to position(i), at most `window`; or null
    char *out;      // null: all sums go to `parts`, even of a single split
    float *parts;   // partial results of the splits for `combine`: sums ..
    float2 *stats;  // .. and (max, sum of weights)
    u8 *map;       // flags of the cells of `mask` [mask_batch][queries / 64][keys / 64], or null
    const char *ids;  // i32: the keys of each query; null: all keys
    long long nb_q[3], nb_k[3], nb_v[3], nb_mask[4], nb_out[3], nb_ids[3], nb_sinks, nb_pos;
    int n_q, n_kv, heads, heads_kv, n3, d_k, d_v, mask_heads, mask_batch;
    int window, kv0, splits, head0, n_head, lse, type_k, type_v, v_start, n_ids, pitch, stride;
    int early;  // Early
    float scale, softcap, max_bias;

    __device__ int ratio() const { return heads / heads_kv; }
    // Known to the compiler where there are no lists.
    template <bool LIST> __device__ int pitch_of() const { return LIST ? pitch : ratio(); }
    // The number of valid keys. kv_len, like positions, may be any int32.
    __device__ int live() const {
        if (!kv_len) return n_kv;
        return *kv_len <= kv0 ? 0 : (int)min((long long)n_kv, (long long)*kv_len - kv0);
    }
    // The last key that query i sees; -1: none. A key is for `stride` positions, and seen from the
    // last of them on. A negative position sees no keys.
    __device__ int position(int i) const {
        const int p = max(-1, *(const int *)(pos + i * nb_pos));
        return stride == 1 ? p : int((unsigned(p) + 1) / unsigned(stride)) - 1;
    }
};

// ---- rows ---------------------------------------------------------------------------------------

// A row of scores; it sees keys first <= j < last.
struct Row {
    int query, head, first, last;
    const char *mask;
    float slope;

    __device__ Row(const Attention &a, int i3, int head_kv, int r, int live)
        : Row(a, i3, head_kv, r, live, a.ratio()) {}
    __device__ Row(const Attention &a, int i3, int head_kv, int r, int live, int pitch) {
        const int ratio = a.ratio(), h = r % pitch;
        query = r / pitch;
        head = head_kv * ratio + h;
        first = 0, last = live, mask = nullptr, slope = LOG2E;
        if (query >= a.n_q || (pitch != ratio && h >= ratio)) {
            query = -1, last = 0;
            return;
        }
        if (a.pos) {
            const int p = a.position(query);
            last = p < last ? p + 1 : last;
            if (a.window) first = max(0, p - (a.window - 1));
        }
        if (a.mask)
            mask = a.mask + query * a.nb_mask[1] + (head % a.mask_heads) * a.nb_mask[2] +
                   (i3 % a.mask_batch) * a.nb_mask[3];
        if (a.max_bias > 0) {
            const int power = 1 << (31 - __clz(a.n_head)), g = a.head0 + head;
            slope *= exp2f(-a.max_bias * (g < power ? g + 1 : g - power + 0.5f) / power);
        }
    }
};

// The keys that some row of a block sees, and those that every row sees.
struct Span {
    int first, last, full_first, full_last;
};

// Must be called by all threads of a block; queries q0 <= i < q1.
__device__ __forceinline__ Span span(const Attention &a, int q0, int q1, int live) {
    if (!a.pos) return {0, live, 0, live};
    __shared__ int low, high;
    if (threadIdx.x == 0) low = 0x7fffffff, high = -1;
    __syncthreads();
    for (int i = q0 + threadIdx.x; i < min(q1, a.n_q); i += blockDim.x) {
        const int p = a.position(i);
        atomicMin(&low, p);
        atomicMax(&high, p);
    }
    __syncthreads();
    Span s = {0, high < live ? high + 1 : live, 0, low < live ? low + 1 : live};
    if (a.window)
        s.first = max(0, low - (a.window - 1)), s.full_first = max(0, high - (a.window - 1));
    return s;
}

// The keys that query q sees. Nobody waits for other threads, unlike above.
__device__ __forceinline__ Span span(const Attention &a, int q, int live) {
    if (!a.pos) return {0, live, 0, live};
    const int p = a.position(q), first = a.window ? max(0, p - (a.window - 1)) : 0;
    const int last = p < live ? p + 1 : live;
    return {first, last, first, last};
}

// Flags of an explicit mask over queries q0..q1 and keys j0..j1: LIVE alone means all zeros. Without
// a map, as of a small mask, nothing is known about its elements.
__device__ __forceinline__ int flags(const Attention &a, int i3, int q0, int q1, int j0, int j1) {
    if (!a.map) return a.mask ? LIVE | NONZERO : LIVE;
    const int wide = (a.n_kv + CELL - 1) / CELL, high = (a.n_q + CELL - 1) / CELL;
    const u8 *map = a.map + (long long)(i3 % a.mask_batch) * high * wide;
    int all = 0;
    for (int y = q0 / CELL; y <= min(q1, a.n_q - 1) / CELL; ++y)
        for (int x = j0 / CELL; x <= min(j1, a.n_kv - 1) / CELL; ++x)
            all |= map[(long long)y * wide + x];
    return all;
}

// Loads the queries of a block's rows, to be stored as T in shared memory. A warp takes rows
// `warp`, `warp + WARPS`, .. of ROWS. It starts all its loads before it waits for the first. Start
// them before the loads of the keys, or they queue behind those. PAIRS: rows of queries are 8-byte
// aligned.
template <class T, int D, int ROWS, int WARPS, bool PAIRS = false>
struct Queries {
    static constexpr int N = (D / 2 + 31) / 32, MINE = ROWS / WARPS;
    const float *from[MINE];  // this lane's first column, or null
    float x[MINE][N][2];

    __device__ __forceinline__ Queries() {}
    __device__ __forceinline__ Queries(const Attention &a, int i3, int head_kv, int r0, int warp)
        : Queries(a, i3, head_kv, r0, warp, a.ratio()) {}
    __device__ __forceinline__ Queries(const Attention &a, int i3, int head_kv, int r0, int warp,
                                       int pitch) {
        find(a, i3, head_kv, r0, warp, pitch);
        load();
    }
    // Computes addresses, and does so here. Reads nothing, so it need not wait for the predecessor.
    __device__ __forceinline__ void find(const Attention &a, int i3, int head_kv, int r0, int warp,
                                         int pitch) {
        const int ratio = a.ratio();
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            const int r = r0 + warp + i * WARPS;
            const int query = r / pitch, h = r % pitch, head = head_kv * ratio + h;
            const bool real = query < a.n_q && (pitch == ratio || h < ratio);
            const char *row = a.q + query * a.nb_q[0] + head * a.nb_q[1] + i3 * a.nb_q[2];
            from[i] = real ? (const float *)row + 2 * (threadIdx.x % 32) : nullptr;
            asm volatile("" : "+l"(from[i]));
        }
    }
    __device__ __forceinline__ void load() {
        const int lane = threadIdx.x % 32;
#pragma unroll
        for (int i = 0; i < MINE; ++i)
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const float *at = from[i] + 64 * n;
                const bool real = from[i] && 2 * (lane + 32 * n) < D;
                if constexpr (PAIRS) {
                    const float2 two = real ? *(const float2 *)at : make_float2(0, 0);
                    x[i][n][0] = two.x, x[i][n][1] = two.y;
                } else {
                    x[i][n][0] = real ? at[0] : 0;
                    x[i][n][1] = real ? at[1] : 0;
                }
            }
    }

    // Scales each row by a power of two to magnitudes below 1, so that nothing overflows in f16.
    // factor[row] turns products into scores. `at` returns the address of an even column and the
    // next.
    template <class At>
    __device__ __forceinline__ void store(const Attention &a, float *factor, int warp,
                                          At at) const {
        const int lane = threadIdx.x % 32;
        const float base = a.softcap > 0 ? fabsf(a.scale) / a.softcap : fabsf(a.scale) * LOG2E;
#pragma unroll
        for (int i = 0; i < MINE; ++i) {
            const int r = warp + i * WARPS;
            float top = 0;
#pragma unroll
            for (int n = 0; n < N; ++n)
                top = fmaxf(top, fmaxf(fabsf(x[i][n][0]), fabsf(x[i][n][1])));
#pragma unroll
            for (int m = 16; m; m /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, m));
            const int e = max(-100, min(100, int(__float_as_uint(top) >> 23) - 126));
            const float sign = a.scale < 0 ? -1.f : 1.f;
            const float down = sign * __uint_as_float((127 - e) << 23);
            if (lane == 0) factor[r] = fmaxf(base * __uint_as_float((127 + e) << 23), 1e-30f);
#pragma unroll
            for (int n = 0; n < N; ++n)
                if (2 * (lane + 32 * n) < D)
                    *at(r, 2 * (lane + 32 * n)) = pack2<T>(x[i][n][0] * down, x[i][n][1] * down);
        }
    }
};

// ---- scores and weights in fragments ------------------------------------------------------------

// Hides the keys that a row does not see. e = 0 or 2 picks one of a fragment's two rows.
template <int N>
__device__ __forceinline__ void hide(const Row &row, float (&s)[N][4], int e, int key) {
    const u32 ahead = key - row.first, many = max(0, row.last - row.first);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i)
            if (ahead + 8 * n + i >= many) s[n][e + i] = -INF;
}

// Turns products into scores for one of the two rows of a fragment (e = 0 or 2) when there is more
// to do than scaling: soft-cap, explicit mask, hidden keys. Returns the factor still to be applied.
template <int N>
__device__ __forceinline__ float masked(const Attention &a, const Row &row, float (&s)[N][4], int e,
                                        float factor, int key, bool bias) {
    if (!bias && a.softcap <= 0) {
        hide(row, s, e, key);
        return factor;
    }
    const u32 ahead = key - row.first, many = max(0, row.last - row.first);
    const __half *mask = (const __half *)row.mask + key;  // mask elements are adjacent
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float x = s[n][e + i] * factor;
            if (a.softcap > 0) x = a.softcap * LOG2E * tanhf(x);
            bool seen = ahead + 8 * n + i < many;
            if (bias && seen) {
                const float b = __half2float(mask[8 * n + i]);
                x += row.slope * b, seen = b != -INF;
            }
            s[n][e + i] = seen ? x : -INF;
        }
    return 1;
}

// ---- lists of keys ------------------------------------------------------------------------------

// The list of a block's query, as one of THREADS copies its keys to tiles of BN places. Eight threads
// share a place and copy its row together; a thread has the same PLACES of every tile. It reads ids
// two tiles ahead and the mask one tile ahead, so that copies wait for neither.
// A hidden key is not read: its place becomes zeros and its bias -inf. So nothing needs `repair`.
// Without ids, the list is all keys, n_ids of them.
template <int BN, int THREADS>
struct Listed {
    static constexpr int PLACES = BN * 8 / THREADS;
    const char *ids, *mask;
    const long long step, step_mask;
    const int first, end, thread;   // the first tile; the end of the places
    int low, high;                  // of the keys that the query sees
    int id[PLACES], later[PLACES];  // of the next tile; of the one after it, as in the list
    float bias[PLACES];             // of the next tile

    // Tiles first to last of the list. Reads nothing, so it need not wait for the predecessor.
    __device__ __forceinline__ Listed(const Attention &a, int i3, int query, int first, int last,
                                      int thread)
        : ids(a.ids + query * a.nb_ids[1] + i3 * a.nb_ids[2]), step(a.nb_ids[0]),
          step_mask(a.nb_mask[0]), first(first), end(min(a.n_ids, last * BN)), thread(thread) {}
    // Makes the first tile the next one. The span and the mask of `row_of()` are those of all rows of
    // the query; ids are on their way while they are read.
    template <class RowOf>
    __device__ __forceinline__ void start(RowOf row_of) {
        look(first);
        const Row row = row_of();
        low = row.first, high = row.last, mask = row.mask;
        turn(first);
    }
    __device__ __forceinline__ int place(int i) const { return thread / 8 + i * (THREADS / 8); }
    __device__ __forceinline__ void look(int tile) {
#pragma unroll
        for (int i = 0; i < PLACES; ++i) {
            const int j = tile * BN + place(i);
            later[i] = j >= end ? -1 : ids ? *(const int *)(ids + j * step) : j;
        }
    }
    // Makes `tile` the next one.
    __device__ __forceinline__ void turn(int tile) {
#pragma unroll
        for (int i = 0; i < PLACES; ++i) {
            const bool seen = later[i] >= low && later[i] < high;
            id[i] = seen ? later[i] : -1;
            bias[i] = 0;
        }
        if (mask)  // loads under conditions of their own would wait for each other
#pragma unroll
            for (int i = 0; i < PLACES; ++i)
                bias[i] = __half2float(*(const __half *)(mask + max(id[i], 0) * step_mask));
#pragma unroll
        for (int i = 0; i < PLACES; ++i)
            if (id[i] < 0) bias[i] = -INF;
        look(tile + 1);
    }
    // Calls `copy(i, id)` for the thread's places of `tile`, the next one, and stores their biases.
    // The id of a hidden key is negative.
    template <class Copy>
    __device__ __forceinline__ void fetch(int tile, float *biases, Copy copy) {
#pragma unroll
        for (int i = 0; i < PLACES; ++i) {
            copy(i, bias[i] == -INF ? -1 : id[i]);
            if (thread % 8 == 0) biases[place(i)] = bias[i];
        }
        turn(tile + 1);
    }
};

// Turns products with listed keys into scores, for one of the two rows of a fragment (e = 0 or 2).
// `biases` are those of the thread's keys.
template <int N>
__device__ __forceinline__ void listed(const Attention &a, float (&s)[N][4], int e, float factor,
                                       float slope, const float *biases) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
        const float2 both = *(const float2 *)(biases + 8 * n);
        const float bias[2] = {both.x, both.y};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float x = s[n][e + i] * factor;
            if (a.softcap > 0) x = a.softcap * LOG2E * tanhf(x);
            s[n][e + i] = bias[i] == -INF ? -INF : fmaf(slope, bias[i], x);
        }
    }
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
// The value to subtract from scores: their maximum, or a finite number where all are -inf.
__device__ __forceinline__ float finite(float m) { return m == -INF ? 0.f : m; }

// One step of online softmax on a fragment's two rows: s becomes weights. Returns the factors by
// which to scale the older sums.
template <int N>
__device__ __forceinline__ float2 softmax_step(float (&s)[N][4], const float (&factor)[2],
                                               float (&m)[2], float (&l)[2]) {
    float lost[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float top = -INF;
#pragma unroll
        for (int n = 0; n < N; ++n) top = fmaxf(top, fmaxf(s[n][2 * r], s[n][2 * r + 1]));
        top = fmaxf(m[r], quad_max(top) * factor[r]);
        const float base = finite(top);
        lost[r] = exp2_fast(m[r] - base);
        m[r] = top;
        float sum = 0;
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float p = exp2_fast(fmaf(s[n][2 * r + i], factor[r], -base));
                s[n][2 * r + i] = p;
                sum += p;
            }
        l[r] = l[r] * lost[r] + sum;
    }
    return make_float2(lost[0], lost[1]);
}

// ---- the end of a row ---------------------------------------------------------------------------

__device__ __forceinline__ float *out_row(const Attention &a, int i3, int query, int head) {
    return (float *)(a.out + head * a.nb_out[0] + query * a.nb_out[1] + i3 * a.nb_out[2]);
}

// The factor for a row's sums, given the maximum m of its scores and the sum l of its weights. Also
// writes the log-sum-exp if requested. One thread of each row passes `first`.
__device__ __forceinline__ float row_end(const Attention &a, int i3, int query, int head, float m,
                                         float l, bool first) {
    float keep = 1;
    if (a.sinks) {
        const float sink = *(const float *)(a.sinks + head * a.nb_sinks) * LOG2E;
        const float top = fmaxf(m, sink);
        keep = exp2_fast(m - finite(top));
        l = l * keep + exp2_fast(sink - finite(top));
        m = top;
    }
    if (a.lse && first) out_row(a, i3, query, head)[a.d_v] = l == 0 ? -INF : (m + log2f(l)) * LN2;
    return l == 0 ? 0 : keep / l;  // NaN stays NaN
}

// Where split `split` of a row writes its sums and its (m, l).
__device__ __forceinline__ long long part_index(const Attention &a, int i3, int query, int head,
                                                int split) {
    return (((long long)i3 * a.n_q + query) * a.heads + head) * a.splits + split;
}
__device__ __forceinline__ float *part_sums(const Attention &a, long long part) {
    return a.parts + part * a.d_v;
}
__device__ __forceinline__ float2 *part_stats(const Attention &a, long long part) {
    return a.stats + part;
}

// The first unit of `part` when `count` units are shared by `parts`.
__device__ __forceinline__ int share(int count, int part, int parts) {
    return u32(count) * u32(part) / u32(parts);
}

// The tiles of N keys that a block walks: those that some of its queries, q0 to q1, see, or its
// split's share of them. Without MAP, no mask is explicit. Must be made by all threads of a block.
template <int N, bool MAP = true>
struct Walk {
    const Attention &a;
    const int i3, q0, q1;
    const Span seen;
    int first, end;

    __device__ __forceinline__ Walk(const Attention &a, int i3, int q0, int q1, int live, int split)
        : Walk(a, i3, q0, q1, split, span(a, q0, q1 + 1, live)) {}
    // All places of a list.
    __device__ __forceinline__ Walk(const Attention &a, int i3, int split)
        : Walk(a, i3, 0, 0, split, Span{0, a.n_ids, 0, a.n_ids}) {}
    __device__ __forceinline__ Walk(const Attention &a, int i3, int q0, int q1, int split,
                                    const Span &seen)
        : a(a), i3(i3), q0(q0), q1(q1), seen(seen) {
        const int start = seen.first / N, count = max(0, (seen.last + N - 1) / N - start);
        first = start + share(count, split, a.splits);
        end = start + share(count, split + 1, a.splits);
    }
    __device__ __forceinline__ Walk(const Attention &a, int i3, int q0, int q1, int live)
        : a(a), i3(i3), q0(q0), q1(q1), seen(span(a, q0, q1 + 1, live)), first(seen.first / N),
          end((seen.last + N - 1) / N) {}
    // Whether an explicit mask hides the tile from all queries.
    __device__ __forceinline__ bool hidden(int t) const {
        return MAP && !(flags(a, i3, q0, q1, t * N, t * N + N - 1) & LIVE);
    }
    // The next tile from t on, in steps, that is not hidden; or one past the last.
    __device__ __forceinline__ int alive(int t, int step = 1) const {
        while (t < end && hidden(t)) t += step;
        return t;
    }
    // Whether the mask has elements that are not 0 in the tile.
    __device__ __forceinline__ bool biased(int t) const {
        return MAP && a.mask && (flags(a, i3, q0, q1, t * N, t * N + N - 1) & NONZERO);
    }
    // Whether some row of the block does not see all keys of the tile.
    __device__ __forceinline__ bool edge(int t) const {
        return t * N < seen.full_first || t * N + N > seen.full_last;
    }
};

// The list of a block that walks one.
struct NoList {
    template <class RowOf>
    __device__ void start(RowOf) {}
};
template <bool LIST, int BN, int THREADS>
__device__ __forceinline__ auto list_of(const Attention &a, int i3, int query, int split) {
    if constexpr (LIST) {
        const Walk<BN, false> walk(a, i3, split);
        return Listed<BN, THREADS>(a, i3, query, walk.first, walk.end, threadIdx.x);
    } else {
        return NoList();
    }
}
// The walk of a block over all keys, or over the places of a list, which no map of a mask describes.
template <bool LIST, int N>
__device__ __forceinline__ Walk<N, !LIST> walk_of(const Attention &a, int i3, int q0, int q1, int live,
                                           int split) {
    if constexpr (LIST)
        return Walk<N, false>(a, i3, split);
    else
        return Walk<N>(a, i3, q0, q1, split,
                       q0 == q1 ? span(a, q0, live) : span(a, q0, q1 + 1, live));
}

__device__ __forceinline__ bool finite_number(float x) { return fabsf(x) < INF; }

// Where to write a row's sums, and their factor: to its part if keys are split, else to the result.
struct End {
    float *to;
    float factor;
    bool pairs;

    __device__ End(const Attention &a, int i3, const Row &row, int split, float m, float l,
                   bool first) {
        if (a.splits > 1 || !a.out) {
            const long long part = part_index(a, i3, row.query, row.head, split);
            if (first) *part_stats(a, part) = make_float2(m, l);
            to = part_sums(a, part), factor = 1;
        } else {
            to = out_row(a, i3, row.query, row.head);
            factor = row_end(a, i3, row.query, row.head, m, l, first);
        }
        pairs = reinterpret_cast<u64>(to) % 8 == 0;
    }

    // Writes two adjacent sums, the even column first. Returns whether one of them is not finite.
    __device__ __forceinline__ bool put(int column, float x, float y) const {
        if (pairs) {
            *(float2 *)(to + column) = make_float2(x * factor, y * factor);
        } else {
            to[column] = x * factor;
            to[column + 1] = y * factor;
        }
        return !(finite_number(x) && finite_number(y));
    }
    __device__ __forceinline__ void put_one(int column, float x) const { to[column] = x * factor; }
};

// ---- rows damaged by hidden keys ----------------------------------------------------------------

// Keys and values of one head as `repair` reads them. T is __half, __nv_bfloat16, Blocks (q8_0) or
// a kernel's own type (attention_any.cu).
struct Blocks {};
template <class T, bool Q8>
struct StoredAs {
    using type = T;
};
template <class T>
struct StoredAs<T, true> {
    using type = Blocks;
};
template <class T, bool Q8>
using Stored = typename StoredAs<T, Q8>::type;
__device__ __forceinline__ float number(const char *row, int i, __half) {
    return __half2float(((const __half *)row)[i]);
}
__device__ __forceinline__ float number(const char *row, int i, __nv_bfloat16) {
    return __bfloat162float(((const __nv_bfloat16 *)row)[i]);
}
__device__ __forceinline__ float number(const char *row, int i, Blocks) {
    const char *block = row + i / 32 * 34;
    return __half2float(*(const __half *)block) * ((const signed char *)block)[2 + i % 32];
}
template <class T>
struct Source {
    const char *k, *v;
    long long step_k, step_v;
    int v_start;

    __device__ __forceinline__ float key(int j, int i) const {
        return number(k + j * step_k, i, T());
    }
    __device__ __forceinline__ float value(int j, int c) const {
        return number(v + j * step_v, v_start + c, T());
    }
};
template <class T>
__device__ __forceinline__ Source<T> source_of(const Attention &a, int i3, int head_kv) {
    return {a.k + head_kv * a.nb_k[1] + i3 * a.nb_k[2], a.v + head_kv * a.nb_v[1] + i3 * a.nb_v[2],
            a.nb_k[0], a.nb_v[0], 0};
}
// For a V that is part of K, starting at element v_start.
template <class T>
__device__ __forceinline__ Source<T> latent_source_of(const Attention &a, int i3, int head_kv) {
    const char *k = a.k + head_kv * a.nb_k[1] + i3 * a.nb_k[2];
    return {k, k, a.nb_k[0], a.nb_k[0], a.v_start};
}

// One warp inspects row r, some of whose sums are not finite, and corrects those that a hidden key
// spoiled. Each lane owns the N columns  column + lane + 32 n < columns. j0 <= j < j1 are the keys
// that the block walked; m and l are the row's final values.
template <int N, class E = End, class S>
__device__ __forceinline__ void repair(const Attention &a, int i3, int head_kv, int r, int j0,
                                       int j1, int split, int column, int columns, float m,
                                       float l, const S &source) {
    const int lane = threadIdx.x % 32;
    const Row row(a, i3, head_kv, r, a.live());
    j1 = min(j1, a.n_kv);
    const auto bias = [&](int j) {
        return row.mask ? __half2float(*(const __half *)(row.mask + j * a.nb_mask[0])) : 0;
    };
    // A bit mask of the keys j to j + 31 that the row sees.
    const auto seen = [&](int j) {
        const int mine = j + lane;
        return __ballot_sync(~0u, mine >= row.first && mine < min(row.last, j1) &&
                                      bias(mine < j1 ? mine : j) != -INF);
    };
    bool spoilt[N] = {}, some = false;
    for (int j = j0; j < j1; j += 32)
        for (u32 hidden = ~seen(j) & ~0u >> max(0, 32 - (j1 - j)); hidden; hidden &= hidden - 1)
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int c = column + lane + 32 * n;
                if (c < columns && !finite_number(source.value(j + __ffs(hidden) - 1, c)))
                    spoilt[n] = some = true;
            }
    if (!__any_sync(~0u, some)) return;
    const float *q =
        (const float *)(a.q + row.query * a.nb_q[0] + row.head * a.nb_q[1] + i3 * a.nb_q[2]);
    const float scale = a.softcap > 0 ? a.scale / a.softcap : a.scale * LOG2E;
    float sums[N] = {}, total = 0;
    for (int j = j0; j < j1; j += 32) {
        for (u32 some = seen(j); some; some &= some - 1) {
            const int key = j + __ffs(some) - 1;
            float s = 0;
            for (int i = lane; i < a.d_k; i += 32) s = fmaf(q[i], source.key(key, i), s);
#pragma unroll
            for (int i = 16; i; i /= 2) s += __shfl_xor_sync(~0u, s, i);
            s *= scale;
            if (a.softcap > 0) s = a.softcap * LOG2E * tanhf(s);
            const float p = exp2_fast(s + row.slope * bias(key) - finite(m));
            total += p;
#pragma unroll
            for (int n = 0; n < N; ++n) {
                const int c = column + lane + 32 * n;
                if (c < columns && spoilt[n]) sums[n] = fmaf(p, source.value(key, c), sums[n]);
            }
        }
        // If visible keys make every column NaN as well, there is nothing to correct.
        bool open = false;
#pragma unroll
        for (int n = 0; n < N; ++n) open |= spoilt[n] && sums[n] == sums[n];
        if (!__any_sync(~0u, open)) return;
    }
    const E to(a, i3, row, split, m, l, false);
    const float factor = total == 0 ? 0 : l / total;
#pragma unroll
    for (int n = 0; n < N; ++n)
        if (spoilt[n]) to.put_one(column + lane + 32 * n, sums[n] * factor);
}

// Does the same for the sums of a warp's fragments. This thread found that a sum of row
// `row0 + lane / 4` (odd[0]) or of the row 8 below it (odd[1]) is not finite. `row0`, columns and
// keys are the warp's.
template <int COLUMNS, class E = End, class S>
__device__ __forceinline__ void repair_rows(const Attention &a, int i3, int head_kv, int row0,
                                            int j0, int j1, int split, int column,
                                            const bool (&odd)[2], const float (&m)[2],
                                            const float (&l)[2], const S &source) {
    __syncwarp();  // corrections must be written after the wrong values
    const u32 first = __ballot_sync(~0u, odd[0]), second = __ballot_sync(~0u, odd[1]);
    for (u64 some = first | (u64)second << 32; some;) {
        const int bit = __ffsll(some) - 1, lane = bit % 32;
        const float top = __shfl_sync(~0u, bit < 32 ? m[0] : m[1], lane);
        const float total = __shfl_sync(~0u, bit < 32 ? l[0] : l[1], lane);
        repair<(COLUMNS + 31) / 32, E>(a, i3, head_kv, row0 + bit / 32 * 8 + lane / 4, j0, j1,
                                        split, column, column + COLUMNS, top, total, source);
        some &= ~(15ull << (bit & ~3));
    }
}
