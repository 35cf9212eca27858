// Block types as the product kernels read them (layout "tiles8", written by pack.cu).
//
// A matrix is stored in tiles of 8 rows, and a row in groups of 32 weights. The parts of a group
// are stored in planes, in the order [matrix][tile][group][row of the tile], so a warp reads 128 to
// 512 contiguous bytes whether it takes 4 groups of 8 rows or one group:
//
//   codes   16 bytes for 32 four-bit codes; 8-bit codes: two such runs, weights 0-15 and 16-31;
//           two-bit codes: 8 bytes; one-bit codes: 4 bytes
//   high    the bits above these. 4 bytes: byte i has a bit for byte i of each of the 8 code words.
//           8 bytes: the first 4 have two bits each for words 0-3, the others for words 4-7
//   scales  the group's own scale
//   supers  the fields that the groups of a block share, in the order [matrix][tile][block][row]
//
// Types with grids have indices for codes, and signs for high bits: see iq.cuh.
//
// Code word j holds the codes of weights 4 j to 4 j + 3, one byte each. Word j of the 16 bytes
// holds code words j and j + 4: in the low and high halves of its bytes or, for types with a table
// of levels, in its low and high 16 bits. Two-bit codes are laid out like 8 bytes of high bits, and
// one-bit codes like 4.
#pragma once
#include "blocks.cuh"
#include "linear_common.cuh"

struct Packed {
    const unsigned char *codes, *high, *scales, *supers;
    int rows, tiles, groups, blocks;  // groups and blocks of a row
};

namespace tiles {

// Weight = s (code - bias) - m, for the two halves of a group.
struct Scale {
    float s0, s1, m0, m1;
};

// The traits of a type. BLOCKS: the type as files store it; CODES, HIGH, SCALE, SUPER: bytes of the
// parts, as in formats.py; AFFINE: has a minimum; SPLIT: each half of a group has its own scale.
template <class BLOCKS, int CODES, int HIGH, int SCALE, int SUPER, bool AFFINE, bool SPLIT,
          int BIAS, bool TABLE>
struct Format {
    using Blocks = BLOCKS;
    static constexpr int code_bytes = CODES, high = HIGH, scale_bytes = SCALE, super_bytes = SUPER;
    static constexpr int code_runs = CODES / 16;  // 0: short codes, of one or two bits
    static constexpr int block_groups = BLOCKS::SIZE / 32;
    static constexpr bool affine = AFFINE, split = SPLIT, table = TABLE, grid = false;
    // Whether the whole scale is the f16 in the group.
    static constexpr bool half_scale = SCALE == 2 && SUPER == 0 && !AFFINE && !SPLIT;
    static constexpr int bias = BIAS;
    using Source = Packed;
    using Half = __half;                 // holds a decoded weight
    static constexpr bool wide = false;  // exceeds the range of f16: Half is bf16

