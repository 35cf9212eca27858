// Steps before and after the products: prepare operands, finish results. blockIdx.x: row, counting
// through dimensions 1 to 3; blockIdx.y: part of it.
// @kernel to_halves<{float|__half|__nv_bfloat16}, {__half|__nv_bfloat16}, {true|false}>
// @kernel copy_rows<float, {__half|__nv_bfloat16}, {4|1}>
// @kernel copy_rows<{__half|__nv_bfloat16}, {$1|float}, {8|1}>
// @kernel put_rows<{float|__half}, {4|1}>
// @kernel place_rows
// @kernel rescale_rows
// @kernel gate_rows
// @kernel gate_rows_limited
// @kernel add_splits
#include "halves.cuh"
#include "linear_common.cuh"
#include "short_rows.cuh"

__device__ __forceinline__ int item() { return blockIdx.y * blockDim.x + threadIdx.x; }

// Where rows of b go. If they are routed, n_b of each token, row j goes to the places of pairs j,
// j + n_b and so on of its n_used (see moe_group.cu); else `places` is null and each stays where it
// is.
struct Places {
    const int* places;
    int* are_long;  // cleared at these places, if present (see rescale_rows)
    int n_used, n_b;
};

// Prepares a row of b for products on the tensor cores: writes it as H (see halves.cuh),
// zero-padded to k_padded, and the factor for its results. One block per row, a run of 16 per
// thread; rows of more runs than threads are read twice. VECTOR: elements are adjacent, 16-byte
// aligned.
template <class S, class H, bool VECTOR>
__global__ void __launch_bounds__(1024)
    to_halves(Tensor b, H* out, float* scales, int k_padded, Places at) {
    begin();
    const char* row = row_at(b, blockIdx.x);
    const int k = b.ne[0], step = blockDim.x * 16;
    float x[16];
    auto load = [&](int base) {
        constexpr int N = VECTOR ? 16 / sizeof(S) : 1;
#pragma unroll
        for (int i = 0; i < 16; i += N) {
            Pack<S, N> part = {};
            if (base + i < k) part = *(const Pack<S, N>*)(row + (base + i) * b.nb[0]);
#pragma unroll
            for (int j = 0; j < N; ++j) x[i + j] = to_f32(part.v[j]);
        }
    };
    float most = 0;
    for (int base = threadIdx.x * 16; base < k_padded; base += step) {
        load(base);
#pragma unroll
        for (int i = 0; i < 16; ++i) most = finite_most(most, x[i]);
    }
    const RowScale scale = row_scale(block_reduce<Max>(most, 0.0f));
    const int first = blockIdx.x / at.n_b * at.n_used;
    const auto each_place = [&](auto f) {
        for (int slot = blockIdx.x % at.n_b; slot < at.n_used; slot += at.n_b) {
            const int place = at.places ? at.places[first + slot] : blockIdx.x;
            if (place >= 0) f(place);
        }
    };
    if (threadIdx.x == 0)
        each_place([&](int place) {
            scales[place] = scale.back;
            if (at.are_long) at.are_long[place] = 0;
        });
    for (int base = threadIdx.x * 16; base < k_padded; base += step) {
        if (k_padded > step) load(base);
        unsigned words[8];  // of two runs of 8
#pragma unroll
        for (int i = 0; i < 8; ++i)
            words[i % 2 * 4 + i / 2] = two_halves<H>(x[2 * i] * scale.by, x[2 * i + 1] * scale.by);
        each_place([&](int place) {
            uint4* to = (uint4*)(out + (long long)place * k_padded + base);
            to[0] = make_uint4(words[0], words[1], words[2], words[3]);
            to[1] = make_uint4(words[4], words[5], words[6], words[7]);
        });
    }
}

// Copies rows that a step before has prepared, of `words` 16 bytes each, and their scales to their
// places.
__global__ void __launch_bounds__(256)
    place_rows(const uint4* rows, const float* scales, uint4* out, float* out_scales, int words,
               Places at) {
    begin();
    const int row = blockIdx.x, i = item();
    const uint4 mine = i < words ? rows[(long long)row * words + i] : uint4();
    for (int slot = row % at.n_b; slot < at.n_used; slot += at.n_b) {
        const int place = at.places[row / at.n_b * at.n_used + slot];
        if (place < 0) continue;
        if (i < words) out[(long long)place * words + i] = mine;
        if (i) continue;
        out_scales[place] = scales[row];
        if (at.are_long) at.are_long[place] = 0;
    }
}

