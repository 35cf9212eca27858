// Rotary position embedding: one thread per pair, and per two elements that are not rotated.
// @kernel rope<{float|__half}, {true|false}>
// @kernel rope_rows<{__half|__nv_bfloat16}, {true|false}>
#include "rope.cuh"

// units: of a row. If the result overwrites `a`, those that are rotated are enough.
template <class T, bool NEOX>
__global__ void __launch_bounds__(256)
    rope(Tensor out, Tensor a, Tensor pos, Tensor factors, Rope r, int units) {
    int i = blockIdx.y * 256 + threadIdx.x;
    int head = i / units, unit = i - head * units, token = blockIdx.x, i3 = blockIdx.z;
    const double frequency = frequency_of(unit, r);
    begin();
    if (head >= out.ne[1]) return;
    turn<NEOX>(
        r, unit, frequency, out.ne[0], *pos.at<int>(token, 0, 0, 0), factors,
        [&](int k) { return to_f32(*a.at<T>(k, head, token, i3)); },
        [&](int k, float x) { *out.at<T>(k, head, token, i3) = from_f32<T>(x); });
}

// Writes the result to the row of a cache named by the token's id, heads one after another. Ids
// that are not rows write nothing. cache [n n_head, rows], a [n, n_head, T]
template <class T, bool NEOX>
__global__ void __launch_bounds__(256)
    rope_rows(Tensor cache, Tensor a, Tensor pos, Tensor ids, Rope r) {
    int units = (a.ne[0] + 1) / 2, i = blockIdx.y * 256 + threadIdx.x, token = blockIdx.x;
    int head = i / units, unit = i - head * units;
    const double frequency = frequency_of(unit, r);
    begin();
    int id = *ids.at<int>(token, 0, 0, 0);
    if (head >= a.ne[1] || id < 0 || id >= cache.ne[1]) return;
    turn<NEOX>(
        r, unit, frequency, a.ne[0], *pos.at<int>(token, 0, 0, 0), Tensor{},
        [&](int k) { return *a.at<float>(k, head, token, 0); },
        [&](int k, float x) { *cache.at<T>(head * a.ne[0] + k, id, 0, 0) = from_f32<T>(x); });
}
