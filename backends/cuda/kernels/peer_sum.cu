// Sums of small parts of several GPUs, through memory that each can write on the others.
// @kernel hot peer_sum
// @kernel hot peer_sum_norm<{1|4}, {0|1|2|4}, PLAIN>
// @kernel hot peer_sum_norm<4, {1|2|4}, {FIXED|HALVES}>
// @kernel end_of_run
//
// Rounds are as in rounds.cuh. If the launch that computes the part has sent it, these do not.
//
// peer_sum_norm also does what follows in a layer: x = sum + plus, y = rms_norm(x) w, with a block for
// a row. The order of all sums is that of peer_sum and rms_norm, so the bits are theirs, too.
//
// Memory: n floats read, n (count - 1) words of 8 bytes sent and received, n floats written; with the
// norm, another n read and up to 3 n written.
// The design that lost: data, a fence, and a flag for each block. It takes one more latency of the
// link (about 0.7 us) and a fence over all that the kernel has stored.
#include "rms.cuh"
#include "rounds.cuh"

constexpr int CHUNK = 2048;  // elements of a block of peer_sum

// sent: whether the part has been sent.
__global__ void __launch_bounds__(512) peer_sum(float* out, const float* part, int n,
                                                const __grid_constant__ Round sum, int sent) {
    const unsigned round = round_of(sum);
    begin();
    const int first = blockIdx.x * CHUNK, last = min(n, first + CHUNK);
    for (int i = first + threadIdx.x; i < last && !sent; i += blockDim.x) send(sum, round, i, part[i]);
    for (int i = first + threadIdx.x; i < last; i += blockDim.x)
        out[i] = receive<1>(sum, round, i, {{part[i]}}).v[0];
}

// The other arguments are those of rms_norm; `part` is in one piece.
template <int V, int HELD, Also ALSO>
__global__ void __launch_bounds__(1024, 1)
peer_sum_norm(Tensor out, const float* part, Tensor w, float eps, Tensor plus, Tensor total,
              unsigned char* also, float* scales, const __grid_constant__ Round sum, int sent) {
    const int n = out.ne[0], row = blockIdx.y * gridDim.x + blockIdx.x;
    if (threadIdx.x * V < n) fetch_early(w.data + threadIdx.x * V * w.nb[0]);
    const unsigned round = round_of(sum);
    begin();
    for (int i = threadIdx.x; i < n && !sent; i += blockDim.x)
        send(sum, round, row * n + i, part[row * n + i]);
    int i1 = blockIdx.x % out.ne[1], i2 = blockIdx.x / out.ne[1], i3 = blockIdx.y;
    const char* more = plus.row<char>(i1, i2, i3);
    normalize<V, HELD, true, ALSO>(out, w, eps, total, also, scales, i1, i2, i3, [&](int i) {
        const Pack<float, V> own = *(const Pack<float, V>*)(part + row * n + i);
        const Pack<float, V> add = *(const Pack<float, V>*)(more + i * plus.nb[0]);
        Pack<float, V> x = receive<V>(sum, round, row * n + i, own);
#pragma unroll
        for (int k = 0; k < V; k++) x.v[k] += add.v[k];
        return x;
    });
}

// The last launch of a run with sums adds their number to that of all runs before. One thread.
__global__ void end_of_run(unsigned* rounds, int sums) {
    begin();
    *rounds += sums;
}
