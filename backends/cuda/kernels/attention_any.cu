// flash_attn_ext in plain f32 arithmetic: handles every type, stride and head size up to 576, and
// every node with prec="f32". A block of 256 threads computes 16 rows of scores and walks its split
// of the keys in tiles of BN. Each tile is decoded to f32 in shared memory: first the keys for the
// scores, then the values in the same place.
// With LIST, keys come from a query's list.
// @kernel any<{64|128|256}, 32, false>
// @kernel any<576, 16, {false|true}>
#include "attention.cuh"
#include "blocks.cuh"

enum Type { F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, IQ4_NL };

__device__ __forceinline__ float half_at(const char *p) { return __half2float(*(const __half *)p); }

// Element i of a row of adjacent blocks.
__device__ float element(const char *row, int type, int i) {
    using namespace file;
    switch (type) {
        case F32: return element<Plain<float>>(row, sizeof(float), i);
        case F16: return element<Plain<__half>>(row, sizeof(__half), i);
        case BF16: return element<Plain<__nv_bfloat16>>(row, sizeof(__half), i);
        case Q8_0: return element<q8_0>(row, q8_0::BYTES, i);
        case Q4_0: return element<q4_0>(row, q4_0::BYTES, i);
        case Q4_1: return element<q4_1>(row, q4_1::BYTES, i);
        case Q5_0: return element<q5_0>(row, q5_0::BYTES, i);
        case Q5_1: return element<q5_1>(row, q5_1::BYTES, i);
        default: return element<iq4_nl>(row, iq4_nl::BYTES, i);
    }
}

// Keys and values of one head, as `repair` reads them.
struct Every {
    const char *k, *v;
    long long step_k, step_v;
    int type_k, type_v;

    __device__ float key(int j, int i) const { return element(k + j * step_k, type_k, i); }
    __device__ float value(int j, int c) const { return element(v + j * step_v, type_v, c); }
};

// Corrects 32 columns of a row. Not inlined, so that the kernel does not need its registers.
__device__ __noinline__ void repair_columns(const Attention &a, int i3, int head_kv, int r, int j0,
                                            int j1, int split, int column, float m, float l,
                                            const Every &source) {
    repair<1>(a, i3, head_kv, r, j0, j1, split, column, min(column + 32, a.d_v), m, l, source);
}

