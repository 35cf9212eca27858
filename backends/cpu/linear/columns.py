"""How activations are stored for products: as f32 for those in f32, else as 8-bit integers.

f32: rows of k numbers. Integers: groups of 32 of `X_BYTES`,

    32 bytes  int8 q            x = d q
    f32 d, i32 sum of the first 16 q, i32 sum of the last 16 q, f32 d (both sums)

The sums serve weights that have a zero point or a minimum.
"""

X_BYTES = 48
X_SCALE, X_SUM, X_SUM_HIGH, X_FLOAT_SUM = 32, 36, 40, 44

#: Bytes of 32 f32.
FLOAT_BYTES = 128
