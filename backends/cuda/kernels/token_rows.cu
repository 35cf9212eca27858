// What a layer does with the rows of a few tokens before it attends, in one launch: queries that are
// rotated, some normalized first, and rows of caches, of which compressors have two.
// They read products, and none reads what another one writes. One after another, as launches of their
// own, they took 22 us of a layer of DeepSeek-V4-Flash that has all five, most of them on one
// multiprocessor; together they take as long as the longest, 8.
// @kernel hot token_rows<{Plain<__half>|Plain<__nv_bfloat16>|q8_0}, {Plain<__half>|Plain<__nv_bfloat16>|q8_0}, false>
// @kernel hot token_rows<{Plain<__half>|Plain<__nv_bfloat16>|q8_0}, $1, true>
#include "compressor.cuh"
#include "norm_rope.cuh"

using namespace file;

// The arguments of `norm_rope`, `norm_rope_rows`, `rope` and `rope_rows`.
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
struct TurnedRow {
    Tensor cache, a, pos, ids;
    Rope rope;
};
// Each part's blocks end before `ends`. What is normalized has a block for each head of each token, what
// is only rotated blocks for the units of each token.
struct TokenRows {
    Compressor compressors[2];
    CachedRow row;
    NormedHeads queries;
    TurnedHeads turned;
    TurnedRow turned_row;
    int ends[6];
};

__device__ unsigned arrived[2];

// B: blocks of the first compressor's cache, and of the rows'; C: of the second one's.
template <class B, class C, bool NEOX>
__global__ void __launch_bounds__(1024) token_rows(const __grid_constant__ TokenRows a) {
    const int number = blockIdx.x, *const ends = a.ends;
    if (number < ends[0]) {
        compressed_row_part<B, NEOX>(a.compressors[0], number, ends[0], arrived);
    } else if (number < ends[1]) {
        compressed_row_part<C, NEOX>(a.compressors[1], number - ends[0], ends[1] - ends[0], arrived + 1);
    } else if (number < ends[2]) {
        const CachedRow& p = a.row;
        const int own = number - ends[1], heads = p.a.ne[1];
        norm_rope_row<B, NEOX>(p.cache, p.a, p.w, p.pos, p.ids, p.eps, p.rope, own % heads, own / heads);
    } else if (number < ends[3]) {
        const NormedHeads& p = a.queries;
        const int own = number - ends[2], heads = p.a.ne[1];
        norm_rope_head<NEOX>(p.out, p.a, p.w, p.pos, p.eps, p.rope, own % heads, own / heads);
    } else if (number < ends[4]) {
        const TurnedHeads& p = a.turned;
        const int own = number - ends[3], tokens = p.out.ne[2], token = own % tokens;
        const int i = own / tokens * blockDim.x + threadIdx.x, head = i / p.units, unit = i - head * p.units;
        const double frequency = frequency_of(unit, p.rope);
        begin();
        if (head >= p.out.ne[1]) return;
        turn<NEOX>(
            p.rope, unit, frequency, p.out.ne[0], *p.pos.at<int>(token, 0, 0, 0), p.factors,
            [&](int k) { return *p.a.at<float>(k, head, token, 0); },
            [&](int k, float x) { *p.out.at<float>(k, head, token, 0) = x; });
    } else if constexpr (!Same<B, q8_0>::yes) {
        const TurnedRow& p = a.turned_row;
        const int own = number - ends[4], tokens = p.a.ne[2], token = own % tokens, units = (p.a.ne[0] + 1) / 2;
        const int i = own / tokens * blockDim.x + threadIdx.x, head = i / units, unit = i - head * units;
        const double frequency = frequency_of(unit, p.rope);
        begin();
        const int id = *p.ids.at<int>(token, 0, 0, 0);
        if (head >= p.a.ne[1] || id < 0 || id >= p.cache.ne[1]) return;
        using T = typename B::Type;
        turn<NEOX>(
            p.rope, unit, frequency, p.a.ne[0], *p.pos.at<int>(token, 0, 0, 0), Tensor{},
            [&](int k) { return *p.a.at<float>(k, head, token, 0); },
            [&](int k, float x) { *p.cache.at<T>(head * p.a.ne[0] + k, id, 0, 0) = from_f32<T>(x); });
    }
}
