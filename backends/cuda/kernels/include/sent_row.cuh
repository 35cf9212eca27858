// The sum of a row of two GPUs, which send it to each other as f16. A block has a row.
//
// A GPU brings the row's largest number to 2^14 to 2^15 by a power of two, stores the row as f16 in the
// box of the other GPU, waits for that GPU's row in its own box, and adds both as f16, so both GPUs
// have the same bits.
//
// Two f16 are sent with all bits turned, and never as 0: whoever sees another word than 0 has the
// numbers. So there are no fences and no flags, and a thread waits only for what it adds. It puts 0
// where it has read. A box has two halves that take turns: a GPU sends into a half again only after it
// has received all of the sum after that one, which the other GPU sends only after its launch that
// cleared the half has ended.
//
// GPUs start blocks in order, and a block sends before it waits. So the lowest row that has not
// ended runs on both GPUs, or can start, and no number of blocks deadlocks.
//
// The design that lost sends each GPU half of the sum (NCCL, peer_sum_large in benchmarks/notes.md): the
// same bytes of the link, and one more wait. Lost too: one lane that asks for its warp.
#pragma once
#include "halves.cuh"
#include "peers.cuh"
#include "rms.cuh"

constexpr int MOST_ROWS = 8192;  // of a part
constexpr int ROOM = 1 << 24;    // elements of a part
constexpr int HEAD = 256;        // bytes: the number of the round, and of the blocks that have begun
constexpr long long HALF = 4ll * MOST_ROWS + 2ll * ROOM;  // bytes: scales, rows
constexpr float SMALLEST = 3.3e-27;  // 2^-88: a row whose largest number is less counts as that

// Blocks of a multiprocessor that have that many warps together.
constexpr int blocks_of(int warps, int threads) {
    return threads < 32 * warps ? 32 * warps / threads : 1;
}

// at  where the bytes for rows begin in each box
struct SentRow {
    const Peers& peers;
    const unsigned long long at;
    const int row, n;
    volatile unsigned* const counts;
    const unsigned round;
    bool last = false;  // whether this is the last block of the launch to begin

    __device__ __forceinline__ SentRow(const Peers& peers, unsigned long long at, int row, int n)
        : peers(peers), at(at), row(row), n(n),
          counts((volatile unsigned*)(peers.box[peers.index] + at)), round(counts[0]) {}

    // x: a thread's elements i to i + 7, if i < n; then those of the sum of both GPUs. n is a multiple
    // of 8. By all threads of the block.
    __device__ __forceinline__ void add_other(float (&x)[8], int i) {
        const int other = 1 - peers.index;
        float most = SMALLEST;
        if (i < n)
#pragma unroll
            for (int k = 0; k < 8; k++) most = finite_most(most, x[k]);
        // Products with the scale are exact, so it does not matter whether they are part of a sum.
        const RowScale by = row_scale(block_reduce<Max>(most, SMALLEST));
        if (threadIdx.x == 0) {
            *scale_at(other) = __float_as_uint(by.back);
            const unsigned blocks = gridDim.x * gridDim.y - 1;  // all have read the round
            last = atomicInc((unsigned*)counts + 1, blocks) == blocks;
        }
        if (i >= n) return;
        Pack<unsigned, 4> own, theirs;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            own.v[k] = two_halves<__half>(x[2 * k] * by.by, x[2 * k + 1] * by.by);
            theirs.v[k] = max(~own.v[k], 1u);  // two NaN with all bits set become others
        }
        *words_at(other, i) = theirs;
        unsigned scale;
        wait_for(peers, other, [&] {
            theirs = words_now(words_at(peers.index, i)), scale = *scale_at(peers.index);
            bool all = scale != 0;
#pragma unroll
            for (int k = 0; k < 4; k++) all &= theirs.v[k] != 0;
            return all;
        });
        *words_at(peers.index, i) = {};
        const float back = __uint_as_float(scale);
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const unsigned word = ~theirs.v[k];
            const __half2 a = *(const __half2*)&own.v[k], b = *(const __half2*)&word;
            x[2 * k] = __half2float(a.x) * by.back + __half2float(b.x) * back;
            x[2 * k + 1] = __half2float(a.y) * by.back + __half2float(b.y) * back;
        }
    }
    // The end of the round: by thread 0, behind a barrier behind `add_other`.
    __device__ __forceinline__ void end() const {
        *scale_at(peers.index) = 0;
        if (last) counts[0] = round + 1;
    }

private:
    __device__ __forceinline__ unsigned long long half(int gpu) const {
        return peers.box[gpu] + at + HEAD + (round & 1) * HALF;
    }
    __device__ __forceinline__ volatile unsigned* scale_at(int gpu) const {
        return (volatile unsigned*)half(gpu) + row;
    }
    __device__ __forceinline__ Pack<unsigned, 4>* words_at(int gpu, int i) const {
        return (Pack<unsigned, 4>*)(half(gpu) + 4ll * MOST_ROWS + 2ll * row * n + 2 * i);
    }
    static __device__ __forceinline__ Pack<unsigned, 4> words_now(const Pack<unsigned, 4>* at) {
        Pack<unsigned, 4> v;
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.v[0]), "=r"(v.v[1]), "=r"(v.v[2]), "=r"(v.v[3]) : "l"(at) : "memory");
        return v;
    }
};

// total = x of both GPUs + plus, and its norm. By all threads of a block that has row `row`.
__device__ __forceinline__ void finish_row(SentRow& sent, float (&x)[EACH], const Tensor& plus,
                                           const Tensor& total, const Normed& norm, int row, int i) {
    EightFloats more = {};
    if (i < sent.n) more = eight_of(plus, row, i);  // on its way while the block waits
    sent.add_other(x, i);
#pragma unroll
    for (int k = 0; k < EACH; ++k) x[k] += more.v[k];
    if (i < sent.n && total.data) put_eight(total, row, i, x);
    put_normed(norm, x, sent.n, row, i);
    if (threadIdx.x == 0) sent.end();
}
