// Elementwise ops: V adjacent elements per thread where the rows allow it, else any strides.
// @kernel binary<{BINARY|Glu<Silu>}, float, {4|1}, unsigned>
// @kernel binary<{Add|Mul|Glu<Gelu>|Glu<Relu>}, __half, {8|1}, unsigned>
// @kernel binary<Glu<Silu>, {float|__half}, {4|1}, unsigned, float>
// @kernel binary<Add, {int|long long}, 1, unsigned>
// @kernel binary<Add, float, 4, long long>
// @kernel unary<{UNARY|Scale|Clamp|Fill}, float, 4, unsigned>
// @kernel unary<{Silu|Scale}, __half, {8|1}, unsigned>
// @kernel add_id
#include "common.cuh"

// The host reads these lines, and those of BINARY, to know which ops have a kernel: Silu is the
// functor of the op silu, GeluQuick would be that of gelu_quick.
#define UNARY(Name, value) \
    struct Name { static __device__ float f(float x, float, float) { return value; } };
UNARY(Exp, expf(x))
UNARY(Log, logf(x))
UNARY(Sqr, x * x)
UNARY(Sqrt, sqrtf(x))
UNARY(Tanh, tanhf(x))
// NaN stays NaN here and in Clamp, so use comparisons, not fmaxf.
UNARY(Relu, x < 0 ? 0 : x)
UNARY(Sigmoid, __fdividef(1, 1 + expf(-x)))
UNARY(Silu, __fdividef(x, 1 + expf(-x)))
UNARY(Softplus, softplus(x))
UNARY(Gelu, 0.5f * x * (1 + tanhf(0.79788456080286535588f * x * (1 + 0.044715f * x * x))))

struct Scale { static __device__ float f(float x, float s, float b) { return b == 0 ? s * x : s * x + b; } };
struct Clamp {
    static __device__ float f(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
};
struct Fill { static __device__ float f(float, float value, float) { return value; } };

#define BINARY(Name, value) \
    struct Name { template <class T> static __device__ T f(T a, T b) { return value; } };
BINARY(Add, a + b)
BINARY(Sub, a - b)
BINARY(Mul, a * b)
BINARY(Div, a / b)
BINARY(AddMask, b < -3.4028234663852886e38f ? b : a + b)  // where b is -inf, a may be NaN

template <class Act>
struct Glu {
    template <class T> static __device__ T f(T a, T b) { return Act::f(a, 0, 0) * b; }
    static __device__ float f(float a, float b, float limit) {
        return f(a > limit ? limit : a, Clamp::f(b, -limit, limit));
    }
};

// Types narrower than f32 are computed in f32.
template <class T> struct Wide { using type = float; };
template <> struct Wide<int> { using type = int; };
template <> struct Wide<long long> { using type = long long; };

// `total` is the number of packs. The result may overwrite `a`.
template <class Op, class T, int V, class I>
__global__ void __launch_bounds__(256) unary(Tensor out, Tensor a, I total, float p, float q) {
    begin();
    I i = (I)blockIdx.x * 256 + threadIdx.x;
    if (i >= total) return;
    Index at = unravel<I>(i, out.ne[0] / V, out.ne[1], out.ne[2]);
    Pack<T, V> x = *a.at<Pack<T, V>>(at.i0 * V, at.i1, at.i2, at.i3);
#pragma unroll
    for (int k = 0; k < V; k++) x.v[k] = from_f32<T>(Op::f(to_f32(x.v[k]), p, q));
    *out.at<Pack<T, V>>(at.i0 * V, at.i1, at.i2, at.i3) = x;
}

// b repeats into a. With V > 1, rows of b are as long as rows of a, or one element long. Limit: float
// if a Glu has a limit, else nothing.
template <class Op, class T, int V, class I, class... Limit>
__global__ void __launch_bounds__(256) binary(Tensor out, Tensor a, Tensor b, I total, Limit... limit) {
    begin();
    using W = typename Wide<T>::type;
    I i = (I)blockIdx.x * 256 + threadIdx.x;
    if (i >= total) return;
    Index at = unravel<I>(i, out.ne[0] / V, out.ne[1], out.ne[2]);
    Pack<T, V> x = *a.at<Pack<T, V>>(at.i0 * V, at.i1, at.i2, at.i3), y;
    const char* row = (const char*)b.row<T>(
        wrap(at.i1, b.ne[1], a.ne[1]), wrap(at.i2, b.ne[2], a.ne[2]), wrap(at.i3, b.ne[3], a.ne[3]));
    if (V > 1 && b.ne[0] > 1) {
        y = *(const Pack<T, V>*)(row + at.i0 * V * sizeof(T));
    } else {
        T one = *(const T*)(row + wrap(at.i0 * V, b.ne[0], a.ne[0]) * b.nb[0] * (b.ne[0] > 1));
        for (int k = 0; k < V; k++) y.v[k] = one;
    }
#pragma unroll
    for (int k = 0; k < V; k++) x.v[k] = convert_to<T>(Op::f(convert_to<W>(x.v[k]), convert_to<W>(y.v[k]), limit...));
    *out.at<Pack<T, V>>(at.i0 * V, at.i1, at.i2, at.i3) = x;
}

// y[:, e, t] = a[:, e, t] + b[:, ids[e, t]]; an id that is negative or past the end adds nothing.
__global__ void __launch_bounds__(256) add_id(Tensor out, Tensor a, Tensor b, Tensor ids) {
    begin();
    int slot = blockIdx.y, token = blockIdx.x, id = *ids.at<int>(slot, token, 0, 0);
    bool there = id >= 0 && id < b.ne[1];
    for (int i = threadIdx.x; i < out.ne[0]; i += 256) {
        float x = *a.at<float>(i, slot, token, 0);
        *out.at<float>(i, slot, token, 0) = there ? x + *b.at<float>(i, id, 0, 0) : x;
    }
}
