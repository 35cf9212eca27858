// Sums of small parts of several GPUs, through memory that each can write on the others.
// @kernel hot peer_sum<true, true>
//
// A GPU stores its part in the boxes of all others and then adds what arrives in its own, in the
// order of the GPUs, so all have the same bits. A word of a box is a value and the number of the
// round, stored at once: whoever sees the number has the value. So there are no fences and no
// flags to wait for after the data (NCCL's LL protocol), which twice the bytes are worth up to 128
// KiB. The box has two halves that take turns: a GPU stores for round r + 2 only after it has
// received round r + 1, which the other GPU sends only after it has read round r.
//
// Block b always has the same CHUNK of words and a count of its rounds, so parts of any size may
// follow each other. All blocks (at most 16) run at the same time.
//
// Memory: n floats read, n (count - 1) words of 8 bytes sent and received, n floats written.
// The design that lost: data, a fence, and a flag for each block. It takes one more latency of the
// link (about 0.7 us) and a fence over all that the kernel has stored.
#include "common.cuh"

constexpr int CHUNK = 2048;            // elements of a block
constexpr int ROOM = 16 * CHUNK;       // of a part
constexpr int MOST_GPUS = 8;

struct Boxes {
    unsigned long long of[MOST_GPUS];  // the box of each GPU: words [2][GPUs][ROOM]
    unsigned long long rounds;    // of this GPU's blocks: int [16], and 1 if it must stop
};

// SEND and RECEIVE: the halves of a round. The host runs them one after another in tests.
template <bool SEND, bool RECEIVE>
__global__ void __launch_bounds__(512) peer_sum(float* out, const float* part,
                                                const __grid_constant__ Boxes boxes,
                                                int index, int count, int n) {
    begin();
    volatile unsigned* rounds = (volatile unsigned*)boxes.rounds;
    const unsigned round = rounds[blockIdx.x] + 1;
    __syncthreads();
    const int first = blockIdx.x * CHUNK, last = min(n, first + CHUNK);
    auto words = [&](int gpu, int sender) {
        size_t half = (size_t)(round & 1) * count + sender;
        return (volatile unsigned long long*)boxes.of[gpu] + half * ROOM;
    };
    if (SEND)
        for (int i = first + threadIdx.x; i < last; i += blockDim.x) {
            unsigned long long word = (unsigned long long)round << 32 | __float_as_uint(part[i]);
            for (int gpu = 0; gpu < count; gpu++)
                if (gpu != index) words(gpu, index)[i] = word;
        }
    if (RECEIVE) {
        for (int i = first + threadIdx.x; i < last; i += blockDim.x) {
            float sum = 0;
            for (int gpu = 0; gpu < count; gpu++) {
                float value = part[i];
                if (gpu != index) {
                    volatile unsigned long long* at = words(index, gpu) + i;
                    unsigned long long word = *at;
                    while ((unsigned)(word >> 32) != round && !rounds[16]) word = *at;
                    value = __uint_as_float((unsigned)word);
                }
                sum = gpu ? sum + value : value;
            }
            out[i] = sum;
        }
        __syncthreads();
        if (threadIdx.x == 0) rounds[blockIdx.x] = round;
    }
}