    static __device__ __forceinline__ Scale one(float s) { return {s, s, s * BIAS, s * BIAS}; }
};

__device__ __forceinline__ float low_half(unsigned bits) {
    return __half2float(__ushort_as_half((unsigned short)bits));
}
__device__ __forceinline__ float high_half(unsigned bits) { return low_half(bits >> 16); }

// The levels of a table, a byte each. apart: the same for two lookups, whose sum is the level. A byte
// permutation in which the fourth bit of a nibble is set gives the sign of the byte that the other
// three choose: 0 or -1. So a nibble looks up the first 8 levels, and with its fourth bit turned the
// last 8, and each is less by what the other lookup gives then.
struct Iq4Levels {
    static __device__ __forceinline__ uint4 levels() {  // -127 -104 ... 113
        return make_uint4(0xBFAD9881u, 0xF6EADDCFu, 0x26190D01u, 0x71594535u);
    }
    static __device__ __forceinline__ uint4 apart() {
        return make_uint4(0xBFAD9881u, 0xF6EADDCFu, 0x271A0E02u, 0x725A4636u);
    }
};
struct Fp4Levels {
    static __device__ __forceinline__ uint4 levels() {  // 0 1 2 3 4 6 8 12 and their negatives
        return make_uint4(0x03020100u, 0x0C080604u, 0xFDFEFF00u, 0xF4F8FAFCu);
    }
    static __device__ __forceinline__ uint4 apart() {
        return make_uint4(0x04030200u, 0x0D090705u, 0xFDFEFF00u, 0xF4F8FAFCu);
    }
};

struct q4_0 : Format<file::q4_0, 16, 0, 2, 0, false, false, 8, false> {
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned) { return one(low_half(s)); }
};
struct q5_0 : Format<file::q5_0, 16, 4, 2, 0, false, false, 16, false> {
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned) { return one(low_half(s)); }
};
struct q8_0 : Format<file::q8_0, 32, 0, 2, 0, false, false, 0, false> {
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned) { return one(low_half(s)); }
};
struct iq4_nl : Format<file::iq4_nl, 16, 0, 2, 0, false, false, 0, true>, Iq4Levels {
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned) { return one(low_half(s)); }
};
struct q4_1 : Format<file::q4_1, 16, 0, 4, 0, true, false, 0, false> {
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned) {
        return {low_half(s), low_half(s), -high_half(s), -high_half(s)};
    }
};
struct q5_1 : Format<file::q5_1, 16, 4, 4, 0, true, false, 0, false> {
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned u) {
        return q4_1::scale(s, u);
    }
};
struct q4_K : Format<file::q4_K, 16, 0, 2, 4, true, false, 0, false> {
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned u) {
        float d = low_half(u) * (s & 255), m = high_half(u) * (s >> 8);
        return {d, d, m, m};
    }
};
struct q5_K : Format<file::q5_K, 16, 4, 2, 4, true, false, 0, false> {
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned u) {
        return q4_K::scale(s, u);
    }
};
struct q6_K : Format<file::q6_K, 16, 8, 2, 2, false, true, 32, false> {
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned u) {
        float s0 = low_half(u) * (signed char)s, s1 = low_half(u) * (signed char)(s >> 8);
        return {s0, s1, s0 * 32, s1 * 32};
    }
};
struct q3_K : Format<file::q3_K, 8, 4, 2, 2, false, true, 4, false> {
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned u) {
        float s0 = low_half(u) * (signed char)s, s1 = low_half(u) * (signed char)(s >> 8);
        return {s0, s1, s0 * 4, s1 * 4};
    }
};
struct q2_K : Format<file::q2_K, 8, 0, 2, 4, true, true, 0, false> {
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned u) {
        float d = low_half(u), m = high_half(u);
        return {d * (s & 15), d * (s >> 8 & 15), m * (s >> 4 & 15), m * (s >> 12)};
    }
};
struct tq2_0 : Format<file::tq2_0, 8, 0, 0, 2, false, false, 1, false> {
    static __device__ __forceinline__ Scale scale(unsigned, unsigned u) { return one(low_half(u)); }
};
struct tq1_0 : tq2_0 {
    using Blocks = file::tq1_0;
};
// A bit unpacks to 0 or 2.
struct q1_0 : Format<file::q1_0, 4, 0, 0, 2, false, false, 1, false> {
    static __device__ __forceinline__ Scale scale(unsigned, unsigned u) { return one(low_half(u)); }
};
struct iq4_xs : Format<file::iq4_xs, 16, 0, 1, 2, false, false, 0, true>, Iq4Levels {
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned u) {
        return one(low_half(u) * (signed char)s);
    }
};
struct mxfp4 : Format<file::mxfp4, 16, 0, 1, 0, false, false, 0, true>, Fp4Levels {
    using Half = __nv_bfloat16;
    static constexpr bool wide = true;
    static __device__ __forceinline__ Scale scale(unsigned e, unsigned) {  // 2^(e - 128)
        return one(__uint_as_float(e < 2 ? 0x200000u << e : (e - 1) << 23));
    }
};
struct nvfp4 : Format<file::nvfp4, 16, 0, 2, 0, false, true, 0, true>, Fp4Levels {
    // The 4 exponent and 3 mantissa bits, moved to the top of an f16, give a value 2^8 times
    // smaller; times 128, because the scale is halved.
    static __device__ __forceinline__ float e4m3(unsigned s) {
        return low_half((s & 127) << 7) * 128;
    }
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned) {
        return {e4m3(s), e4m3(s >> 8), 0, 0};
    }
};
template <class B>
struct InGrid
    : Format<file::InGrid<B>, B::CODES, B::HIGH, B::SCALE, 2, false, B::SPLIT, 0, false> {
    using Grid = B;
    static constexpr bool grid = true;
    static __device__ __forceinline__ uint4 levels() { return B::levels(); }
    static __device__ __forceinline__ Scale scale(unsigned s, unsigned u) {
        const uint2 steps = B::steps(s);
        const float d = low_half(u) * (0.125f * B::FACTOR);
        return {fmaf((float)steps.x, 2 * d, d), fmaf((float)steps.y, 2 * d, d), 0, 0};  // exact
    }
};
GRID_TYPES

