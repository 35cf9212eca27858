// Attention of a few tokens to a window, and to compressed or listed rows besides, merged and rotated
// back: flash_attn_ext once or twice, merge_lse and rope_ext in two launches. Rows are keys and
// values at once.
//
// `joint` computes parts as `latent` does: the first blocks walk the first set of keys, the others the
// second. `joint_end` adds up the parts of both, so the sets need no log-sum-exp. As ops of their own
// these take four to seven launches; 128 rows of a window are less work than any of them.
//
// A block has one token, so all sets are lists to it, a window one of all keys: what the token does not
// see is not read, and nothing needs `repair`. With keys in order for sets without a list, the kernel
// had two forms of a block in 8,700 instructions, for a tile or two that run once; and masks of a
// window were four loads that waited for each other.
// @kernel hot joint<{__half|__nv_bfloat16}, 512, 1, 1, 8, 64, false>
// @kernel hot joint<__half, 512, 1, 1, 8, 64, true>
// @kernel hot 80 86 89 120a joint<{__half|__nv_bfloat16}, 512, 1, 1, 4, 32, false>
// @kernel hot 80 86 89 120a joint<__half, 512, 1, 1, 4, 32, true>
// @kernel hot joint_end<{true|false}>
#include "attention_latent.cuh"
#include "fixed_point.cuh"
#include "rope.cuh"

// Two sets of keys of the same queries; sets[1].splits is 0 if there is only one.
struct Joint {
    Attention sets[2];
};

// grid: the splits of both sets, blocks of rows.
template <class T, int DK, int MI, int WM, int WN, int BN, bool Q8>
__global__ void __launch_bounds__(BOUND<MI, WM, WN>, 1) joint(const __grid_constant__ Joint p) {
    const int splits = p.sets[0].splits, set = blockIdx.x >= splits;
    const Attention &own = p.sets[set];
    Attention a = p.sets[0];  // the queries and all that belongs to them are of both
    a.k = own.k, a.mask = own.mask, a.pos = own.pos, a.ids = own.ids;
    a.parts = own.parts, a.stats = own.stats, a.splits = own.splits, a.early = own.early;
    a.n_kv = own.n_kv, a.n_ids = own.n_ids, a.window = own.window, a.stride = own.stride;
    a.nb_pos = own.nb_pos, a.nb_k[0] = own.nb_k[0], a.scale = own.scale;
    a.nb_mask[0] = own.nb_mask[0], a.nb_mask[1] = own.nb_mask[1];
    a.nb_ids[0] = own.nb_ids[0], a.nb_ids[1] = own.nb_ids[1];
    // joint.py leaves the rest to other kernels. Constants, so that its instructions go.
    a.softcap = a.max_bias = a.v_start = 0;
    a.kv_len = nullptr, a.sinks = nullptr, a.out = nullptr;
    a.heads_kv = a.n3 = a.mask_heads = a.mask_batch = 1;
    latent_block<T, DK, MI, WM, WN, BN, Q8, true>(a, blockIdx.x - set * splits);
}

// The parts of both sets, for `joint_end`.
struct Parts {
    const float *sums[2];
    const float2 *stats[2];
    int splits[2];
};

// out[:, h, t] = rope(sum over parts, in order), with a sink for each head. out [DV, heads, T], also
// as fixed-point groups if FIXED. A thread has four adjacent columns, so a pair is in one thread.
// grid: heads, T.
template <bool FIXED>
__global__ void __launch_bounds__(DV / 4)
joint_end(Tensor out, Tensor sinks, Tensor pos, Parts p, Rope r, unsigned char *fixed) {
    constexpr int AHEAD = 8;
    const int column = threadIdx.x * 4, head = blockIdx.x, token = blockIdx.y;
    const int unit = (column - r.offset) / 2;  // of the first pair, if that is rotated
    const bool turns = column >= r.offset && column < r.offset + r.n_dims;
    double frequencies[2] = {};
    if (turns) frequencies[0] = frequency_of(unit, r), frequencies[1] = frequency_of(unit + 1, r);
    begin();
    const long long row = (long long)token * out.ne[1] + head;
    const float2 *stats[2] = {p.stats[0] + row * p.splits[0], p.stats[1] + row * p.splits[1]};
    const float sink = sinks.data ? *sinks.at<float>(head, 0, 0, 0) * LOG2E : -INF;
    float top = sink;
    for (int set = 0; set < 2; ++set)
        for (int s = 0; s < p.splits[set]; ++s) top = fmaxf(top, stats[set][s].x);
    const float base = finite(top);
    float total = exp2_fast(sink - base), sum[4] = {};
    for (int set = 0; set < 2; ++set) {
        const float *from = p.sums[set] + row * p.splits[set] * DV + column;
        for (int first = 0; first < p.splits[set]; first += AHEAD) {
            float4 x[AHEAD];
#pragma unroll
            for (int n = 0; n < AHEAD; ++n)
                if (first + n < p.splits[set]) x[n] = *(const float4 *)(from + (first + n) * DV);
#pragma unroll
            for (int n = 0; n < AHEAD; ++n) {
                if (first + n >= p.splits[set]) break;
                const float2 of = stats[set][first + n];
                const float weight = exp2_fast(of.x - base);
                total += of.y * weight;
                sum[0] += x[n].x * weight, sum[1] += x[n].y * weight;
                sum[2] += x[n].z * weight, sum[3] += x[n].w * weight;
            }
        }
    }
    const float factor = total == 0 ? 0 : 1 / total;
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] *= factor;
    const int position = *pos.at<int>(token, 0, 0, 0);
#pragma unroll
    for (int pair = 0; pair < 2; ++pair)
        if (turns) {
            float s, c;
            sincospif(angle_of(unit + pair, frequencies[pair], position, Tensor{}), &s, &c);
            s *= r.magnitude, c *= r.magnitude;
            const float x = sum[2 * pair], y = sum[2 * pair + 1];
            sum[2 * pair] = x * c - y * s, sum[2 * pair + 1] = x * s + y * c;
        }
    *(float4 *)out.at<float>(column, head, token, 0) = make_float4(sum[0], sum[1], sum[2], sum[3]);
    if constexpr (FIXED)
        put_fixed<2>(sum, fixed + (row * (DV / 32) + column / 32) * group_bytes<2>);
}
