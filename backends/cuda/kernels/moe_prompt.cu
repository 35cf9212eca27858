// The weighted sum over the experts of a prompt's tokens, from short rows, and the norm behind it.
//
// A thread has eight adjacent elements of a token. 2048 tokens of 2048 elements with six experts read
// 50 MB of short rows, 16 of shared experts and 16 of the residual, and write 16: 35 us at 2.8 TB/s.
// With a norm, a block has a whole token; 8 MB of f16 more are written, and the norm reads nothing.
//
// Few rows at once, of many warps, and lines that leave L2 first, as nobody reads them soon: 39.7 us with
// the norm. Three rows that stay in L2 take 44, six rows and 80 registers 54, eight and 96 64. One look
// for further words for all of a row's saves a third of the instructions (840 a warp).
// @kernel hot add_short<256, false>
// @kernel hot add_short<{256|512|1024}, true>
// @kernel hot add_short_joint<{256|512|1024}>
#include "rms.cuh"
#include "sent_row.cuh"
#include "short_rows.cuh"

// sums += sum_e a[:, e, token] b[0, e, token] in the order of e, of short rows `a` of all pairs, for
// elements i to i + 7. Pair p has a row if its place (moe_group.cu) is not negative, and that place has
// its scale.
__device__ __forceinline__ void add_pairs(float (&sums)[EACH], const char* a, const int* places,
                                          const float* scales, const Tensor& b, int n, int token,
                                          int i) {
    constexpr int AHEAD = 2;  // pairs whose rows are on their way at once
    const int used = b.ne[1], first = token * used;
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
        uint4 halves[AHEAD];
        bool further = false;
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            halves[j] = {};
            if (j >= count) continue;
            const int place = places[first + start + j];
            if (place >= 0) halves[j] = __ldcs((const uint4*)(row + j * (4ll * n)));
            weights[j] = weight(start + j, place);
        }
        const auto words = [&](auto visit) {
#pragma unroll
            for (int j = 0; j < AHEAD; ++j) {
                const unsigned own[4] = {halves[j].x, halves[j].y, halves[j].z, halves[j].w};
#pragma unroll
                for (int word = 0; word < 4; ++word) visit(j, word, own[word]);
            }
        };
        words([&](int, int, unsigned both) { further |= have_long(both); });
        if (!further) {
            words([&](int j, int word, unsigned both) {
                if (j < count) add(word, two_floats(both), weights[j]);
            });
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
}

// total = the sum over a token's experts + c + d if present. Elements are adjacent, at multiples of 16
// bytes. NORMED: a block has a whole token and leaves its norm; `total` may be null.
template <int THREADS, bool NORMED>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS)
    add_short(Tensor total, const char* a, const int* places, const float* scales, Tensor b,
              Tensor c, Tensor d, const __grid_constant__ Normed norm) {
    const int token = blockIdx.x, i = EACH * (blockIdx.y * blockDim.x + threadIdx.x), n = total.ne[0];
    if (NORMED && i < n) fetch_early(norm.w.data + 4 * i);
    begin();
    float sums[EACH] = {};
    if (i < n) {
        const EightFloats more[2] = {eight_of(c, token, i), eight_of(d, token, i)};
        add_pairs(sums, a, places, scales, b, n, token, i);
#pragma unroll
        for (int k = 0; k < EACH; ++k) sums[k] += more[0].v[k], sums[k] += more[1].v[k];
        if (total.data) put_eight<false>(total, token, i, sums);
    }
    if constexpr (NORMED) put_normed(norm, sums, n, token, i);
}

// The same where another GPU has the other experts: the sum over this GPU's experts + c is added to
// that GPU's (sent_row.cuh), then d.
template <int THREADS>
__global__ void __launch_bounds__(THREADS, blocks_of(40, THREADS))
    add_short_joint(Tensor total, const char* a, const int* places, const float* scales, Tensor b,
                    Tensor c, Tensor d, const __grid_constant__ Normed norm,
                    const __grid_constant__ Peers peers, unsigned long long at) {
    const int token = blockIdx.x, i = EACH * threadIdx.x, n = total.ne[0];
    if (i < n) fetch_early(norm.w.data + 4 * i);
    begin();
    SentRow row(peers, at, token, n);
    float sums[EACH] = {};
    if (i < n) {
        const EightFloats more = eight_of(c, token, i);
        add_pairs(sums, a, places, scales, b, n, token, i);
#pragma unroll
        for (int k = 0; k < EACH; ++k) sums[k] += more.v[k];
    }
    finish_row(row, sums, d, total, norm, token, i);
}
