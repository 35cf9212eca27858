"""Mutants of the cpu backend's attention and of its copies to and from caches.

None of them can write outside the memory of its operands: they run in the process of the tests.
"""

from __future__ import annotations

from tests.mutants.cpu_mutant import of
from tests.mutants.cpu_row_mutants import MUTANTS as ROWS

FLASH, SOFT = ("flash_attn_ext",), ("soft_max_ext",)


ATTENTION = of(
    "attention", FLASH,
    ("k's head h % r, not h // r", "head, query = head_kv * ratio + row // n_q, row % n_q",
     "head, query = head_kv + row // n_q * heads_kv, row % n_q"),
    ("the next head's mask", "head % n_m2 * m2", "(head + 1) % n_m2 * m2"),
    ("the first sequence's mask", "i3 % n_m3 * m3", "0 * m3"),
    ("the mask off by one query", "mask + query * m1", "mask + max(query - 1, 0) * m1"),
    ("the sink in every piece of the keys", "if sinks != 0 and piece == 0:", "if sinks != 0:"),
    ("the sink without weight", "FLOOR), 1.0", "FLOOR), 0.0"),
    ("sinks as if adjacent", "f32_at(sinks + head * s0)", "f32_at(sinks + head * 4)"),
    ("ignores kv0", "i32_at(live) - kv0", "i32_at(live)"),
    ("kv_len one too large", "i32_at(live) - kv0", "i32_at(live) - kv0 + 1"),
    ("ignores kv_len", "if live != 0:", "if live == 1:"),
    ("drops a key of each piece", "(piece + 1) * keys), BLOCK)", "(piece + 1) * keys - 1), BLOCK)"),
    ("drops the last key", "min(BLOCK, n_kv - first)", "min(BLOCK, n_kv - first - 1)"),
    ("skips a block of which only the last key is seen", "n_rows, first, count):",
     "n_rows, first, count - 1):"),
    ("skips what the first row does not see", "not seen(masks, n_rows,", "not seen(masks, 1,"),
    ("the first keys of a block for all", "at_k + key * k1, k1", "at_k, k1"),
    ("the ALiBi slope of the group's first head", "(head_kv * ratio + row // n_q))",
     "(head_kv * ratio))"),
    ("the mask of the first block for all", "at += 2 * first", "at += 0 * first"),
    ("sums keep their old scale", "if factor != 1.0:", "if factor < 0.0:"),
    ("the last column keeps its scale", "rescale(target + 8, d_v, factor)",
     "rescale(target + 8, d_v - 1, factor)"),
    ("the first sequence's keys", "k + head_kv * k2 + i3 * k3", "k + head_kv * k2 + 0 * k3"),
    ("the first sequence's values", "v + head_kv * v2 + i3 * v3", "v + head_kv * v2 + 0 * v3"),
    ("the first head's values", "v + head_kv * v2 + i3 * v3", "v + i3 * v3"),
    ("the first sequence's queries", "head * q2 + i3 * q3", "head * q2"),
    ("adds pieces without their weights", "f32_at(at + 4) * math.exp(f32_at(at) - top)",
     "f32_at(at + 4)"),
    ("pieces with equal weights", "math.exp(f32_at(at) - top) / total)", "1.0 / total)"),
    ("the log-sum-exp without the largest score", "math.log(total) + top if", "math.log(total) if"),
    ("0 for the log-sum-exp of a dead row", "total != 0.0 else -math.inf", "total != 0.0 else 0.0"),
    ("without scale", 'attrs["scale"], attrs["logit', '1.0, attrs["logit'),
    ("without the soft cap", 'attrs["logit_softcap"]', "0.0"),
    ("without ALiBi", "if max_bias <= 0:", "if max_bias >= 0:"),
    ("ignores head0", "range(head0, head0 + heads)", "range(heads)"),
    ("heads past a power of two on whole steps", "g - power + 0.5", "g - power + 1"),
    ("the power above the number of heads", "(n_head.bit_length() - 1)", "n_head.bit_length()"),
)  # fmt: skip