// f16 and bf16, undecoded.
template <class T>
struct Dense {
    using Source = Tensor;
    using Half = T;
};

// One matrix, or up and gate.
template <class F>
struct Weights {
    typename F::Source w[2];
};

__device__ __forceinline__ int groups_of(const Packed& p) { return p.groups; }
__device__ __forceinline__ int groups_of(const Tensor& a) { return a.ne[0] / 32; }
__device__ __forceinline__ int rows_of(const Packed& p) { return p.rows; }
__device__ __forceinline__ int rows_of(const Tensor& a) { return a.ne[1]; }

// -- reading --------------------------------------------------------------------------------------

template <int BYTES>
__device__ __forceinline__ unsigned load_small(const unsigned char* plane, int unit) {
    if constexpr (BYTES == 1) return plane[unit];
    if constexpr (BYTES == 2) return load_global((const unsigned short*)plane + unit);
    if constexpr (BYTES == 4) return ((const unsigned*)plane)[unit];
    return 0;
}

// Points at one row of a matrix; group numbers count from its first group.
template <class F>
struct Row {
    const uint4* codes;
    const unsigned char *high, *scales, *supers;

    Row() = default;
    __device__ __forceinline__ Row(const Packed& p, int matrix, int tile, int row) {
        long long at = matrix * (long long)p.tiles + tile, unit = at * p.groups * 8 + row;
        if constexpr (F::code_runs == 0)
            codes = (const uint4*)(p.codes + unit * F::code_bytes);
        else
            codes = (const uint4*)p.codes + (at * p.groups * 8 * F::code_runs + row);
        high = p.high + unit * F::high;
        scales = p.scales + unit * F::scale_bytes;
        supers = p.supers + (at * p.blocks * 8 + row) * F::super_bytes;
    }
    // Makes word 0 of each run word t, and keeps whole addresses in registers: else the compiler
    // adds their parts up for every load.
    static constexpr bool holds = true;
    __device__ __forceinline__ void hold(int t) {
        if constexpr (F::code_runs > 0) codes = (const uint4*)((const unsigned*)codes + t);
        asm volatile("" : "+l"(codes), "+l"(scales));
    }
    // Goes some matrices further, whose planes have less than 4 GB.
    __device__ __forceinline__ void skip(const Packed& p, int matrices) {
        constexpr int BYTES = F::code_runs ? 16 * F::code_runs : F::code_bytes;
        const unsigned units = p.tiles * p.groups * 8;
        auto by = [&](unsigned bytes) { return (unsigned long long)(unsigned)matrices * bytes; };
        codes = (const uint4*)((const char*)codes + by(units * BYTES));
        if constexpr (F::high > 0) high += by(units * F::high);
        if constexpr (F::scale_bytes > 0) scales += by(units * F::scale_bytes);
        if constexpr (F::super_bytes > 0) supers += by(p.tiles * p.blocks * 8 * F::super_bytes);
    }
    // Keeps the compiler from computing where it is later than here.
    __device__ __forceinline__ void pin() {
        asm volatile("" : "+l"(codes), "+l"(scales));
        if constexpr (F::high > 0) { asm volatile("" : "+l"(high)); }
        if constexpr (F::super_bytes > 0) { asm volatile("" : "+l"(supers)); }
    }
    __device__ __forceinline__ uint4 code_run(int group, int run) const {
        return load_in_order(codes + (group * F::code_runs + run) * 8);
    }
    // Word t of a run.
    __device__ __forceinline__ unsigned code_word(int group, int run, int t) const {
        return load_stream((const unsigned*)(codes + (group * F::code_runs + run) * 8) + t);
    }
    // The short codes of a group; one-bit codes are in x.
    __device__ __forceinline__ uint2 short_codes(int group, bool in_order = false) const {
        if constexpr (F::code_bytes == 4) {
            const unsigned* at = (const unsigned*)codes + group * 8;
            return make_uint2(in_order ? load_in_order(at) : load_stream(at), 0);
        } else {
            const uint2* at = (const uint2*)codes + group * 8;
            return in_order ? load_in_order(at) : load_stream(at);
        }
    }
    __device__ __forceinline__ uint2 high_bits(int group) const {
        uint2 bits = {};
        if constexpr (F::high == 2) bits.x = load_small<2>(high, group * 8);
        if constexpr (F::high == 4) bits.x = ((const unsigned*)high)[group * 8];
        if constexpr (F::high == 8) bits = ((const uint2*)high)[group * 8];
        return bits;
    }
    // Fetches what `load_group` reads into L2.
    __device__ __forceinline__ void fetch(int group) const {
        for (int run = 0; run < F::code_runs; ++run)
            fetch_early(codes + (group * F::code_runs + run) * 8);
        if constexpr (F::code_runs == 0) fetch_early((const char*)codes + group * 8 * F::code_bytes);
        if constexpr (F::high > 0) fetch_early(high + group * 8 * F::high);
        if constexpr (F::scale_bytes > 0) fetch_early(scales + group * 8 * F::scale_bytes);
    }
    __device__ __forceinline__ RawScale scale(int group) const {
        return {load_small<F::scale_bytes>(scales, group * 8),
                load_small<F::super_bytes>(supers, group / F::block_groups * 8)};
    }
};

