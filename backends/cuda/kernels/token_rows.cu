// What a layer does with the rows of a few tokens before it attends, in one launch: norm and rotation
// of queries, rotation of an indexer's queries, and rows of caches, of which compressors have two.
// They read products, and none reads what another one writes. One after another, as launches of their
// own, they took 22 us of a layer of DeepSeek-V4-Flash that has all five, most of them on one
// multiprocessor; together they take as long as the longest, 8.
// @kernel hot token_rows<{Plain<__half>|Plain<__nv_bfloat16>|q8_0}, {Plain<__half>|Plain<__nv_bfloat16>|q8_0}>
#include "compressor.cuh"
#include "norm_rope.cuh"

using namespace file;

// The arguments of `norm_rope`, `norm_rope_rows` and `rope`.
struct NormedHeads {
    Tensor out, a, w, pos;
    float eps;
    Rope rope;
};
struct CachedRow {
    Tensor cache, a, w, pos, ids;
    float eps;
    Rope rope;
};
struct TurnedHeads {
    Tensor out, a, pos, factors;
    Rope rope;
    int units;
};
// Each part's blocks end before `ends`. A part of heads has a block for each head of each token, the
// last one blocks for the units of each token.
struct TokenRows {
    Compressor compressors[2];
    CachedRow row;
    NormedHeads queries;
    TurnedHeads turned;
    int ends[5];
};

__device__ unsigned arrived[2];

// B: blocks of the first compressor's cache, and of the row's; C: of the second one's.
template <class B, class C>
__global__ void __launch_bounds__(1024) token_rows(const __grid_constant__ TokenRows a) {
    const int block = blockIdx.x, *const ends = a.ends;
    if (block < ends[0]) {
        compressed_row_part<B, false>(a.compressors[0], block, ends[0], arrived);
    } else if (block < ends[1]) {
        compressed_row_part<C, false>(a.compressors[1], block - ends[0], ends[1] - ends[0], arrived + 1);
    } else if (block < ends[2]) {
        const CachedRow& p = a.row;
        const int own = block - ends[1], heads = p.a.ne[1];
        norm_rope_row<B, false>(p.cache, p.a, p.w, p.pos, p.ids, p.eps, p.rope, own % heads, own / heads);
    } else if (block < ends[3]) {
        const NormedHeads& p = a.queries;
        const int own = block - ends[2], heads = p.a.ne[1];
        norm_rope_head<false>(p.out, p.a, p.w, p.pos, p.eps, p.rope, own % heads, own / heads);
    } else {
        const TurnedHeads& p = a.turned;
        const int own = block - ends[3], tokens = p.out.ne[2], token = own % tokens;
        const int i = own / tokens * blockDim.x + threadIdx.x, head = i / p.units, unit = i - head * p.units;
        const double frequency = frequency_of(unit, p.rope);
        begin();
        if (head >= p.out.ne[1]) return;
        turn<false>(
            p.rope, unit, frequency, p.out.ne[0], *p.pos.at<int>(token, 0, 0, 0), p.factors,
            [&](int k) { return *p.a.at<float>(k, head, token, 0); },
            [&](int k, float x) { *p.out.at<float>(k, head, token, 0) = x; });
    }
}
