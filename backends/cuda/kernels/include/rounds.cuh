// Rounds: sums of several GPUs, through memory that each can write on the others.
//
// A GPU stores its part in the boxes of all others, and whoever adds takes what arrives in its own, in
// the order of the GPUs, so all have the same bits. A word of a box is a value and the number of the
// round, stored at once: whoever sees the number has the value. So there are no fences and no flags to
// wait for after the data (NCCL's LL protocol), which twice the bytes are worth up to 128 KiB. The box
// has two halves that take turns: a GPU stores for round r + 2 only behind a launch that has received
// round r + 1, which the other GPU sends only behind all launches that read round r.
//
// It does not matter which launches send and add. A sum may have a launch (peer_sum.cu), or the launch
// that computes a row sends it, and the one that reads the sum adds up parts: `send` and SummedRow.
// Many blocks read such a row, and none could say when all have. So rounds are not counted by them: a
// sum's is its number in the run behind the rounds of all runs before, to which the last launch of
// these adds (end_of_run).
#pragma once
#include "normed.cuh"
#include "peers.cuh"

constexpr int ROOM = 1 << 15;  // elements of a part

struct Round {
    Peers peers;  // boxes: behind the head words [2, GPUs, ROOM]
    const unsigned* rounds;  // of all runs before
    int turn;  // of the sum in this run, from 1 on
};

// It may be read before the wait: no launch of the run before its last sum writes it.
__device__ __forceinline__ unsigned round_of(const Round& p) {
    return *(const volatile unsigned*)p.rounds + p.turn;
}
__device__ __forceinline__ unsigned long long* words_of(const Round& p, unsigned round, int gpu,
                                                        int sender) {
    const int half = (round & 1) * p.peers.count + sender;
    return (unsigned long long*)(p.peers.box[gpu] + BOX_HEAD) + half * ROOM;
}
__device__ __forceinline__ void send(const Round& p, unsigned round, int i, float value) {
    const unsigned long long word = (unsigned long long)round << 32 | __float_as_uint(value);
    for (int gpu = 0; gpu < p.peers.count; gpu++)
        if (gpu != p.peers.index)
            *(volatile unsigned long long*)(words_of(p, round, gpu, p.peers.index) + i) = word;
}

// V adjacent words. Two at once are one store of 16 bytes of the other GPU, or two of 8; never less.
__device__ __forceinline__ Pack<unsigned long long, 2> two_words_at(const unsigned long long* at) {
    Pack<unsigned long long, 2> v;
    asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(v.v[0]), "=l"(v.v[1]) : "l"(at) : "memory");
    return v;
}
template <int V>
__device__ __forceinline__ Pack<unsigned long long, V> words_at(const unsigned long long* at) {
    if constexpr (V == 1) return {{*(const volatile unsigned long long*)at}};
    else {
        Pack<unsigned long long, V> all;
#pragma unroll
        for (int k = 0; k < V; k += 2) {
            const Pack<unsigned long long, 2> two = two_words_at(at + k);
            all.v[k] = two.v[0], all.v[k + 1] = two.v[1];
        }
        return all;
    }
}
// Waits for V words of GPU `gpu`, which have been read once; their values.
template <int V>
__device__ __forceinline__ Pack<float, V> values_of(const Round& p, unsigned round, int gpu,
                                                    const unsigned long long* at,
                                                    Pack<unsigned long long, V> words) {
    wait_for(p.peers, gpu, [&] {
        bool all = true;
#pragma unroll
        for (int k = 0; k < V; k++) all &= (unsigned)(words.v[k] >> 32) == round;
        if (!all) words = words_at<V>(at);
        return all;
    });
    Pack<float, V> values;
#pragma unroll
    for (int k = 0; k < V; k++) values.v[k] = __uint_as_float((unsigned)words.v[k]);
    return values;
}
// The sum of V adjacent elements of all parts; `own` are this GPU's. words(gpu, at): reads those of
// another one for the first time.
template <int V, class Words>
__device__ __forceinline__ Pack<float, V> receive(const Round& p, unsigned round, int i,
                                                  Pack<float, V> own, Words words) {
    Pack<float, V> sum;
    for (int gpu = 0; gpu < p.peers.count; gpu++) {
        Pack<float, V> value = own;
        if (gpu != p.peers.index) {
            const unsigned long long* at = words_of(p, round, p.peers.index, gpu) + i;
            value = values_of<V>(p, round, gpu, at, words(gpu, at));
        }
#pragma unroll
        for (int k = 0; k < V; k++) sum.v[k] = gpu ? sum.v[k] + value.v[k] : value.v[k];
    }
    return sum;
}
template <int V>
__device__ __forceinline__ Pack<float, V> receive(const Round& p, unsigned round, int i,
                                                  Pack<float, V> own) {
    return receive<V>(p, round, i, own,
                      [](int, const unsigned long long* at) { return words_at<V>(at); });
}

// A row that a norm has yet to scale (normed.cuh): x is this GPU's part, to which those of the others
// are added.
struct SummedRow {
    NormedRow row;
    Round sum;
};

// What a thread asks for before it waits for any: four elements of this GPU's part and of `plus`, and
// words of another GPU.
struct Asked {
    Pack<float, 4> own, plus;
    Pack<unsigned long long, 4> words;
};
__device__ __forceinline__ unsigned round_of(const SummedRow& r) { return round_of(r.sum); }
__device__ __forceinline__ const NormedRow& row_of(const SummedRow& r) { return r.row; }
__device__ __forceinline__ int first_other(const Peers& p) { return p.index == 0; }
__device__ __forceinline__ Asked ask(const SummedRow& r, unsigned round, int i) {
    const Peers& p = r.sum.peers;
    Asked asked = {four_at(r.row.x + i), {},
                   words_at<4>(words_of(r.sum, round, p.index, first_other(p)) + i)};
    if (r.row.plus) asked.plus = four_at(r.row.plus + i);
    return asked;
}
__device__ __forceinline__ Pack<float, 4> values_of(const SummedRow& r, const Asked& asked,
                                                    unsigned round, int i) {
    auto words = [&](int gpu, const unsigned long long* at) {
        return gpu == first_other(r.sum.peers) ? asked.words : words_at<4>(at);
    };
    Pack<float, 4> sum = receive<4>(r.sum, round, i, asked.own, words);
    if (r.row.plus)
#pragma unroll
        for (int k = 0; k < 4; k++) sum.v[k] += asked.plus.v[k];
    return sum;
}

// The same of a row without parts.
__device__ __forceinline__ unsigned round_of(const NormedRow&) { return 0; }
__device__ __forceinline__ const NormedRow& row_of(const NormedRow& r) { return r; }
__device__ __forceinline__ Pack<float, 4> ask(const NormedRow& r, unsigned, int i) {
    return values_at(r, i);
}
__device__ __forceinline__ Pack<float, 4> values_of(const NormedRow&, const Pack<float, 4>& asked,
                                                    unsigned, int) {
    return asked;
}