// One group of one row, undecoded.
template <class F>
struct RawGroup {
    uint4 codes[F::code_runs ? F::code_runs : 1];  // short codes use x and y
    uint2 high;
    RawScale scale;
};

// A type with its scale among the high bits reads it from there.
template <class F>
__device__ __forceinline__ RawScale whole_scale(RawScale scale, uint2 high) {
    if constexpr (F::grid && F::scale_bytes == 0) scale.own = high.x;
    return scale;
}

template <class F>
__device__ __forceinline__ RawGroup<F> load_group(const Row<F>& row, int group) {
    RawGroup<F> raw;
    if constexpr (F::code_runs == 0) {
        const uint2 codes = row.short_codes(group, true);
        raw.codes[0] = make_uint4(codes.x, codes.y, 0, 0);
    }
    for (int run = 0; run < F::code_runs; ++run) raw.codes[run] = row.code_run(group, run);
    raw.high = row.high_bits(group);
    raw.scale = whole_scale<F>(row.scale(group), raw.high);
    return raw;
}

// The grid of a type, in shared memory: of entries of 8 codes their nibbles, each below a place for
// the sign; of entries of 4 their levels, a byte each. Lanes look up different entries, so a bank
// serves about three of them. Of a small grid there are 16 copies, an entry of one in each of two
// banks: then a lane has to wait for at most one other.
template <class B>
struct Entries {
    static constexpr int COPIES = B::ENTRIES <= 256 ? 16 : 1;
    static __device__ __forceinline__ unsigned* memory() {
        __shared__ uint4 entries[B::ENTRIES * COPIES / 4];
        return (unsigned*)entries;
    }
    // By all threads of a block. offset: see Table.
    static __device__ __forceinline__ void fill(unsigned offset) {
        constexpr int WIDTH = COPIES > 1 ? 4 : 1;
        const int threads = blockDim.x * blockDim.y;
#pragma unroll 4  // loads of the grid that are under way together
        for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < B::ENTRIES * COPIES / WIDTH;
             i += threads) {
            unsigned entry = B::grid(i / (COPIES / WIDTH));
            if constexpr (B::N == 4)
                entry = permute(B::levels().x, B::levels().y, entry) ^ offset;
            if constexpr (WIDTH == 4)
                ((uint4*)memory())[i] = make_uint4(entry, entry, entry, entry);
            else
                memory()[i] = entry;
        }
    }
};

