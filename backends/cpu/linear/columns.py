"""How activations are stored for products: as f32 for those in f32, as bf16 for AMX, else as 8-bit
integers.

f32: rows of k numbers. Integers: groups of 32 of `X_BYTES`,

    32 bytes  int8 q            x = d q
    f32 d, i32 sum of the first 16 q, i32 sum of the last 16 q, f32 d (both sums)

The sums serve weights that have a zero point or a minimum.

bf16: columns that share a matrix, n of them, are padded with zeros to N = 16 blocks, and rows to
32 groups. A tile is 32 numbers of 16 columns, column after column. Tiles are in the order of

    parts of `DEPTH` numbers (the last one may be shorter) / blocks / groups

so what is multiplied with a part of a few rows is one stream.
"""

X_BYTES = 48
X_SCALE, X_SUM, X_SUM_HIGH, X_FLOAT_SUM = 32, 36, 40, 44

#: Bytes of 32 f32.
FLOAT_BYTES = 128

#: Bytes of a tile, and numbers of a row that are multiplied with all columns before the next ones.
TILE = 1024
DEPTH = 512
