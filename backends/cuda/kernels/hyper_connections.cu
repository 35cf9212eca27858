// Hyper-connections: several residual streams, mixed before and after a sublayer.
// @kernel hot dsv4_hc_comb<{1|2|3|4|5|8|32}, {true|false}>
// @kernel hot dsv4_hc_post<{0|1|2|3|4|8}, {1|4}>
#include "sinkhorn.cuh"

// -- comb -------------------------------------------------------------------------------------------

// mixes [(2 + HC) HC, tokens], scale [>= 3], base [(2 + HC) HC] -> out [target, source, tokens].
// MAPS: rows of pre and post come before those of the sources; a lane computes a number of each. As
// ops of their own they took eight launches.
// grid: tokens in blocks of 256 / lanes_of.
template <int HC, bool MAPS>
__global__ void __launch_bounds__(256)
dsv4_hc_comb(Tensor out, Tensor mixes, Tensor scale, Tensor base, float eps, int n_iter) {
    begin();
    constexpr int LANES = lanes_of<HC>;
    const int t = blockIdx.x * (256 / LANES) + threadIdx.x / LANES, s = threadIdx.x % LANES;
    const bool there = s < HC && t < out.ne[2];
    float c[HC] = {};  // absent sources stay 0, so they add nothing
    auto mixed = [&](int i, float factor) {
        return factor * *mixes.at<float>(i, t, 0, 0) + *base.at<float>(i, 0, 0, 0);
    };
    if (MAPS && there) {
        float pre = mixed(s, *scale.at<float>(0, 0, 0, 0));
        float post = mixed(HC + s, *scale.at<float>(1, 0, 0, 0));
        *out.at<float>(s, 0, t, 0) = 1 / (1 + expf(-pre)) + eps;
        *out.at<float>(s, 1, t, 0) = 2 / (1 + expf(-post));
    }
    if (there) {
        const float factor = *scale.at<float>(2, 0, 0, 0);
#pragma unroll
        for (int d = 0; d < HC; d++) c[d] = mixed(2 * HC + d + HC * s, factor);
    }
    sinkhorn<HC>(c, there, eps, n_iter);
    if (there)
#pragma unroll
        for (int d = 0; d < HC; d++) *out.at<float>(d, s + 2 * MAPS, t, 0) = c[d];
}

// -- post -------------------------------------------------------------------------------------------

// out[:, d, t] = post[d, t] x[:, t] + sum_s comb[d, s, t] old[:, s, t], or + old[:, d, t] without
// comb. A thread takes V adjacent elements of all streams, so each is read and written once. HC 0:
// any number of streams, which are read again for each target.
// grid: tokens, blocks of 256 V elements.
template <int HC, int V>
__global__ void __launch_bounds__(256)
dsv4_hc_post(Tensor out, Tensor x, Tensor old, Tensor post, Tensor comb) {
    begin();
    const int t = blockIdx.x, i = (blockIdx.y * 256 + threadIdx.x) * V, hc = HC ? HC : out.ne[1];
    if (i >= out.ne[0]) return;
    using Numbers = Pack<float, V>;
    const Numbers added = *x.at<Numbers>(i, t, 0, 0);
    Numbers held[HC ? HC : 1];
    auto stream = [&](int s) { return *old.at<Numbers>(i, s, t, 0); };
#pragma unroll
    for (int s = 0; s < HC; s++) held[s] = stream(s);
#pragma unroll
    for (int d = 0; d < hc; d++) {
        const float share = *post.at<float>(d, t, 0, 0);
        Numbers y;
#pragma unroll
        for (int k = 0; k < V; k++) y.v[k] = share * added.v[k];
#pragma unroll
        for (int s = 0; s < hc; s++) {
            if (!comb.data && s != d) continue;
            const float weight = comb.data ? *comb.at<float>(d, s, t, 0) : 1;
            const Numbers part = HC ? held[HC ? s : 0] : stream(s);
#pragma unroll
            for (int k = 0; k < V; k++) y.v[k] += weight * part.v[k];
        }
        *out.at<Numbers>(i, d, t, 0) = y;
    }
}