// The levels of a type with a table, each byte XORed with `offset` (0x80808080 makes them unsigned,
// 128 higher), and masks. Other types need only `magic`. Types with grids: only threads that have
// passed `ready` may decode.
template <class F>
struct Table {
    unsigned x, y, z, w, pick, magic, stride, minus;
    uint4 apart;  // for two lookups
    const char* entries;

    // Hides the constants from the compiler: a byte permutation takes only one immediate, and the
    // compiler would move the others into registers again each time. held: also `pick`, which it
    // would else take apart to have a register more and an instruction more for each word.
    __device__ __forceinline__ explicit Table(unsigned offset, bool held = false) {
        magic = 0x64646464u ^ threadIdx.z;
        if constexpr (F::table) {
            offset ^= threadIdx.z;  // 0
            uint4 t = F::levels();
            x = t.x ^ offset, y = t.y ^ offset, z = t.z ^ offset, w = t.w ^ offset;
            t = F::apart();
            apart = make_uint4(t.x ^ offset, t.y ^ offset, t.z ^ offset, t.w ^ offset);
            pick = held ? 0x32103210u + threadIdx.z : 0x32103210u ^ threadIdx.z;
        }
        if constexpr (F::grid) {
            using E = Entries<typename F::Grid>;
            x = F::levels().x ^ offset, y = F::levels().z ^ offset;
            const unsigned hidden = held ? 0 : threadIdx.z;  // where registers are short, not
            pick = 0x32103210u + threadIdx.z, minus = ~hidden, stride = 4 * E::COPIES + hidden;
            entries = (const char*)(E::memory() + threadIdx.x % E::COPIES);
            E::fill(offset);
        }
    }
    // An entry of the grid. Multiplies, because the units for shifts and logic are the busy ones.
    __device__ __forceinline__ unsigned entry(unsigned index) const {
        return *(const unsigned*)(entries + index * stride);
    }
    __device__ __forceinline__ void ready() const {
        if constexpr (F::grid) __syncthreads();
    }
};

// Unpacks code words j and j + 4 from word j of a group's 16 bytes.
template <class F>
__device__ __forceinline__ void unpack(const Table<F>& t, unsigned q, uint2 high, int j,
                                       unsigned& first, unsigned& second) {
    if constexpr (F::table) {
        // The low three bits of a nibble select one of 8 bytes; its fourth bit selects the half.
        unsigned low = q & 0x77777777u, pick = ((q >> 1) & 0x44444444u) | t.pick;
        first = permute(permute(t.x, t.y, low), permute(t.z, t.w, low), pick);
        low >>= 16, pick >>= 16;
        second = permute(permute(t.x, t.y, low), permute(t.z, t.w, low), pick);
    } else {
        first = q & 0x0F0F0F0Fu;
        second = (q >> 4) & 0x0F0F0F0Fu;
        if constexpr (F::high == 4) {
            first |= __funnelshift_r(high.x, high.x, j - 4) & 0x10101010u;
            second |= (high.x >> j) & 0x10101010u;
        }
        if constexpr (F::high == 8) {
            first |= __funnelshift_r(high.x, high.x, 2 * j - 4) & 0x30303030u;
            second |= __funnelshift_r(high.y, high.y, 2 * j - 4) & 0x30303030u;
        }
    }
}

// Unpacks code words j and j + 4 from short codes.
template <class F>
__device__ __forceinline__ void unpack_short(uint2 q, uint2 high, int j, unsigned& first,
                                             unsigned& second) {
    if constexpr (F::code_bytes == 4) {
        first = __funnelshift_r(q.x, q.x, j - 1) & 0x02020202u;
        second = (q.x >> (j + 3)) & 0x02020202u;
        return;
    }
    // Rotate: with plain shifts ptxas uses fewer registers and then spills.
    first = __funnelshift_r(q.x, q.x, 2 * j) & 0x03030303u;
    second = __funnelshift_r(q.y, q.y, 2 * j) & 0x03030303u;
    if constexpr (F::high == 4) {
        first |= __funnelshift_r(high.x, high.x, j - 2) & 0x04040404u;
        second |= (high.x >> (j + 2)) & 0x04040404u;
    }
}