// Brings the rows that have numbers which f16 cannot hold to the scale that `to_halves` gives them.
// A warp has a row of k elements, `further` bytes before their further words (short_rows.cuh).
__global__ void __launch_bounds__(256)
    rescale_rows(char* rows, float* scales, const int* are_long, const int* places, int pairs,
                 int k, long long further) {
    begin();
    const int pair = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    const int place = pair < pairs ? places[pair] : -1;
    if (place < 0 || !are_long[place]) return;
    char* const row = rows + place * (2ll * k);
    const auto value = [&](int i) {
        const char* const at = row + 2 * i;
        const unsigned half = *(const unsigned short*)at;
        return from_short(half, is_long(half) ? *(const unsigned short*)(at + further) : 0);
    };
    float most = 0;
    for (int i = lane; i < k; i += 32) most = finite_most(most, value(i));
    const RowScale scale = row_scale(warp_reduce<Max>(most));
    for (int i = lane; i < k; i += 32)
        *(__half*)(row + 2 * i) = __float2half_rn(value(i) * scale.by);
    if (lane == 0) scales[place] *= scale.back;
}

// Copies rows of any tensor to contiguous rows, V adjacent elements at a time.
template <class S, class D, int V>
__global__ void __launch_bounds__(256) copy_rows(Tensor in, D* out, unsigned first) {
    begin();
    const int i = item() * V;
    if (i >= in.ne[0]) return;
    const Pack<S, V> x = *(const Pack<S, V>*)(row_at(in, first + blockIdx.x) + i * in.nb[0]);
    Pack<D, V> y;
#pragma unroll
    for (int j = 0; j < V; ++j) y.v[j] = convert_to<D>(x.v[j]);
    *(Pack<D, V>*)(out + (long long)blockIdx.x * in.ne[0] + i) = y;
}

// Writes contiguous rows to the rows of y, V adjacent elements at a time.
template <class D, int V>
__global__ void __launch_bounds__(256) put_rows(const float* product, Tensor y, unsigned first) {
    begin();
    const int i = item() * V;
    if (i >= y.ne[0]) return;
    const Pack<float, V> x =
        *(const Pack<float, V>*)(product + (long long)blockIdx.x * y.ne[0] + i);
    Pack<D, V> z;
#pragma unroll
    for (int j = 0; j < V; ++j) z.v[j] = convert_to<D>(x.v[j]);
    *(Pack<D, V>*)(row_at(y, first + blockIdx.x) + i * y.nb[0]) = z;
}

// y = act(gate) * y, where the rows of gate are contiguous.
template <class... Limit>
__device__ __forceinline__ void gate_all(const Tensor& y, const float* gate, int act,
                                         Limit... limit) {
    const int i = item();
    if (i >= y.ne[0]) return;
    float* at = (float*)(row_at(y, blockIdx.x) + i * y.nb[0]);
    *at = gated(act, gate[(long long)blockIdx.x * y.ne[0] + i], *at, limit...);
}
__global__ void __launch_bounds__(256) gate_rows(Tensor y, const float* gate, int act) {
    begin();
    gate_all(y, gate, act);
}
__global__ void __launch_bounds__(256)
    gate_rows_limited(Tensor y, const float* gate, int act, float limit) {
    begin();
    gate_all(y, gate, act, limit);
}

// Adds the sums of all splits of k, [rows, columns, splits], in order.
__global__ void __launch_bounds__(256)
    add_splits(const float* sums, Tensor y, int splits, int narrow) {
    begin();
    const int i = item();
    if (i >= y.ne[0]) return;
    const long long n = (long long)y.ne[0] * gridDim.x;
    const float* from = sums + (long long)blockIdx.x * y.ne[0] + i;
    float total = 0;
    for (int s = 0; s < splits; ++s) total += from[s * n];
    put(y, row_at(y, blockIdx.x), i, total, narrow);
}
