// The weighted sum over the experts of a prompt's tokens, from short rows, and the norm behind it.
//
// A thread has eight adjacent elements of a token. 2048 tokens of 2048 elements with six experts read
// 50 MB of short rows, 16 of shared experts and 16 of the residual, and write 16: 35 us at 2.8 TB/s.
// With a norm, a block has a whole token; 8 MB of f16 more are written, and the norm reads nothing.
//
// Many warps hold more bytes in flight than many loads of a warp: three rows at once and 64 registers
// took 43 us with the norm, six rows and 80 registers 54, eight and 96 64. A look for further words
// behind each word, in place of one for all, made it 840 instructions a warp.
// @kernel hot add_short<256, false>
// @kernel hot add_short<{256|512|1024}, true>
#include "short_rows.cuh"

constexpr int EACH = 8;

// What a norm leaves: y = x / sqrt(mean(x^2) + eps) * w, as rows of f16 and their scales (halves.cuh),
// and as f32 if `y` is present.
struct Normed {
    Tensor y, w;
    float eps;
    unsigned* halves;
    float* scales;
};

__device__ __forceinline__ void put_normed(const Normed& norm, float (&x)[EACH], int n, int token,
                                           int i) {
    float squares = 0, most = 0, weights[EACH] = {};
#pragma unroll
    for (int k = 0; k < EACH; ++k) squares += x[k] * x[k];
    if (i < n)
#pragma unroll
        for (int v = 0; v < EACH; v += 4)
            *(float4*)(weights + v) = *(const float4*)(norm.w.data + 4 * (i + v));
    const float factor = 1.0f / sqrtf(block_reduce<Sum>(squares, 0) / n + norm.eps);
#pragma unroll
    for (int k = 0; k < EACH; ++k) {
        x[k] = x[k] * factor * weights[k];
        most = finite_most(most, x[k]);
    }
    const RowScale by = row_scale(block_reduce<Max>(most, 0.0f));
    if (threadIdx.x == 0) norm.scales[token] = by.back;
    if (i >= n) return;
    if (norm.y.data)
#pragma unroll
        for (int v = 0; v < EACH; v += 4)
            *(float4*)(norm.y.row<float>(token, 0, 0) + i + v) = *(const float4*)(x + v);
    // Pairs of a run of 16 are in the order 0 2 4 6 1 3 5 7.
    unsigned* const to = norm.halves + (token * (long long)n + i / 16 * 16) / 2 + i % 16 / 4;
    const auto pair = [&](int k) { return two_halves<__half>(x[k] * by.by, x[k + 1] * by.by); };
    *(uint2*)to = make_uint2(pair(0), pair(4));
    *(uint2*)(to + 4) = make_uint2(pair(2), pair(6));
}

// total[:, t] = sum_e a[:, e, t] b[0, e, t] in the order of e, of short rows `a` of all pairs, + c[:, t]
// and + d[:, t] if present. Pair p has a row if its place (moe_group.cu) is not negative, and that
// place has its scale. Elements are adjacent, at multiples of 16 bytes. NORMED: a block has a whole
// token and leaves its norm; `total` may be null.
template <int THREADS, bool NORMED>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    add_short(Tensor total, const char* a, const int* places, const float* scales, Tensor b,
              Tensor c, Tensor d, const __grid_constant__ Normed norm) {
    constexpr int AHEAD = 3;  // pairs whose rows are on their way at once
    const int token = blockIdx.x, i = EACH * (blockIdx.y * blockDim.x + threadIdx.x);
    const int n = total.ne[0], used = b.ne[1], first = token * used;
    if (NORMED && i < n) fetch_early(norm.w.data + 4 * i);
    begin();
    const auto four = [&](const Tensor& x, int v) {
        return (float4*)(x.row<float>(token, 0, 0) + i + v);
    };
    float sums[EACH] = {};
    if (i < n) {
        float4 more[2][2] = {};
#pragma unroll
        for (int v = 0; v < 2; ++v) {
            if (c.data) more[0][v] = *four(c, 4 * v);
            if (d.data) more[1][v] = *four(d, 4 * v);
        }
        const auto weight = [&](int e, int place) {
            return (place < 0 ? 0 : scales[place] * SHORT_UNIT) * *b.at<float>(0, e, token, 0);
        };
        const auto add = [&](int word, float2 x, float factor) {
            sums[2 * word] += x.x * factor, sums[2 * word + 1] += x.y * factor;
        };
        const char* row = a + first * (4ll * n) + 2 * i;
        for (int start = 0; start < used; start += AHEAD, row += AHEAD * (4ll * n)) {
            const int count = min(AHEAD, used - start);
            float weights[AHEAD];
            Pack<unsigned, 4> halves[AHEAD];
            bool further = false;
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                halves[j] = {};
                if (j >= count) continue;
                const int place = places[first + start + j];
                if (place >= 0) halves[j] = *(const Pack<unsigned, 4>*)(row + j * (4ll * n));
                weights[j] = weight(start + j, place);
            }
#pragma unroll
            for (int j = 0; j < AHEAD; ++j)
#pragma unroll
                for (int word = 0; word < 4; ++word) further |= have_long(halves[j].v[word]);
            if (!further) {
#pragma unroll
                for (int j = 0; j < AHEAD; ++j) {
                    if (j >= count) break;
#pragma unroll
                    for (int word = 0; word < 4; ++word)
                        add(word, two_floats(halves[j].v[word]), weights[j]);
                }
                continue;
            }
#pragma unroll 1
            for (int j = 0; j < count; ++j) {  // read again, as registers have no numbers
                const int place = places[first + start + j];
                const float own = weight(start + j, place);
#pragma unroll
                for (int word = 0; word < 4; ++word) {
                    const char* const at = row + j * (4ll * n) + 4 * word;
                    const unsigned both = place < 0 ? 0 : *(const unsigned*)at;
                    add(word, two_short(both, at, 2 * n), own);
                }
            }
        }
#pragma unroll
        for (int v = 0; v < EACH; v += 4) {
#pragma unroll
            for (int m = 0; m < 2; ++m) {
                const float4 x = more[m][v / 4];
                sums[v] += x.x, sums[v + 1] += x.y, sums[v + 2] += x.z, sums[v + 3] += x.w;
            }
            if (total.data) *four(total, v) = *(const float4*)(sums + v);
        }
    }
    if constexpr (NORMED) put_normed(norm, sums, n, token, i);
}
