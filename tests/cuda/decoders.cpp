// Decodes weights with the kernels' decoders, row by row to f32. test_decoders.py puts the kernels'
// headers and the part of linear_tile.cu before the product in front.

// As `vec` and `decode_tiles` read them: codes and scales of a whole group.
template <class F>
void groups(const typename F::Source& a, int rows, int n, float* out) {
    const Table<F> table(0);
    for (int r = 0; r < rows; ++r) {
        const Row<F> row(a, 0, r / 8, r % 8);
        for (int group = 0; group < n; ++group) {
            const RawGroup<F> raw = load_group(row, group);
            const Scale s = F::scale(raw.scale.own, raw.scale.shared);
            unsigned words[8];
            code_words<F>(table, raw, words);
            for (int i = 0; i < 32; ++i) *out++ = weight<F>(s, words, i);
        }
    }
}

// As `tile` does: pairs of f16 (bf16) in the four threads that share a row.
template <class F>
void fragments(const typename F::Source& a, int rows, int n, float* out) {
    const Table<F> table(offset_of<F>);
    for (int r = 0; r < rows; ++r)
        for (int t = 0; t < 4; ++t) {
            const TileRow<F> row(a, 0, r / 8, r % 8, t);
            for (int group = 0; group < n; ++group) {
                unsigned pairs[4];
                decode(table, row.load(group), t, pairs);
                for (int i = 0; i < 8; ++i) {
                    const unsigned short bits = pairs[i / 2] >> i % 2 * 16;
                    float* to = out + (r * n + group) * 32 + i / 4 * 16 + 4 * t + i % 4;
                    *to = F::wide ? __uint_as_float((unsigned)bits << 16)
                                  : __half2float(__ushort_as_half(bits));
                }
            }
        }
}

// From tiles (`packed`) or from rows of a file (`raw`).
template <class F>
int run(int tiles, int tile, const Packed& packed, const Tensor& raw, float* out) {
    const int rows = packed.rows, n = packed.groups;
    if (tiles && tile) fragments<F>(packed, rows, n, out);
    if (tiles && !tile) groups<F>(packed, rows, n, out);
    if (!tiles && tile) fragments<Raw<F>>(raw, rows, n, out);
    if (!tiles && !tile) groups<Raw<F>>(raw, rows, n, out);
    return 0;
}
