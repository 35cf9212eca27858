// lightning_indexer in plain f32 arithmetic: every type of rows, every stride, up to 512 elements.
// @kernel scores_any<{Plain<float>|Plain<__half>|Plain<__nv_bfloat16>|q8_0|q4_0|q4_1|q5_0|q5_1|iq4_nl}, {1|4}>
//
// A block decodes 32 rows to shared memory and scores them for a chunk of tokens. A lane has a row;
// a warp takes four heads at a time, so an element of a row is read once for four products. V
// elements of a query are read at once.
#include "blocks.cuh"
#include "indexer.cuh"

using namespace file;

constexpr int ROWS = 32, WARPS = 8, HEADS = 4;

// grid: blocks of ROWS rows, chunks of tokens, n3.
template <class B, int V>
__global__ void __launch_bounds__(32 * WARPS) scores_any(const __grid_constant__ Indexer a) {
    begin();
    extern __shared__ __align__(16) float memory[];
    __shared__ float parts[WARPS][ROWS];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, i3 = blockIdx.z, live = a.live();
    const int first = blockIdx.x * ROWS, own = first + lane, pitch = a.d | 1;
    for (int i = threadIdx.x; i < ROWS * a.d; i += 32 * WARPS) {
        const int r = i / a.d, c = i % a.d;
        const char *row = a.k + min(first + r, a.n_kv - 1) * a.nb_k[0] + i3 * a.nb_k[1];
        memory[r * pitch + c] = element<B>(row, B::BYTES, c);
    }
    __syncthreads();
    const float *k = memory + lane * pitch;
    const int t1 = min(a.n_tokens, (int)(blockIdx.y + 1) * a.chunk);
    for (int t = blockIdx.y * a.chunk; t < t1; ++t) {
        const float bias = own < a.n_kv ? a.bias(own, t, i3, live) : __int_as_float(0xFF800000);
        float y = 0;
        if (__any_sync(~0u, !hides(bias)))
            for (int head = warp * HEADS; head < a.heads; head += WARPS * HEADS) {
                const char *q[HEADS];
#pragma unroll
                for (int n = 0; n < HEADS; ++n)
                    q[n] = a.q + min(head + n, a.heads - 1) * a.nb_q[0] + t * a.nb_q[1] + i3 * a.nb_q[2];
                float sums[HEADS] = {};
                for (int i = 0; i < a.d; i += V) {
                    float x[V];
#pragma unroll
                    for (int v = 0; v < V; ++v) x[v] = k[i + v];
#pragma unroll
                    for (int n = 0; n < HEADS; ++n) {
                        const Pack<float, V> own_q = *(const Pack<float, V> *)(q[n] + i * 4);
#pragma unroll
                        for (int v = 0; v < V; ++v) sums[n] = fmaf(own_q.v[v], x[v], sums[n]);
                    }
                }
#pragma unroll
                for (int n = 0; n < HEADS; ++n)
                    if (head + n < a.heads) {
                        const char *w = a.w + t * a.nb_w[1] + i3 * a.nb_w[2];
                        const float own_w = *(const float *)(w + (head + n) * a.nb_w[0]) * a.scale;
                        y = fmaf(own_w, relu(sums[n]), y);
                    }
            }
        parts[warp][lane] = y;
        __syncthreads();
        if (warp == 0 && own < a.n_kv) {
            for (int other = 1; other < WARPS; ++other) y += parts[other][lane];
            *a.score(own, t, i3) = hides(bias) ? bias : y + bias;
        }
        __syncthreads();
    }
}
