// The steps around flash_attn_ext: combining its splits, surveying explicit masks, decoding
// quantized keys and values for the prompt kernels. Also the related ops merge_lse, lse_sum and
// lse_finish.
// @kernel hot combine<{1|4}>
// @kernel survey
// @kernel decode_q8_0
// @kernel merge_lse
// @kernel lse_sum
// @kernel lse_finish
#include "attention.cuh"

// out = sum over splits, in order. A block computes one row and 32 x VEC columns. Each of its 8
// warps takes every eighth split, and the warps are summed in order, so two runs are bit-equal. A
// warp loads its first 8 splits before it knows their weights.
template <int VEC>
__global__ void __launch_bounds__(256) combine(const __grid_constant__ Attention a) {
    constexpr int AHEAD = 8;
    __shared__ float sums[8][32 * VEC];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const long long row = blockIdx.x;
    const int head = row % a.heads, query = row / a.heads % a.n_q, i3 = row / a.heads / a.n_q;
    const float2 *stats = part_stats(a, row * a.splits);
    const int column = (blockIdx.y * 32 + lane) * VEC;
    float x[AHEAD][VEC];
    const auto load = [&](int first) {
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
            const int s = first + warp + 8 * n;
            const bool real = s < a.splits && column < a.d_v;
            const float *from = part_sums(a, row * a.splits + s) + column;
            if constexpr (VEC == 4)
                *(float4 *)x[n] = real ? *(const float4 *)from : make_float4(0, 0, 0, 0);
            else
                x[n][0] = real ? from[0] : 0;
        }
    };
    // As overlap.cuh says, the next launch may start beside what wrote the parts.
    release_successor();
    wait_for_predecessor();
    load(0);
    float m = -INF;
    for (int s = lane; s < a.splits; s += 32) m = fmaxf(m, stats[s].x);
    for (int i = 16; i; i /= 2) m = fmaxf(m, __shfl_xor_sync(~0u, m, i));
    const float base = finite(m);
    float l = 0;
    for (int s = lane; s < a.splits; s += 32) l += stats[s].y * exp2_fast(stats[s].x - base);
    for (int i = 16; i; i /= 2) l += __shfl_xor_sync(~0u, l, i);

    float sum[VEC] = {};
    for (int first = 0;;) {
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
            const int s = first + warp + 8 * n;
            const float weight = s < a.splits ? exp2_fast(stats[s].x - base) : 0;
#pragma unroll
            for (int i = 0; i < VEC; ++i) sum[i] += weight * x[n][i];
        }
        first += 8 * AHEAD;
        if (first >= a.splits) break;
        load(first);
    }
#pragma unroll
    for (int i = 0; i < VEC; ++i) sums[warp][lane * VEC + i] = sum[i];
    __syncthreads();
    const int first = blockIdx.y * 32 * VEC;
    const bool writes = threadIdx.x < 32 * VEC && first + threadIdx.x < a.d_v;
    if (!writes) return;
    float total = 0;
#pragma unroll
    for (int w = 0; w < 8; ++w) total += sums[w][threadIdx.x];
    const float factor = row_end(a, i3, query, head, m, l, first + threadIdx.x == 0);
    out_row(a, i3, query, head)[first + threadIdx.x] = total * factor;
}

