// Rotary position embedding: a thread for each pair, and for each two elements that stay.
//
// @kernel rope<{float|__half}, {true|false}>
// @kernel rope_rows<{__half|__nv_bfloat16}, {true|false}>
#include "rope.cuh"

// The result may lie where `a` lies.
template <class T, bool NEOX>
__global__ void __launch_bounds__(256)
    rope(Tensor out, Tensor a, Tensor pos, Tensor factors, Rope r) {
    begin();
    int units = (out.ne[0] + 1) / 2, i = blockIdx.y * 256 + threadIdx.x;
    if (i >= units * out.ne[1]) return;
    int head = i / units, token = blockIdx.x, i3 = blockIdx.z;
    turn<NEOX>(
        r, i % units, out.ne[0], *pos.at<int>(token, 0, 0, 0), factors,
        [&](int k) { return to_f32(*a.at<T>(k, head, token, i3)); },
        [&](int k, float x) { *out.at<T>(k, head, token, i3) = from_f32<T>(x); });
}

// The same into the row of a cache that the token's id names, its heads one after another; ids that
// are no row write nothing. cache [n n_head, rows], a [n, n_head, T]
template <class T, bool NEOX>
__global__ void __launch_bounds__(256)
    rope_rows(Tensor cache, Tensor a, Tensor pos, Tensor ids, Rope r) {
    begin();
    int units = (a.ne[0] + 1) / 2, i = blockIdx.y * 256 + threadIdx.x, token = blockIdx.x;
    int head = i / units, id = *ids.at<int>(token, 0, 0, 0);
    if (head >= a.ne[1] || id < 0 || id >= cache.ne[1]) return;
    turn<NEOX>(
        r, i % units, a.ne[0], *pos.at<int>(token, 0, 0, 0), Tensor{},
        [&](int k) { return *a.at<float>(k, head, token, 0); },
        [&](int k, float x) { *cache.at<T>(head * a.ne[0] + k, id, 0, 0) = from_f32<T>(x); });
}