// For each of 8 weights, a nibble: where it is negative, bit 2. The weights' signs are in bits 0
// (turned by `by` bits) of the nibbles. Nibbles of types with entries of 4 codes choose the weight.
template <class F>
__device__ __forceinline__ unsigned sign_nibbles(const Table<F>& table, unsigned signs, int by) {
    const unsigned mine = __funnelshift_r(signs, signs, by - 2) & 0x44444444u;
    return F::Grid::N == 4 ? mine | table.pick : mine;
}

// The levels of 4 weights, chosen by the low halves of their entry (of 8 codes) and of `signs`.
template <class F>
__device__ __forceinline__ unsigned signed_levels(const Table<F>& table, unsigned entry,
                                                  unsigned signs) {
    if constexpr (F::Grid::N == 8) return permute(table.x, table.y, entry | signs);
    // Bytes that are not 0 are negated without carries.
    return permute(entry, entry * table.minus + 0x01010100u, signs);
}

// Unpacks words t and t + 4 of a group of a type with a grid.
template <class F>
__device__ __forceinline__ void unpack_indexed(const Table<F>& table, const Indexed& q, int t,
                                               unsigned& first, unsigned& second) {
    using B = typename F::Grid;
    t &= 3;  // the compiler does not know that
    const int g = t / 2, half = 16 * (t % 2);
    const unsigned signs = B::signs(q);
    unsigned a, b;
    if constexpr (B::N == 8) {
        a = table.entry(B::index(q, g)) >> half, b = table.entry(B::index(q, g + 2)) >> half;
    } else {
        a = table.entry(B::index(q, t)), b = table.entry(B::index(q, t + 4));
    }
    first = signed_levels(table, a, sign_nibbles(table, signs, half + g));
    second = signed_levels(table, b, sign_nibbles(table, signs, half + g + 2));
}

// Unpacks the 8 code words of a group of a type with a grid.
template <class F>
__device__ __forceinline__ void indexed_words(const Table<F>& table, const Indexed& q,
                                              unsigned (&words)[8]) {
    using B = typename F::Grid;
    const unsigned signs = B::signs(q);
#pragma unroll
    for (int g = 0; g < 4; ++g) {
        const unsigned mine = sign_nibbles(table, signs, g);
        if constexpr (B::N == 8) {
            const unsigned chosen = table.entry(B::index(q, g)) | mine;
            words[2 * g] = permute(table.x, table.y, chosen);
            words[2 * g + 1] = permute(table.x, table.y, chosen >> 16);
        } else {
            words[2 * g] = signed_levels(table, table.entry(B::index(q, 2 * g)), mine);
            words[2 * g + 1] =
                signed_levels(table, table.entry(B::index(q, 2 * g + 1)), mine >> 16);
        }
    }
}

// Unpacks the 8 code words of a group.
template <class F>
__device__ __forceinline__ void code_words(const Table<F>& t, const RawGroup<F>& raw,
                                           unsigned (&words)[8]) {
    const uint4 c = raw.codes[0];
    if constexpr (F::grid) {
        indexed_words(t, {make_uint2(c.x, c.y), raw.high.x, raw.scale.own}, words);
    } else if constexpr (F::code_runs == 2) {
        const uint4 d = raw.codes[1];
        words[0] = c.x, words[1] = c.y, words[2] = c.z, words[3] = c.w;
        words[4] = d.x, words[5] = d.y, words[6] = d.z, words[7] = d.w;
    } else if constexpr (F::code_runs == 0) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
            unpack_short<F>(make_uint2(c.x, c.y), raw.high, j, words[j], words[j + 4]);
    } else {
        unpack(t, c.x, raw.high, 0, words[0], words[4]);
        unpack(t, c.y, raw.high, 1, words[1], words[5]);
        unpack(t, c.z, raw.high, 2, words[2], words[6]);
        unpack(t, c.w, raw.high, 3, words[3], words[7]);
    }
}

// Weight i of a group. With one rounding, because s times the code may be longer than f32 when the
// weight is not; so it is the value of the codecs.
template <class F>
__device__ __forceinline__ float weight(const Scale& scale, const unsigned (&words)[8], int i) {
    const float code = (signed char)(words[i / 4] >> i % 4 * 8), s = i < 16 ? scale.s0 : scale.s1;
    if constexpr (F::affine || F::bias) return fmaf(s, code, i < 16 ? -scale.m0 : -scale.m1);
    return s * code;
}

}  // namespace tiles