template <int D, int BN, bool LIST>
__global__ void __launch_bounds__(256) any(const __grid_constant__ Attention a) {
    wait_for_predecessor();
    constexpr int M = 16, PITCH = D + 4, N = D / 64;
    extern __shared__ __align__(16) float memory[];
    float *q = memory, *tile = q + M * PITCH, *p = tile + BN * PITCH;
    __shared__ float lost[M], top[M], total[M], biases[BN];
    __shared__ int rows_of[BN];
    const int t = threadIdx.x, lane = t % 32, warp = t / 32;
    const int split = blockIdx.y, r0 = blockIdx.x * M;
    const int head_kv = blockIdx.z % a.heads_kv, i3 = blockIdx.z / a.heads_kv;
    const int ratio = a.ratio(), live = a.live();
    const int pitch = a.pitch_of<LIST>(), q0 = r0 / pitch, q1 = (r0 + M - 1) / pitch;

    release_successor();
    for (int r = warp; r < M; r += 8) {
        const int query = (r0 + r) / pitch, h = (r0 + r) % pitch, head = head_kv * ratio + h;
        const float *row =
            (const float *)(a.q + query * a.nb_q[0] + head * a.nb_q[1] + i3 * a.nb_q[2]);
        for (int i = lane; i < PITCH; i += 32)
            q[r * PITCH + i] = query < a.n_q && h < ratio && i < a.d_k ? row[i] : 0;
    }
    if (t < M) top[t] = -INF, total[t] = 0;
    const auto walk = walk_of<LIST, BN>(a, i3, q0, q1, live, split);
    auto list = list_of<LIST, BN, 8 * BN>(a, i3, q0, split);
    if (t < 8 * BN) list.start([&] { return Row(a, i3, head_kv, r0, live, pitch); });
    // The row of the cache at place j of a tile, or a negative number.
    const auto row_at = [&](int j0, int j) {
        return LIST ? rows_of[j] : j0 + j < live ? j0 + j : -1;
    };
    const float scale = a.softcap > 0 ? a.scale / a.softcap : a.scale;
    const int column = t % 64, rows = t / 64 * 4;
    float sums[4][N] = {};

    for (int n = walk.first; n < walk.end; ++n) {
        if (walk.hidden(n)) continue;
        const int j0 = n * BN;
        const char *k = a.k + head_kv * a.nb_k[1] + i3 * a.nb_k[2];
        const char *v = a.v + head_kv * a.nb_v[1] + i3 * a.nb_v[2];
        __syncthreads();
        if constexpr (LIST) {
            if (t < 8 * BN) list.fetch(n, biases, [&](int i, int id) {
                if (t % 8 == 0) rows_of[list.place(i)] = id;
            });
            __syncthreads();
        }
        const int width = (a.d_k + 3) / 4 * 4;
        for (int j = warp; j < BN; j += 8) {
            const int from = row_at(j0, j);
            for (int i = lane; i < width; i += 32)
                tile[j * PITCH + i] =
                    from >= 0 && i < a.d_k ? element(k + from * a.nb_k[0], a.type_k, i) : 0;
        }
        __syncthreads();
        for (int i = t; i < M * BN; i += 256) {
            const int r = i / BN, j = i % BN;
            const Row row(a, i3, head_kv, r0 + r, live, pitch);
            float s = 0;
            for (int c = 0; c < width; c += 4) {
                const float4 x = *(const float4 *)(q + r * PITCH + c);
                const float4 y = *(const float4 *)(tile + j * PITCH + c);
                s = fmaf(x.x, y.x, fmaf(x.y, y.y, fmaf(x.z, y.z, fmaf(x.w, y.w, s))));
            }
            s *= scale;
            s = (a.softcap > 0 ? a.softcap * tanhf(s) : s) * LOG2E;
            bool visible = j0 + j >= row.first && j0 + j < row.last;
            if constexpr (LIST) {
                visible = biases[j] != -INF;
                s += row.slope * biases[j];
            } else if (visible && row.mask) {
                const float bias = half_at(row.mask + (j0 + j) * a.nb_mask[0]);
                s += row.slope * bias, visible = bias != -INF;
            }
            p[r * (BN + 1) + j] = visible ? s : -INF;
        }
        __syncthreads();
        for (int j = warp; j < BN; j += 8) {
            const int from = row_at(j0, j);
            for (int i = lane; i < a.d_v; i += 32)
                tile[j * PITCH + i] = from >= 0 ? element(v + from * a.nb_v[0], a.type_v, i) : 0;
        }
        for (int r = warp; r < M; r += 8) {
            const float s = lane < BN ? p[r * (BN + 1) + lane] : -INF;
            float m = s;
            for (int i = 16; i; i /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
            m = fmaxf(m, top[r]);
            const float e = exp2f(s - finite(m));
            float l = e;
            for (int i = 16; i; i /= 2) l += __shfl_xor_sync(~0u, l, i);
            __syncwarp();
            if (lane < BN) p[r * (BN + 1) + lane] = e;
            if (lane == 0) {
                lost[r] = exp2f(top[r] - finite(m));
                total[r] = total[r] * lost[r] + l;
                top[r] = m;
            }
        }
        __syncthreads();
#pragma unroll
        for (int r = 0; r < 4; ++r)
#pragma unroll
            for (int i = 0; i < N; ++i) sums[r][i] *= lost[rows + r];
        for (int j = 0; j < BN; ++j) {
            float w[4];
#pragma unroll
            for (int r = 0; r < 4; ++r) w[r] = p[(rows + r) * (BN + 1) + j];
#pragma unroll
            for (int i = 0; i < N; ++i) {
                const float y = column + 64 * i < a.d_v ? tile[j * PITCH + column + 64 * i] : 0;
#pragma unroll
                for (int r = 0; r < 4; ++r) sums[r][i] = fmaf(w[r], y, sums[r][i]);
            }
        }
    }
    __syncthreads();
    bool odd[4] = {};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        const Row row(a, i3, head_kv, r0 + rows + r, live, pitch);
        if (row.query < 0) continue;
        const End to(a, i3, row, split, top[rows + r], total[rows + r], column == 0);
#pragma unroll
        for (int i = 0; i < N; ++i)
            if (column + 64 * i < a.d_v) {
                to.to[column + 64 * i] = sums[r][i] * to.factor;
                odd[r] |= !finite_number(sums[r][i]);
            }
    }
    if (LIST) return;  // hidden keys were not read
    const Every source = {a.k + head_kv * a.nb_k[1] + i3 * a.nb_k[2],
                          a.v + head_kv * a.nb_v[1] + i3 * a.nb_v[2],
                          a.nb_k[0], a.nb_v[0], a.type_k, a.type_v};
    u32 some = 0;
#pragma unroll
    for (int r = 0; r < 4; ++r) some |= __any_sync(~0u, odd[r]) << r;
    for (__syncwarp(); some; some &= some - 1) {
        const int r = rows + __ffs(some) - 1;
        for (int i = column - lane; i < a.d_v; i += 64)
            repair_columns(a, i3, head_kv, r0 + r, walk.first * BN, walk.end * BN, split, i, top[r],
                           total[r], source);
    }
}
