// Copies, conversions, gathers and scatters, between any strides.
//
// @kernel copy<{unsigned short|unsigned|uint2|uint4}, unsigned>
// @kernel copy<{uint4|unsigned char}, long long>
// @kernel convert<{float|__half|__nv_bfloat16}, {float|__half|__nv_bfloat16}, {4|1}, unsigned>
// @kernel convert<float, {int|long long}, 1, unsigned>
// @kernel convert<{int|long long}, float, 1, unsigned>
// @kernel convert<{unsigned short|unsigned char}, $1, 1, unsigned>
// @kernel decode<{EVERY}, float, 4>
// @kernel decode<{q8_0|q6_K}, {__half|__nv_bfloat16}, {4|1}>
// @kernel decode_tiles<tiles::{EVERY}, __half, 8>
// @kernel decode_tiles<tiles::{q8_0|iq4_nl}, {float|__nv_bfloat16|__half}, 1>
// @kernel decode_tiles<tiles::{q8_0|iq4_nl}, float, 4>
// @kernel get_rows<{Plain<float>|Plain<__half>|Plain<__nv_bfloat16>|q8_0|q4_K|q6_K|iq4_nl|iq2_xs}>
// @kernel get_ids
// @kernel set_rows<{float|__half}, {float|__half|__nv_bfloat16}, {int|long long}>
// @kernel set_rows<{int|long long}, $1, {int|long long}>
// @kernel encode_rows<Plain<{float|__half|__nv_bfloat16}>, {q8_0|q4_0|q4_1|q5_0|q5_1|iq4_nl}, {void|int|long long}>
#include "encode.cuh"
#include "formats.cuh"

using namespace file;

// Copies words W of one size; the source repeats.
template <class W, class I>
__global__ void __launch_bounds__(256) copy(Tensor out, Tensor a, I total) {
    begin();
    I i = (I)blockIdx.x * 256 + threadIdx.x;
    if (i >= total) return;
    Index at = unravel<I>(i, out.ne[0], out.ne[1], out.ne[2]);
    *out.at<W>(at.i0, at.i1, at.i2, at.i3) =
        *a.at<W>(wrap(at.i0, a.ne[0], out.ne[0]), wrap(at.i1, a.ne[1], out.ne[1]),
                 wrap(at.i2, a.ne[2], out.ne[2]), wrap(at.i3, a.ne[3], out.ne[3]));
}

// Converts elements in order from S to D. The shapes may differ, the number of elements
// may not. V > 1: rows are equally long.
template <class S, class D, int V, class I>
__global__ void __launch_bounds__(256) convert(Tensor out, Tensor a, I total) {
    begin();
    I i = (I)blockIdx.x * 256 + threadIdx.x;
    if (i >= total) return;
    Index from = unravel<I>(i, a.ne[0] / V, a.ne[1], a.ne[2]);
    Index to = unravel<I>(i, out.ne[0] / V, out.ne[1], out.ne[2]);
    Pack<S, V> x = *a.at<Pack<S, V>>(from.i0 * V, from.i1, from.i2, from.i3);
    Pack<D, V> y;
#pragma unroll
    for (int k = 0; k < V; k++) y.v[k] = convert_to<D>(x.v[k]);
    *out.at<Pack<D, V>>(to.i0 * V, to.i1, to.i2, to.i3) = y;
}

// Row number `row`, counting through dimensions 1, 2 and 3.
__device__ __forceinline__ char* row_number(const Tensor& t, long long row) {
    long long outer = row / t.ne[1];
    return t.row<char>(int(row % t.ne[1]), int(outer % t.ne[2]), int(outer / t.ne[2]));
}

// Decodes blocks to plain elements, V adjacent ones per thread. blockIdx.x: row; blockIdx.y:
// part of it.
template <class B, class D, int V>
__global__ void __launch_bounds__(256) decode(Tensor out, Tensor a) {
    begin();
    int i = (blockIdx.y * 256 + threadIdx.x) * V;
    if (i >= out.ne[0]) return;
    const char* row = row_number(a, blockIdx.x);
    Pack<D, V> y;
#pragma unroll
    for (int k = 0; k < V; k++) y.v[k] = from_f32<D>(element<B>(row, a.nb[0], i + k));
    *(Pack<D, V>*)(row_number(out, blockIdx.x) + i * out.nb[0]) = y;
}

