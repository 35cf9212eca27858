// Rotary position embedding: one thread per pair, and per two elements that are not
// rotated; of many tokens in place, four pairs.
// @kernel rope<{float|__half}, {true|false}>
// @kernel hot rope_tokens<{float|__half}, {true|false}>
// @kernel rope_rows<{__half|__nv_bfloat16}, {true|false}>
#include "rope.cuh"

// units: of a row. If the result overwrites `a`, those that are rotated are enough.
template <class T, bool NEOX>
__global__ void __launch_bounds__(256)
    rope(Tensor out, Tensor a, Tensor pos, Tensor factors, Rope r, int units) {
    int i = blockIdx.y * 256 + threadIdx.x;
    int head = i / units, unit = i - head * units, token = blockIdx.x, i3 = blockIdx.z;
    const double frequency = frequency_of(unit, r);
    begin();
    if (head >= out.ne[1]) return;
    turn<NEOX>(
        r, unit, frequency, out.ne[0], *pos.at<int>(token, 0, 0, 0), factors,
        [&](int k) { return to_f32(*a.at<T>(k, head, token, i3)); },
        [&](int k, float x) { *out.at<T>(k, head, token, i3) = from_f32<T>(x); });
}

// In place, of many tokens: a block has `tokens` of them, computes each angle once for all heads, and
// rotates four pairs at a time in two words of four elements. One thread per pair, with an angle each,
// took 15.8 us for 2048 tokens of 16 heads. Shared memory: 8 bytes for each pair of the tokens.
template <class T, bool NEOX>
__global__ void __launch_bounds__(256)
    rope_tokens(Tensor a, Tensor pos, Tensor factors, Rope r, int tokens) {
    extern __shared__ float2 turns[];
    constexpr int AHEAD = 4;  // rotated at once
    const int thread = threadIdx.x, pairs = r.n_dims / 2, fours = pairs / 4, heads = a.ne[1];
    const int first = blockIdx.x * tokens, count = min(tokens, a.ne[2] - first);
    double frequency = frequency_of(thread % pairs, r);
    begin();
    const int items = count * heads * fours, further = NEOX ? pairs : 4;
    T* at[AHEAD];
    Pack<T, 4> words[AHEAD][2];
    const auto load = [&](int start) {
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            const int i = min(start + 256 * j, items - 1), row = i / fours, token = row / heads;
            at[j] = a.at<T>(r.offset + i % fours * (NEOX ? 4 : 8), row % heads, first + token,
                            blockIdx.y);
            words[j][0] = *(const Pack<T, 4>*)at[j];
            words[j][1] = *(const Pack<T, 4>*)(at[j] + further);
        }
    };
    load(thread);
    for (int i = thread; i < count * pairs; i += 256) {
        const int pair = i % pairs, position = *pos.at<int>(first + i / pairs, 0, 0, 0);
        if (i >= 256) frequency = frequency_of(pair, r);
        float2 turn;
        sincospif(angle_of(pair, frequency, position, factors), &turn.y, &turn.x);
        turn.x *= r.magnitude, turn.y *= r.magnitude;
        turns[i] = turn;
    }
    __syncthreads();
    for (int start = thread; start < items; start += 256 * AHEAD) {
        if (start > thread) load(start);
#pragma unroll
        for (int j = 0; j < AHEAD; ++j) {
            const int i = start + 256 * j, token = i / fours / heads;
            if (i >= items) break;
            const float2* const own = turns + token * pairs + i % fours * 4;
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                T& first = words[j][NEOX ? 0 : k / 2].v[NEOX ? k : k % 2 * 2];
                T& second = words[j][NEOX ? 1 : k / 2].v[NEOX ? k : k % 2 * 2 + 1];
                const float x = to_f32(first), z = to_f32(second);
                const float2 turn = own[k];
                first = from_f32<T>(x * turn.x - z * turn.y);
                second = from_f32<T>(x * turn.y + z * turn.x);
            }
            *(Pack<T, 4>*)at[j] = words[j][0];
            *(Pack<T, 4>*)(at[j] + further) = words[j][1];
        }
    }
}

// Writes the result to the row of a cache named by the token's id, heads one after another. Ids
// that are not rows write nothing. cache [n n_head, rows], a [n, n_head, T]
template <class T, bool NEOX>
__global__ void __launch_bounds__(256)
    rope_rows(Tensor cache, Tensor a, Tensor pos, Tensor ids, Rope r) {
    int units = (a.ne[0] + 1) / 2, i = blockIdx.y * 256 + threadIdx.x, token = blockIdx.x;
    int head = i / units, unit = i - head * units;
    const double frequency = frequency_of(unit, r);
    begin();
    int id = *ids.at<int>(token, 0, 0, 0);
    if (head >= a.ne[1] || id < 0 || id >= cache.ne[1]) return;
    turn<NEOX>(
        r, unit, frequency, a.ne[0], *pos.at<int>(token, 0, 0, 0), Tensor{},
        [&](int k) { return *a.at<float>(k, head, token, 0); },
        [&](int k, float x) { *cache.at<T>(head * a.ne[0] + k, id, 0, 0) = from_f32<T>(x); });
}
