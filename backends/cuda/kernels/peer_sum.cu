// Sums of small parts of several GPUs, through memory that each can write on the others.
// @kernel hot peer_sum
// @kernel hot peer_sum_norm<{1|4}, {0|1|2|4}, PLAIN>
// @kernel hot peer_sum_norm<4, {1|2|4}, {FIXED|HALVES}>
//
// A GPU stores its part in the boxes of all others and then adds what arrives in its own, in the
// order of the GPUs, so all have the same bits. A word of a box is a value and the number of the
// round, stored at once: whoever sees the number has the value. So there are no fences and no
// flags to wait for after the data (NCCL's LL protocol), which twice the bytes are worth up to 128
// KiB. The box has two halves that take turns: a GPU stores for round r + 2 only after it has
// received round r + 1, which the other GPU sends only after it has read round r.
//
// A launch is a round. All blocks read its number and each moves on the counts that only it has to, so
// launches of one block and of many follow each other. The words do not depend on who adds: one GPU
// may run peer_sum where another runs peer_sum_norm. All blocks (at most 16) run at the same time.
//
// peer_sum_norm also does what follows in a layer: x = sum + plus, y = rms_norm(x) w, with a block for
// a row. The order of all sums is that of peer_sum and rms_norm, so the bits are theirs, too.
//
// Memory: n floats read, n (count - 1) words of 8 bytes sent and received, n floats written; with the
// norm, another n read and up to 3 n written.
// The design that lost: data, a fence, and a flag for each block. It takes one more latency of the
// link (about 0.7 us) and a fence over all that the kernel has stored.
#include "peers.cuh"
#include "rms.cuh"

constexpr int CHUNK = 2048;  // elements of a block of peer_sum
constexpr int BLOCKS = 16;
constexpr int ROOM = BLOCKS * CHUNK;  // of a part

// The words of a round: value, and round in the high half.
struct Round {
    const Peers& peers;
    volatile unsigned* counts;  // of this GPU: int [BLOCKS]
    unsigned number;

    __device__ __forceinline__ Round(const Peers& peers, unsigned long long counts, int block)
        : peers(peers), counts((volatile unsigned*)counts), number(this->counts[block] + 1) {}

    __device__ __forceinline__ unsigned long long* words(int gpu, int sender) const {
        size_t half = (size_t)(number & 1) * peers.count + sender;
        return (unsigned long long*)(peers.box[gpu] + BOX_HEAD) + half * ROOM;
    }
    __device__ __forceinline__ void send(int i, float value) const {
        unsigned long long word = (unsigned long long)number << 32 | __float_as_uint(value);
        for (int gpu = 0; gpu < peers.count; gpu++)
            if (gpu != peers.index) *(volatile unsigned long long*)(words(gpu, peers.index) + i) = word;
    }
    // The sum of V adjacent elements of all parts; `own` are this GPU's.
    template <int V>
    __device__ __forceinline__ Pack<float, V> receive(int i, Pack<float, V> own) const {
        Pack<float, V> sum;
        for (int gpu = 0; gpu < peers.count; gpu++) {
            Pack<float, V> value = own;
            if (gpu != peers.index) {
                Pack<unsigned long long, V> got;
                wait_for(peers, gpu, [&] {
                    bool all = true;
                    got = words_at<V>(words(peers.index, gpu) + i);
#pragma unroll
                    for (int k = 0; k < V; k++) all &= (unsigned)(got.v[k] >> 32) == number;
                    return all;
                });
#pragma unroll
                for (int k = 0; k < V; k++) value.v[k] = __uint_as_float((unsigned)got.v[k]);
            }
#pragma unroll
            for (int k = 0; k < V; k++) sum.v[k] = gpu ? sum.v[k] + value.v[k] : value.v[k];
        }
        return sum;
    }
    // The end of the round: `block` of `blocks` moves on the counts that nobody else reads or writes.
    __device__ __forceinline__ void end(int block, int blocks) const {
        __syncthreads();
        int mine = block + threadIdx.x * blocks;
        if (mine < BLOCKS) counts[mine] = number;
    }

private:
    // Two words at once are one store of 16 bytes of the other GPU, or two of 8; never less.
    template <int V>
    static __device__ __forceinline__ Pack<unsigned long long, V> words_at(const unsigned long long* at) {
        if constexpr (V == 1) return {{*(const volatile unsigned long long*)at}};
        else {
            Pack<unsigned long long, V> all;
#pragma unroll
            for (int k = 0; k < V; k += 2) {
                auto two = two_words(at + k);
                all.v[k] = two.v[0], all.v[k + 1] = two.v[1];
            }
            return all;
        }
    }
    static __device__ __forceinline__ Pack<unsigned long long, 2> two_words(const unsigned long long* at) {
        Pack<unsigned long long, 2> v;
        asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];"
                     : "=l"(v.v[0]), "=l"(v.v[1]) : "l"(at) : "memory");
        return v;
    }
};

// counts  of this GPU's blocks, int [BLOCKS]
__global__ void __launch_bounds__(512) peer_sum(float* out, const float* part, int n,
                                                const __grid_constant__ Peers peers,
                                                unsigned long long counts) {
    begin();
    const Round round(peers, counts, blockIdx.x);
    __syncthreads();  // all have read the round
    const int first = blockIdx.x * CHUNK, last = min(n, first + CHUNK);
    for (int i = first + threadIdx.x; i < last; i += blockDim.x) round.send(i, part[i]);
    for (int i = first + threadIdx.x; i < last; i += blockDim.x)
        out[i] = round.receive<1>(i, {{part[i]}}).v[0];
    round.end(blockIdx.x, gridDim.x);
}

// The other arguments are those of rms_norm; `part` is in one piece.
template <int V, int HELD, Also ALSO>
__global__ void __launch_bounds__(1024, 1)
peer_sum_norm(Tensor out, const float* part, Tensor w, float eps, Tensor plus, Tensor total,
              unsigned char* also, float* scales, const __grid_constant__ Peers peers,
              unsigned long long counts) {
    const int n = out.ne[0], row = blockIdx.y * gridDim.x + blockIdx.x;
    if (threadIdx.x * V < n) fetch_early(w.data + threadIdx.x * V * w.nb[0]);
    begin();
    const Round round(peers, counts, row);
    __syncthreads();  // all have read the round
    for (int i = threadIdx.x; i < n; i += blockDim.x) round.send(row * n + i, part[row * n + i]);
    int i1 = blockIdx.x % out.ne[1], i2 = blockIdx.x / out.ne[1], i3 = blockIdx.y;
    const char* more = plus.row<char>(i1, i2, i3);
    normalize<V, HELD, true, ALSO>(out, w, eps, total, also, scales, i1, i2, i3, [&](int i) {
        const Pack<float, V> own = *(const Pack<float, V>*)(part + row * n + i);
        const Pack<float, V> add = *(const Pack<float, V>*)(more + i * plus.nb[0]);
        Pack<float, V> x = round.receive<V>(row * n + i, own);
#pragma unroll
        for (int k = 0; k < V; k++) x.v[k] += add.v[k];
        return x;
    });
    round.end(row, gridDim.x * gridDim.y);
}