BLOCKS = (
    *of(
        "attention_blocks", FLASH,
        ("the last of a few keys twice", 'icmp_signed("<", e.integer(i), count)',
         'icmp_signed("<", e.integer(i + 1), count)'),
        ("the largest negative number hides too", "0xFC00 - 0x10000", "0xFBFF - 0x10000"),
        ("the mask without its slope", "e.fma(e.floats(bias), tilt, value.get())",
         "e.b.fadd(e.floats(bias), value.get())"),
        ("a hidden NaN stays", "        if hides:\n", "        if False:\n"),
        ("the soft cap without its factor",
         "e.b.fmul(_tanh(e, e.b.fdiv(value.get(), limit)), limit)",
         "_tanh(e, e.b.fdiv(value.get(), limit))"),
        ("scores past the last key count",
         "weight = e.b.select(e.first(left), weight, e.zero(FLOATS))", "pass"),
        ("the sum of weights keeps its old scale", "e.fma(before, shrink, e.total(total.get()))",
         "e.b.fadd(before, e.total(total.get()))"),
        ("0 times a hidden NaN", 'e.b.fcmp_unordered("!=", weight, e.zero(FLOATS))',
         'e.b.fcmp_unordered("uno", weight, weight)'),
        ("the first columns in place of those past the last 64",
         "e.add(e.mul(wide, 64), e.mul(number, size))", "e.mul(number, size)"),
        ("drops the last columns", "columns(e.b.sub(d, rest), 1, rest)", "pass"),
        ("absent rows overwrite the last one", 'icmp_signed("<", e.integer(r), n_rows)',
         'icmp_signed(">=", e.integer(r), e.integer(0))'),
        ("the weights of the next key", "e.add(weights, e.mul(key, 4), 4 * _BLOCK * r)",
         "e.add(weights, e.mul(key, 4), 4 * _BLOCK * r + 4)"),
    ),
    *of(
        "attention_blocks", SOFT,
        ("a mask hides a NaN in soft_max_ext", "        if hides:\n", "        if True:\n"),
        ("the largest score is 0 at least", "e.maximum(top.get(), result)",
         "e.maximum(e.zero(FLOATS), result)"),
    ),
)  # fmt: skip

_READ = ("get_rows", "cast", "flash_attn_ext")
DECODE = of(
    "decode", _READ,
    ("the first half of a block twice", "address, at + 16 * i)", "address, at)", "q8_0"),
    ("a block's codes without their scale", "e.b.fmul(v, d) for v", "v for v", "q8_0"),
    ("halves of the bytes swapped", "[e.b.and_(both, e.constant(CODES, 15)), e.b.lshr(both, "
     "e.constant(CODES, 4))]", "[e.b.lshr(both, e.constant(CODES, 4)), e.b.and_(both, "
     "e.constant(CODES, 15))]", "q4_0"),
    ("codes without sign", "    if form.zero:\n", "    if form.zero == 1:\n", "q4_0"),
    ("the fifth bit counts 8", "e.constant(INTS, 16), e.zero", "e.constant(INTS, 8), e.zero",
     "q5_0"),
    ("the fifth bits of the first half twice", "address, at + 2 * i), flags", "address, at), flags",
     "q5_1"),
    ("the minimum's sign", "e.b.fadd(v, minimum)", "e.b.fsub(v, minimum)", "q4_1"),
    ("the scale for the minimum", "_half(e, address, at), at + 2", "_half(e, address, 0), at + 2",
     "q5_1"),
    ("levels one too large", "level - form.zero for", "level - form.zero + 1 for", "iq4_nl"),
    ("bf16 off by a bit", "zext(raw, INTS), e.constant(INTS, 16)",
     "zext(raw, INTS), e.constant(INTS, 15)", "bf16"),
    ("drops the last elements", 'icmp_signed(">", rest, e.integer(0))',
     'icmp_signed(">", rest, e.integer(16))'),
    ("drops a single last element", 'icmp_signed(">", rest, e.integer(0))',
     'icmp_signed(">", rest, e.integer(1))'),
)  # fmt: skip

_WRITE = ("set_rows",)
ENCODE = of(
    "encode", _WRITE,
    ("ties to even", "e.b.fadd(whole, _floor(e, fraction))", "e.nearest(size)", "q8_0"),
    ("without sign", "e.b.select(negative, e.b.neg(q), q)", "q", "q8_0"),
    ("times 1/127", 'e.b.fdiv(_most(e, [e.absolute(v) for v in x], ">"), e.number(127.0))',
     'e.b.fmul(_most(e, [e.absolute(v) for v in x], ">"), e.number(1 / 127))', "q8_0"),
    ("codes without rounding", "middle + 0.5", "middle + 0.0", "q4_0"),
    ("codes from a minimum without rounding", "at + 2, 0.5", "at + 2, 0.0", "q4_1"),
    ("16 as a code", 'e.b.icmp_signed(">", q, limit)', 'e.b.icmp_signed("<", limit, e.zero(INTS))',
     "q4_0"),
    ("the largest number, not the largest magnitude", "sizes = [e.absolute(v) for v in x]",
     "sizes = list(x)", "q4_0"),
    ("the last of equal magnitudes", "e.b.cttz(both, ir.Constant(ir.IntType(1), 0))",
     "e.b.sub(ir.Constant(i32, 31), e.b.ctlz(both, ir.Constant(ir.IntType(1), 0)))", "q4_0"),
    ("the two halves exchanged", "e.b.or_(flags[0], e.b.shl(flags[1],",
     "e.b.or_(flags[1], e.b.shl(flags[0],", "q4_0"),
    ("a NaN does not count as the largest", "e.b.or_(e.b.fcmp_ordered(\"==\", size, top), other)",
     'e.b.fcmp_ordered("==", size, top)', "q4_0"),
    ("1 / 0", "e.b.select(zero, e.number(0.0), e.b.fdiv(e.number(1.0), d))",
     "e.b.fdiv(e.number(1.0), d)", "q4_0"),
    ("a NaN does not spoil the scale",
     'e.b.or_(e.b.fcmp_ordered(sign, a, b), e.b.fcmp_unordered("uno", a, a))',
     "e.b.fcmp_ordered(sign, a, b)", "q8_0"),
    ("a NaN keeps its sign", 'e.b.select(e.b.fcmp_unordered("uno", most, most), '
     'e.number(float("nan")), most)', "most", "q4_1"),
    ("the scale of the minimum", "_put_half(e, low, out, at)", "_put_half(e, d, out, at)", "q4_1"),
    ("the fifth bits of the second half over the first", "i16), out, at + 2 * i)",
     "i16), out, at)", "q5_0"),
    ("a fifth bit for 15", "e.b.icmp_signed(\">\", q, e.constant(INTS, 15))",
     'e.b.icmp_signed(">", q, e.constant(INTS, 14))', "q5_1"),
    ("halves of the bytes swapped", "e.b.shl(codes[1]", "e.b.shl(codes[0]", "q4_0"),
    ("bf16 ties up", "e.b.add(odd, e.constant(INTS, 0x7FFF))", "e.constant(INTS, 0x8000)", "bf16"),
    ("bf16 rounds NaN to infinity", "e.b.select(e.b.fcmp_unordered(\"uno\", x, x), quiet, rounded)",
     "rounded", "bf16"),
    ("half of the second half", "e.store(e.b.trunc(q, CODES), out, 2 + 16 * i)",
     "e.store(e.b.trunc(q, CODES), out, 2 + 8 * i)", "q8_0"),
)  # fmt: skip