// Builds the map of an explicit mask: each warp surveys one cell across all heads.
__global__ void __launch_bounds__(256) survey(const __grid_constant__ Attention a) {
    begin();
    const int lane = threadIdx.x % 32, x = blockIdx.x * 8 + threadIdx.x / 32, y = blockIdx.y;
    const int wide = (a.n_kv + CELL - 1) / CELL;
    if (x >= wide) return;
    const int rows = min(CELL, a.n_q - y * CELL);
    int all = 0;
    for (int h = 0; h < a.mask_heads; ++h)
        for (int r = 0; r < rows; ++r) {
            const char *row = a.mask + (y * CELL + r) * a.nb_mask[1] + h * a.nb_mask[2] +
                              blockIdx.z * a.nb_mask[3];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int j = x * CELL + lane + 32 * i;
                if (j >= a.n_kv) continue;
                const u16 bits = *(const u16 *)(row + j * a.nb_mask[0]);
                all |= (bits & 0x7fff ? NONZERO : 0) | (bits != 0xfc00 ? LIVE : 0);
            }
        }
    all = __reduce_or_sync(~0u, all);
    if (lane == 0) a.map[((long long)blockIdx.z * gridDim.y + y) * wide + x] = all;
}

// Decodes rows of q8_0 blocks to contiguous f16: y [n, rows, heads, n3]. A thread per block.
__global__ void decode_q8_0(const char *x, __half *y, int blocks, int rows, int heads,
                            long long nb1, long long nb2, long long nb3, long long total) {
    begin();
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= total) return;
    const int b = i % blocks;
    const long long r = i / blocks;
    const long long outer = r / rows;
    const char *from = x + b * 34 + r % rows * nb1 + outer % heads * nb2 + outer / heads * nb3;
    const float d = __half2float(*(const __half *)from);
    for (int n = 0; n < 32; n += 2) {
        const u16 two = *(const u16 *)(from + 2 + n);
        ((u32 *)(y + i * 32))[n / 2] =
            pack2<__half>(d * (signed char)(two & 255), d * (signed char)(two >> 8));
    }
}

// ---- rows that end in their log-sum-exp; one block per row --------------------------------------

struct Rows {
    char *at;
    long long nb0, nb[3];

    __device__ float &operator()(int i) const {
        return *(float *)(at + i * nb0 + blockIdx.x * nb[0] + blockIdx.y * nb[1] +
                          blockIdx.z * nb[2]);
    }
};

// y may overwrite a or b in place, so every thread reads the log-sum-exps before any is written.
__global__ void merge_lse(Rows y, Rows a, Rows b, int d_v) {
    begin();
    const float la = a(d_v), lb = b(d_v), m = fmaxf(la, lb), base = finite(m);
    const float wa = expf(la - base), wb = expf(lb - base), total = wa + wb;
    __syncthreads();
    const float fa = total == 0 ? 0 : wa / total, fb = total == 0 ? 0 : wb / total;
    for (int i = threadIdx.x; i < d_v; i += blockDim.x) y(i) = fa * a(i) + fb * b(i);
    if (threadIdx.x == 0) y(d_v) = total == 0 ? -INF : m + logf(total);
}

// c is the sum so far (S, s, m); c.at is null for the first part. The reference m moves only when
// the new part exceeds it by more than 16: factors e^(l - m) up to e^16 are harmless, and while m
// stays the old sums are multiplied by e^0, exactly 1.
__global__ void lse_sum(Rows y, Rows a, Rows c, int d_v) {
    begin();
    const bool more = c.at != nullptr;
    const float l = a(d_v), s = more ? c(d_v) : 0, m = more ? c(d_v + 1) : -3.4028235e38f;
    const float top = l - (more ? 16.f : 0.f) > m ? l : m;
    const float keep = expf(m - top), add = expf(l - top);
    __syncthreads();
    for (int i = threadIdx.x; i < d_v; i += blockDim.x)
        y(i) = (more ? keep * c(i) : 0) + add * a(i);
    if (threadIdx.x == 0) y(d_v) = keep * s + add, y(d_v + 1) = top;
}

__global__ void lse_finish(Rows y, Rows c, int d_v, int lse) {
    begin();
    const float s = c(d_v), m = c(d_v + 1);
    for (int i = threadIdx.x; i < d_v; i += blockDim.x) y(i) = s == 0 ? 0 : c(i) / s;
    if (lse && threadIdx.x == 0) y(d_v) = s == 0 ? -INF : m + logf(s);
}