// Decodes a weight in tiles to plain elements. A thread decodes one group of a row and writes V
// adjacent elements at a time; the 8 rows of a tile are in adjacent threads, so that a warp reads
// whole lines. total: groups of all rows, padding included.
template <class F, class D, int V>
__global__ void __launch_bounds__(256) decode_tiles(Tensor out, Packed a, unsigned total) {
    const tiles::Table<F> table(0);
    begin();
    table.ready();
    unsigned i = blockIdx.x * 256 + threadIdx.x;
    if (i >= total) return;
    int r = i % 8, group = i / 8 % a.groups, at = i / 8 / a.groups;
    int tile = at % a.tiles, matrix = at / a.tiles;
    if (tile * 8 + r >= a.rows) return;  // padding of the last tile
    const tiles::RawGroup<F> raw = load_group(tiles::Row<F>(a, matrix, tile, r), group);
    const tiles::Scale scale = F::scale(raw.scale.own, raw.scale.shared);
    unsigned words[8];
    tiles::code_words<F>(table, raw, words);
    char* row = row_number(out, (long long)matrix * a.rows + tile * 8 + r);
    char* to = row + group * 32LL * out.nb[0];
#pragma unroll
    for (int k = 0; k < 32; k += V) {
        Pack<D, V> y;
#pragma unroll
        for (int j = 0; j < V; j++) y.v[j] = from_f32<D>(tiles::weight<F>(scale, words, k + j));
        *(Pack<D, V>*)(to + k * out.nb[0]) = y;
    }
}

// y[:, i, p, q] = a[:, ids[i, p, q], p, q]; zeros where an id is negative or past the end.
template <class B>
__global__ void __launch_bounds__(256) get_rows(Tensor out, Tensor a, Tensor ids) {
    begin();
    int i = blockIdx.y * 256 + threadIdx.x, i1 = blockIdx.x % out.ne[1], rest = blockIdx.x / out.ne[1];
    int i2 = rest % out.ne[2], i3 = rest / out.ne[2], id = *ids.at<int>(i1, i2, i3, 0);
    if (i >= out.ne[0]) return;
    bool there = id >= 0 && id < a.ne[1];
    *out.at<float>(i, i1, i2, i3) = there ? element<B>(a.row<char>(id, i2, i3), a.nb[0], i) : 0;
}

// get_rows of i32 rows, whose values f32 cannot represent exactly.
// A thread for each element: rows of ids are short, mostly of one.
__global__ void __launch_bounds__(256)
    get_ids(Tensor out, Tensor a, Tensor ids, unsigned total) {
    begin();
    const unsigned i = blockIdx.x * 256 + threadIdx.x;
    if (i >= total) return;
    const Index at = unravel<unsigned>(i, out.ne[0], out.ne[1], out.ne[2]);
    const int id = *ids.at<int>(at.i1, at.i2, at.i3, 0);
    *out.at<int>(at.i0, at.i1, at.i2, at.i3) =
        id >= 0 && id < a.ne[1] ? *a.at<int>(at.i0, id, at.i2, at.i3) : 0;
}

// The row of `out` that receives row (i1, i2, i3) of b; null where the id is not a row of `out`.
template <class Id>
__device__ __forceinline__ char* target_row(const Tensor& out, const Tensor& ids, int i1, int i2, int i3) {
    long long id = *ids.at<Id>(i1, i2 % ids.ne[1], i3 % ids.ne[2], 0);
    return id >= 0 && id < out.ne[1] ? out.row<char>((int)id, i2, i3) : nullptr;
}

// a[:, ids[i, p % c1, q % c2], p, q] = b[:, i, p, q]. blockIdx.x: row of b.
template <class S, class D, class Id>
__global__ void __launch_bounds__(256) set_rows(Tensor out, Tensor b, Tensor ids) {
    begin();
    int i = blockIdx.y * 256 + threadIdx.x, i1 = blockIdx.x % b.ne[1], rest = blockIdx.x / b.ne[1];
    int i2 = rest % b.ne[2], i3 = rest / b.ne[2];
    char* row = target_row<Id>(out, ids, i1, i2, i3);
    if (i >= b.ne[0] || row == nullptr) return;
    *(D*)(row + i * out.nb[0]) = convert_to<D>(*b.at<S>(i, i1, i2, i3));
}

// Encodes rows into blocks of 32, one warp per block. Rows go where ids say, or in order (Id void).
template <class S, class B, class Id>
__global__ void __launch_bounds__(256) encode_rows(Tensor out, Tensor b, Tensor ids) {
    begin();
    int lane = threadIdx.x % 32, block = blockIdx.y * 8 + threadIdx.x / 32;
    if (block >= b.ne[0] / 32) return;
    char* row;
    if constexpr (!Same<Id, void>::yes) {
        int i1 = blockIdx.x % b.ne[1], rest = blockIdx.x / b.ne[1];
        row = target_row<Id>(out, ids, i1, rest % b.ne[2], rest / b.ne[2]);
        if (row == nullptr) return;
    } else {
        row = row_number(out, blockIdx.x);
    }
    float value = element<S>(row_number(b, blockIdx.x), b.nb[0], block * 32 + lane);
    Encoder<B>::put(value, (unsigned char*)row + block * out.nb[0], lane);
}