COPY = (
    *of(
        "copy", ("get_rows",),
        ("the first matrix for all ids", "id_ * x1 + b * x2 + c * x3", "id_ * x1"),
        ("the first tile for all rows", "* x2 + id_ // 16) * x1", "* x2) * x1", "q8_0"),
        ("the first row of a tile for all", "id_ % 16, x3", "0, x3", "q8_0"),
        ("an id of 0 is absent", "if number < 0:", "if number <= 0:"),
        ("ids of the first matrix for all", "i32_at(ids + a * i0 + b * i1 + c * i2)",
         "i32_at(ids + a * i0)"),
        ("a negative id leaves the row", "clear(y, n)", "clear(y, 0)"),
    ),
    *of(
        "copy", _WRITE,
        ("an id of 0 is absent", "if number >= 0:", "if number > 0:"),
        ("ids of the first matrix for all", "b % c1 * i1", "b % 1 * i1"),
        ("ids of the first sequence for all", "c % c2 * i2", "c % 1 * i2"),
        ("rows of the first matrix", "x + a * x1 + b * x2 + c * x3, n", "x + a * x1, n"),
        ("writes the first matrix only", "out + number * o1 + b * o2 + c * o3",
         "out + number * o1"),
        ("drops the last row", "for a in range(n1):", "for a in range(n1 - 1):"),
    ),
    *of(
        "convert", ("cast",),
        ("the first matrix for all", "x + i1 * x1 + i2 * x2 + i3 * x3", "x + i1 * x1"),
        ("drops the last piece", "range(0, n, PIECE)", "range(0, n - 1, PIECE)"),
        ("the first piece for all", "x + first // x_size * x_bytes", "x"),
    ),
)  # fmt: skip

MERGE = of(
    "merge", ("merge_lse",),
    ("the weights exchanged", "combine(y, u, w_u / total, v, w_v / total, d_v)",
     "combine(y, u, w_v / total, v, w_u / total, d_v)"),
    ("NaN for two dead rows", "FLOOR if top < FLOOR else top\n            w_u",
     "top\n            w_u"),
    ("0 / 0 for two dead rows", "                total = 1.0\n", "                total = 0.0\n"),
    ("the log-sum-exp of the larger part", "math.log(total) + top)\n\n    return run\n\n\ndef _sum",
     "top)\n\n    return run\n\n\ndef _sum"),
    ("the second log-sum-exp", "lse_u if lse_u > lse_v else lse_v", "lse_v"),
    ("a sum never changes its reference", "lse - GROWTH > reference", "lse - 1e9 > reference"),
    ("a sum keeps its old scale", "f32_at(old + 4 * d_v) * shrink + weight",
     "f32_at(old + 4 * d_v) + weight"),
    ("values of a sum keep their old scale", "combine(y, old, shrink, part, weight, d_v)",
     "combine(y, old, 1.0, part, weight, d_v)"),
    ("a dead row counts in a sum", "put_f32(y + 4 * d_v, weight)", "put_f32(y + 4 * d_v, 1.0)"),
    ("a sum without its reference", "put_f32(y + 4 * d_v + 4, top)",
     "put_f32(y + 4 * d_v + 4, lse)"),
    ("does not divide by the sum", "total if total != 0.0 else 1.0)", "1.0)"),
    ("0 / 0 for a dead sum", "total if total != 0.0 else 1.0)", "total)"),
    ("a sum's log without its reference", "math.log(total) + top if", "math.log(total) if"),
    ("0 for the log of a dead sum", "total != 0.0 else -math.inf", "total != 0.0 else 0.0"),
)  # fmt: skip

MUTANTS = (*ATTENTION, *BLOCKS, *DECODE, *ENCODE, *COPY, *MERGE, *ROWS)
