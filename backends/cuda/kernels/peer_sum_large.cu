// Sums of large parts of several GPUs, through memory that each can write on the others.
// @kernel hot peer_sum_large
//
// A tile of a part is a piece for each GPU. A GPU sends the others their pieces (`spread`), adds up its
// own piece of all parts in the order of the GPUs and sends that sum to the others (`reduce`), and
// takes their sums (`collect`). So it sends 2 (count - 1) / count of its part, and all GPUs have the
// same bits.
//
// Block b of a GPU meets block b of the others and nobody else, tile after tile: b, b + grid, ... While
// the pieces of a tile are on their way it works on the two tiles before. Each block has SLOTS pieces
// of memory for each sender, which the numbers of tiles go around; they go on from launch to launch
// (`counts`). No slot is written before it has been read, without a word about that:
// - spread(s) overwrites s - 4 of `reduce`. The block has seen its sum, in collect(s - 4).
// - reduce(s) overwrites s - 4 of `collect`. It has seen the other's spread(s), which comes after the
//   other's collect(s - 3).
// A block waits only for blocks of its own number. GPUs start blocks in order, so the lowest number
// that has not ended is running everywhere, and no number of blocks deadlocks; two fit a
// multiprocessor, so on 64 multiprocessors all run at once.
//
// Memory of n floats: n read for `spread` and for `reduce`, 2 n (count - 1) / count sent, received and
// read again, n written. The boxes have the same size for every n.
// The design that lost: without slots, in memory as large as the part. It is counted per plan, and at
// 16 MiB does not stay in L2. One step for two GPUs, which send all and add all: the same bytes of
// the link, one wait less for a tile, but a second kernel.
#include "peers.cuh"

constexpr int BLOCKS = 128;
constexpr int SLOTS = 4;      // a power of two: numbers of tiles overflow
constexpr int TILE = 8192;    // the most elements of a tile
constexpr int SPREAD = 0, SUMS = 1;  // what is sent

// Flags of a box: unsigned [2][MOST_GPUS][BLOCKS], the number of tiles that a sender has sent; then the
// slots, float [2][BLOCKS][SLOTS][count - 1][TILE / count, a multiple of 4].
struct Exchange {
    const Peers& peers;
    unsigned long long at;  // where the flags are in each box

    __device__ __forceinline__ unsigned* flag(int gpu, int what, int sender) const {
        return (unsigned*)(peers.box[gpu] + at) + (what * MOST_GPUS + sender) * BLOCKS + blockIdx.x;
    }
    __device__ __forceinline__ float4* slot(int gpu, int what, int sender, unsigned tile) const {
        const int count = peers.count, other = sender - (sender > gpu);
        size_t number = ((what * BLOCKS + blockIdx.x) * SLOTS + tile % SLOTS) * (count - 1) + other;
        return (float4*)(peers.box[gpu] + at + 2 * MOST_GPUS * BLOCKS * sizeof(unsigned)) +
               number * (TILE / count / 4);
    }
    // All threads: what they have sent of a tile is complete.
    __device__ __forceinline__ void announce(int what, unsigned tile) const {
        __syncthreads();
        int gpu = threadIdx.x;
        if (gpu < peers.count && gpu != peers.index)
            store_release(flag(gpu, what, peers.index), tile + 1);
    }
    // All threads: what the others send of a tile is here.
    __device__ __forceinline__ void await(int what, unsigned tile) const {
        int gpu = threadIdx.x;
        if (gpu < peers.count && gpu != peers.index)
            wait_for(peers, gpu, [&] {
                return (int)(load_acquire(flag(peers.index, what, gpu)) - (tile + 1)) >= 0;
            });
        __syncthreads();
    }
};

// piece   elements of a tile for each GPU, a multiple of 4
// counts  of this GPU's blocks, int [BLOCKS]
__global__ void __launch_bounds__(512, 2)
peer_sum_large(float* out, const float* part, long long n, int piece,
               const __grid_constant__ Peers peers, unsigned long long at, unsigned long long counts) {
    begin();
    const int count = peers.count, me = peers.index, fours = piece / 4, foreign = (count - 1) * fours;
    const bool packed = ((size_t)out | (size_t)part) % 16 == 0;
    const long long tile = (long long)piece * count;
    const int steps = (int)(((n + tile - 1) / tile - blockIdx.x + gridDim.x - 1) / gridDim.x);
    const unsigned first = ((volatile unsigned*)counts)[blockIdx.x];
    const Exchange exchange{peers, at};

    auto start = [&](int step, int gpu) { return (blockIdx.x + (long long)step * gridDim.x) * tile + gpu * piece; };
    auto load = [&](long long i) {
        if (packed && i + 4 <= n) return *(const float4*)(part + i);
        float v[4];
#pragma unroll
        for (int k = 0; k < 4; k++) v[k] = i + k < n ? part[i + k] : 0;
        return make_float4(v[0], v[1], v[2], v[3]);
    };
    auto store = [&](long long i, float4 x) {
        if (packed && i + 4 <= n) *(float4*)(out + i) = x;
        else {
            const float v[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
            for (int k = 0; k < 4; k++)
                if (i + k < n) out[i + k] = v[k];
        }
    };
    auto spread = [&](int step) {
        for (int i = threadIdx.x; i < foreign; i += 2 * blockDim.x) {
            float4 values[2];
            float4* to[2];
#pragma unroll
            for (int k = 0; k < 2; k++) {  // both loads before the stores
                const int j = min(i + k * (int)blockDim.x, foreign - 1), other = j / fours;
                const int gpu = other + (other >= me);
                values[k] = load(start(step, gpu) + 4 * (j % fours));
                to[k] = exchange.slot(gpu, SPREAD, me, first + step) + j % fours;
            }
            *to[0] = values[0];
            if (i + (int)blockDim.x < foreign) *to[1] = values[1];
        }
        exchange.announce(SPREAD, first + step);
    };
    auto reduce = [&](int step) {
        exchange.await(SPREAD, first + step);
        for (int i = threadIdx.x; i < fours; i += blockDim.x) {
            const long long at = start(step, me) + 4 * i;
            const float4 own = load(at);
            float4 sum = own;
            for (int gpu = 0; gpu < count; gpu++) {
                // Not from L1, which has what the slot held before.
                float4 x = gpu == me ? own : __ldcg(exchange.slot(me, SPREAD, gpu, first + step) + i);
                sum = gpu ? make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w) : x;
            }
            store(at, sum);
            for (int gpu = 0; gpu < count; gpu++)
                if (gpu != me) exchange.slot(gpu, SUMS, me, first + step)[i] = sum;
        }
        exchange.announce(SUMS, first + step);
    };
    auto collect = [&](int step) {
        exchange.await(SUMS, first + step);
        for (int i = threadIdx.x; i < foreign; i += blockDim.x) {
            const int other = i / fours, gpu = other + (other >= me), k = i % fours;
            store(start(step, gpu) + 4 * k, __ldcg(exchange.slot(me, SUMS, gpu, first + step) + k));
        }
    };
    for (int step = 0; step < steps + 2; step++) {
        if (step < steps) spread(step);
        if (step >= 1 && step <= steps) reduce(step - 1);
        if (step >= 2) collect(step - 2);
    }
    if (threadIdx.x == 0 && steps > 0) ((unsigned*)counts)[blockIdx.x] = first + steps;
}
