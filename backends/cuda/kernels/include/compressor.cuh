// A row of a compressor (models/compressor.py) for a few tokens, by a block or several.
#pragma once
#include "row.cuh"

// For all tokens t:  ring_v[:, tokens[t]] = v[:, t],  ring_z[:, tokens[t]] = z[:, t] + ape[:, places[t]]
// Then, with candidates j in rows ids[j] of the rings, seen as rows of d elements:
//   x = sum_j g_j v_j,  g = softmax over j of z_j + bias[j], for each element by itself
//   cache[:, row] = rope(rms_norm(x) w, start)
// A negative id is a candidate of zeros; no id is read that is not a row. Nothing is read and
// written but the rings if `row` is not a row of the cache: most tokens do not end a window.
//
// cache [d, rows]; ring_v, ring_z [w, n_ring], contiguous; v, z [w, T]; ape [w, places];
// places, tokens [T]; ids [n]; bias [1, n]; weight [d]; start, row [1]; pooled [d]
// A block has d / blocks columns of the candidates, a lane a column of a share of them. Of many
// candidates there are several blocks, and the one that comes last, counted in `arrived`, has the rest:
// 128 candidates of 512 elements are half a megabyte, which one multiprocessor read in 8 turns.
// Dynamic shared memory: 3 floats a thread, at least d.
struct Compressor {
    Tensor cache, ring_v, ring_z, v, z, ape, places, tokens, ids, bias, weight, start, row;
    Rope rope;
    float* pooled;
    float eps;
};

// Candidates that are read at once.
constexpr int BATCH = 8;

// arrived: counts blocks that have left their columns; it wraps around to 0.
template <class B, bool NEOX>
__device__ __forceinline__ void compressed_row_part(const Compressor& p, int number, int blocks,
                                                    unsigned* arrived) {
    const double frequency = threadIdx.x < p.rope.n_dims / 2 ? frequency_of(threadIdx.x, p.rope) : 0;
    extern __shared__ float shared[];
    const int d = p.cache.ne[0], w = p.v.ne[0], n_ring = p.ring_v.ne[1], n = p.ids.ne[0];
    const int n_columns = d / blocks, first_column = number * n_columns;
    const int shares = blockDim.x / n_columns, share = threadIdx.x / n_columns;
    const float infinity = __int_as_float(0x7F800000);
    begin();
    // All that only says where to read and by what to multiply is on its way before the ring is
    // written: behind the writes, each would be a round trip of its own.
    const int row = *p.row.at<int>(0, 0, 0, 0), start = *p.start.at<int>(0, 0, 0, 0);
    const float factor = threadIdx.x < d ? *p.weight.at<float>(threadIdx.x, 0, 0, 0) : 0;
    int ids[BATCH];
    float biases[BATCH];
    const int id_step = shares * (int)p.ids.nb[0], bias_step = shares * (int)p.bias.nb[1];
    auto look = [&](int first) {
        const char *id = p.ids.at<char>(first, 0, 0, 0), *bias = p.bias.at<char>(0, first, 0, 0);
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            const bool there = first + k * shares < n;
            ids[k] = there ? *(const int*)(id + k * id_step) : -1;
            biases[k] = there ? *(const float*)(bias + k * bias_step) : -infinity;
        }
    };
    look(share);
    for (int t = 0; t < p.v.ne[1]; t++) {
        const int to = *p.tokens.at<int>(t, 0, 0, 0), place = *p.places.at<int>(t, 0, 0, 0);
        if (to < 0 || to >= n_ring) continue;
        for (int own = threadIdx.x; own < w / d * n_columns; own += blockDim.x) {
            const int i = own / n_columns * d + first_column + own % n_columns;
            float z = *p.z.at<float>(i, t, 0, 0);
            if (place >= 0 && place < p.ape.ne[1]) z += *p.ape.at<float>(i, place, 0, 0);
            *p.ring_v.at<float>(i, to, 0, 0) = *p.v.at<float>(i, t, 0, 0);
            *p.ring_z.at<float>(i, to, 0, 0) = z;
        }
    }
    if (row < 0 || row >= p.cache.ne[1]) return;
    __syncthreads();  // the block sees what it wrote

    const int column = threadIdx.x % n_columns, i = first_column + column;
    const int n_rows = n_ring * (w / d);
    float top = -infinity, total = 0, sum = 0;
    auto join = [&](float top1, float total1, float sum1) {
        const float most = fmaxf(top, top1), base = most == -infinity ? 0 : most;
        const float a = expf(top - base), b = expf(top1 - base);
        top = most, total = total * a + total1 * b, sum = sum * a + sum1 * b;
    };
    for (int first = share; first < n; first += BATCH * shares) {
        float z[BATCH], v[BATCH], most = -infinity;
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            const bool there = ids[k] >= 0 && ids[k] < n_rows;
            const int at = ids[k] * d + i;  // rings have less than 2 GiB
            z[k] = there ? ((const float*)p.ring_z.data)[at] : 0;
            v[k] = there ? ((const float*)p.ring_v.data)[at] : 0;
        }
#pragma unroll
        for (int k = 0; k < BATCH; k++) z[k] += biases[k], most = fmaxf(most, z[k]);
        if (first + BATCH * shares < n) look(first + BATCH * shares);
        const float base = most == -infinity ? 0 : most;
        float part = 0, weighted = 0;
#pragma unroll
        for (int k = 0; k < BATCH; k++) {
            const float g = expf(z[k] - base);
            part += g, weighted += g * v[k];
        }
        join(most, part, weighted);
    }
    float *tops = shared, *totals = tops + blockDim.x, *sums = totals + blockDim.x;
    tops[threadIdx.x] = top, totals[threadIdx.x] = total, sums[threadIdx.x] = sum;
    __syncthreads();
    float x = 0;
    if (share == 0) {
        for (int k = column + n_columns; k < shares * n_columns; k += n_columns)
            join(tops[k], totals[k], sums[k]);
        x = total == 0 ? 0 : sum / total;
    }
    float squares = 0;
    if (blocks == 1) {
        if (share == 0) sums[i] = x, squares = x * x;
    } else {
        if (share == 0) p.pooled[i] = x;
        __threadfence();
        __syncthreads();
        __shared__ bool last;
        if (threadIdx.x == 0) last = atomicInc(arrived, blocks - 1) == blocks - 1;
        __syncthreads();
        if (!last) return;
        __threadfence();
        for (int j = threadIdx.x; j < d; j += blockDim.x) {
            x = __ldcg(p.pooled + j);
            sums[j] = x, squares += x * x;
        }
    }
    norm_row(sums, d, squares, p.eps, Tensor{});  // its barriers are behind the reads above
    for (int j = threadIdx.x; j < d; j += blockDim.x)
        sums[j] *= j == threadIdx.x ? factor : *p.weight.at<float>(j, 0, 0, 0);
    __syncthreads();
    turn_row<NEOX>(sums, d, p.rope, frequency, start);
    __syncthreads();
    store_row<B>(sums, d, p.cache.at<unsigned char>(0, row, 0, 0), p.cache.nb[0]);
}
