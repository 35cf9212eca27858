"""Mutants of the cpu backend's small ops: element by element, copies, sums, sorting, routing.

As in cpu_mutants.py, none of them can write outside the memory of its operands.
"""

from __future__ import annotations

from tests.mutants.cpu_mutant import of

BINARY, ANY = ("add", "sub", "mul", "div"), ("add", "scale", "glu", "silu")

ELEMENTWISE = (
    *of(
        "elementwise", BINARY,
        ("the first row of b for all", "b + i1 % m1 * b1", "b + 0 * b1"),
        ("b's rows do not repeat in turn", "b + i1 % m1 * b1", "b + i1 // max(1, n1 // m1) * b1"),
        ("the first sequence of b for all", "i3 % m3 * b3", "0 * b3"),
        ("the first number of b for a whole row", "y = one if scalar or not two else",
         "y = e.splat(e.load(f32, b)) if wide and two else one if scalar or not two else"),
        ("b repeats its first number", "            length = b.ne[0]\n",
         "            length, scalar = b.ne[0], True\n"),
    ),
    *of(
        "elementwise", ANY,
        ("the first sequence for all", "a + i1 * a1 + i2 * a2 + i3 * a3", "a + i1 * a1 + i2 * a2"),
        ("drops the last element of a row", "                    min(length, n - first),",
         "                    min(length, n - first - 1),"),
    ),
    *of(
        "elementwise", ("scale",),
        ("without its summand", "e.b.fadd(e.b.fmul(x, s), b)", "e.b.fmul(x, s)"),
        ("adds first", "e.b.fadd(e.b.fmul(x, s), b)", "e.b.fmul(e.b.fadd(x, b), s)"),
    ),
    *of(
        "gate", ("clamp",),
        ("without a lower limit", 'e.b.select(e.b.fcmp_ordered("<", x, low), low, x)', "x"),
        ("without an upper limit", 'e.b.select(e.b.fcmp_ordered(">", x, high), high, x)', "x"),
        ("limits a NaN", 'fcmp_ordered("<", x, low)', 'fcmp_unordered("<", x, low)'),
    ),
    *of(
        "gate", ("glu",),
        ("the limit of a gate from below too", "at_most(e, gate, limit)",
         "limited(e, gate, e.b.fneg(limit), limit)"),
        ("the gate without its limit", "at_most(e, gate, limit)", "gate"),
        ("from above only", "limited(e, up, e.b.fneg(limit), limit)", "at_most(e, up, limit)"),
        ("the gate activated", "e.b.fmul(ACTIVATIONS[act](e, gate), up)",
         "e.b.fmul(ACTIVATIONS[act](e, up), gate)"),
    ),
    *of(
        "elementwise", ("add_mask",),
        ("a plain sum", "e.b.select(seen, e.b.fadd(x, y), y)", "e.b.fadd(x, y)"),
        ("the mask alone", "e.b.select(seen, e.b.fadd(x, y), y)", "y"),
    ),
    *of("elementwise", ("fill",), ("leaves a", "x, y, value, q: value", "x, y, value, q: x")),
    *of(
        "elementwise", ("glu",),
        ("the halves exchanged", 'if call.attrs["swapped"]:', 'if not call.attrs["swapped"]:'),
        ("a limit of 0", "a, b, p=limit or 0.0)", "a, b)"),
        ("the first half twice", "ptr=a.ptr + half", "ptr=a.ptr"),
        ("the second half of f32 for f16", '(4 if a.type == "f32" else 2)',
         '(4 if a.type == "f32" else 1)', "f16"),
    ),
)  # fmt: skip

COPIES = (
    *of(
        "strided", ("concat",),
        ("the second over the first", "out.ptr + end * out.nb[dim]", "out.ptr"),
        ("one too early", "out.ptr + end * out.nb[dim]", "out.ptr + (end - 1) * out.nb[dim]"),
    ),
    *of(
        "strided", ("cont",),
        ("the first sequence for all", "i2 % m2 * x2 + i3 % m3 * x3", "i2 % m2 * x2"),
        ("the first sequence of strided rows", "x + i1 * x1 + i2 * x2 + i3 * x3",
         "x + i1 * x1 + i2 * x2"),
        ("the first element for all", "at(source + i * x0)", "at(source)"),
        ("drops the last strided element", "for i in range(n):", "for i in range(n - 1):"),
        ("elements one byte apart are adjacent", "x.nb[0] == call.out.nb[0] == type_.nbytes",
         "n > 1"),
    ),
    *of(
        "strided", ("repeat",),
        ("the first row for all", "x + i1 % m1 * x1", "x + i1 % m1 * 0"),
        ("the first matrix for all", "i2 % m2 * x2", "i2 % m2 * 0"),
        ("each row once", "for i in range(times):", "for i in range(1):"),
    ),
    *of(
        "row_loops", ("cont", "concat"),
        ("drops the bytes after the last word", "e.loop(e.b.sub(nbytes, done))",
         "e.loop(e.integer(0))", "f16"),
        ("the first words again", "e.load_first(INTS, e.add(x, done), words)",
         "e.load_first(INTS, x, words)"),
        ("the first vector for all", "e.load(BYTES, e.add(x, at))", "e.load(BYTES, x)"),
    ),
    *of(
        "convert", ("cast",),
        ("every second integer", "at(x + i * x_size)", "at(x + i // 2 * 2 * x_size)", "i32"),
        ("integers above 0 only", "np.int64(value))", "np.int64(max(value, 0)))", "i32"),
    ),
    *of(
        "convert", ("cast", "cpy"),
        ("half of a row of the same type", "n // block * nbytes", "n // block // 2 * nbytes"),
    ),
)  # fmt: skip

NORM = (
    *of(
        "norm", ("norm",),
        ("without the correction of the mean", "row.load(x, offset), mean), correction)",
         "row.load(x, offset), mean), e.zero(FLOATS))"),
        ("counts numbers past the row's end", "row.only(e.b.fsub(row.load(x, offset), mean))",
         "e.b.fsub(row.load(x, offset), mean)"),
        ("divides by 0", "e.number(1.0), root)", "e.number(0.0), root)"),
        ("without eps", "e.b.fadd(var, e.b.fptrunc(eps, f32))", "var"),
        ("the first sequence for all", "x + i1 * x1 + i2 * x2 + i3 * x3, n, eps",
         "x + i1 * x1 + i2 * x2, n, eps"),
    ),
    *of(
        "norm", ("rms_norm",),
        ("without eps", "e.b.fadd(mean, e.b.fptrunc(eps, f32))", "mean"),
    ),
)  # fmt: skip

REDUCE = (
    *of(
        "reduce", ("sum_rows",),
        ("the first matrix for all", "x + i1 * x1 + i2 * x2 + i3 * x3, n", "x + i1 * x1, n"),
        ("drops the last element", "e.row(n, lambda row, at: sums",
         "e.row(e.add(n, -1), lambda row, at: sums"),
        ("the last vector only", "e.b.fadd(sums.get(), wide(e, row, x, at))",
         "wide(e, row, x, at)"),
    ),
)  # fmt: skip

SORT = (
    *of(
        "sort", ("top_k", "argsort", "argmax"),
        ("NaN comes last", "return 0xFFFFFFFF", "return 0"),
        ("-0 below 0", "if value == 0.0:", "if value == 0.5:"),
        ("negative numbers upside down", "~bits & 0x7FFFFFFF", "bits & 0x7FFFFFFF"),
        ("negative numbers above the others", "bits + 0x80000000 if", "bits if"),
    ),
    *of(
        "sort", ("top_k",),
        ("the last of equals first", "i32_at(out + (place - 1) * step)\n                if key("
         "x + 4 * before) >= own", "i32_at(out + (place - 1) * step)\n                if key("
         "x + 4 * before) > own"),
        ("equals of the last replace it", "if own <= last or", "if own < last or"),
        ("the first row for all", "i3 * x3\n            best(", "i3 * x3 - i1 * x1\n            "
         "best("),
        ("the threshold is the best", "key(x + 4 * i32_at(out + (k - 1) * step))",
         "key(x + 4 * i32_at(out))"),
    ),
    *of(
        "sort", ("argsort",),
        ("the last of equals first", "sign * first <= sign * second",
         "sign * first < sign * second"),
        ("always ascending", '-1 if call.attrs["order"] == "desc" else 1', "1"),
        ("one merge too few", "while width < n:", "while width < n // 2:"),
        ("the first row for all", "i3 * x3\n                for", "i3 * x3 - i1 * x1\n"
         "                for"),
    ),
    *of(
        "sort", ("argmax",),
        ("the last of equals", "if own_key > top:", "if own_key >= top:"),
        ("drops the last element", "for i in range(n):\n                own_key",
         "for i in range(n - 1):\n                own_key"),
        ("the first matrix for all", "x + i1 * x1 + i2 * x2 + i3 * x3\n            first",
         "x + i1 * x1\n            first"),
    ),
)  # fmt: skip

TOP_K = of(
    "top_k", ("top_k",),
    ("a bin too high", "bin_of(table, 1, k) << 21", "bin_of(table, 1, k) + 1 << 21"),
    ("a bin too high in pieces", "bin_of(tables, pieces, k) << 21",
     "bin_of(tables, pieces, k) + 1 << 21"),
    ("counts the first piece only", "tables + piece * TABLE + 4 * bin)", "tables + 4 * bin)"),
    ("the last of equals", "(upper == last and equals > 0)", "(upper == last and equals == 0)"),
    ("one of the equals", "                if upper == last:\n                    equals -= 1",
     "                if upper == last:\n                    equals = 0"),
    ("the upper 22 bits only", "for shift in (21, 10, 0):", "for shift in (21, 10):"),
    ("unsorted", "entries = sort(entries, spare, k, table)", "sort(entries, spare, 1, table)"),
    ("sorted by 22 bits", "for shift in (32, 43, 54):", "for shift in (43, 54):"),
    ("the list of the first piece", "for piece in range(1, pieces):",
     "for piece in range(pieces, pieces):"),
    ("drops the last element of a piece", "(piece + 1) * length)\n", "(piece + 1) * length - 1)\n"),
    ("the first row for all", "i3 * x3\n                count(", "i3 * x3 - i1 * x1\n"
     "                count("),
    ("the first of a few rows for all", "i3 * x3\n            tables", "i3 * x3 - i1 * x1\n"
     "            tables"),
)  # fmt: skip

MOE = (
    *of(
        "moe", ("grouped_topk",),
        ("a group's best expert only", "for i in range(n_top):", "for i in range(1):"),
        ("all groups", "best(y, o0, k, source, n, flags, size)", "best(y, o0, k, source, n, 0, 1)"),
        ("the best group only", "for i in range(used):", "for i in range(1):"),
        ("the first token's experts", "i3 * x3\n            scores", "i3 * x3 - i1 * x1\n"
         "            scores"),
        ("flags of an earlier token", "put_i32(flags + 4 * group, 0)", "pass"),
    ),
    *of(
        "moe", ("add_id",),
        ("the first expert for all", "b + expert * b1", "b"),
        ("an id of 0 is absent", "if expert >= 0:", "if expert > 0:"),
        ("the first token's ids", "ids + slot * i0 + t * i1", "ids + slot * i0"),
        ("a negative id leaves the row", "elif y != source:", "elif y == source:"),
    ),
    *of(
        "moe", ("multi_add",),
        ("the first expert again", "add_rows(y, y, x + t * x2 + slot * x1, n)",
         "add_rows(y, y, x + t * x2, n)"),
        ("the first token for all", "copy(y, x + t * x2, n)", "copy(y, x, n)"),
    ),
    *of(
        "moe", ("mul_multi_add",),
        ("the first expert's weight for all", "weights + t * w2 + slot * w1", "weights + t * w2"),
        ("the first token's weights", "first(y, x + t * x2, weights + t * w2, n)",
         "first(y, x + t * x2, weights, n)"),
    ),
)  # fmt: skip

HYPER_CONNECTIONS = (
    *of(
        "hyper_connections", ("dsv4_hc_comb",),
        ("one iteration fewer", "range(int(n_iter) - 1)", "range(int(n_iter) - 2)"),
        ("sums over targets only", "divide(c, 4, o1, hc, eps)\n            for _",
         "divide(c, o1, 4, hc, eps)\n            for _"),
        ("without eps in the sums", "total += eps", "total += 0.0"),
        ("without eps after the softmax", "f32_at(row + 4 * d) / total + eps)",
         "f32_at(row + 4 * d) / total)"),
        ("the scale of pre", "f32_at(scale + 2 * s0)", "f32_at(scale)"),
        ("the numbers of pre and post", "i = 2 * hc + d + hc * s", "i = d + hc * s"),
        ("targets and sources swapped", "i = 2 * hc + d + hc * s", "i = 2 * hc + s + hc * d"),
        ("the first token for all", "factor * f32_at(x + t * x1 + i * x0)",
         "factor * f32_at(x + i * x0)"),
        ("NaN for a row of -inf", "                    top = 0.0\n", "                    pass\n"),
    ),
    *of(
        "hyper_connections", ("dsv4_hc_maps",),
        ("post as pre", "value = (1 + part) /", "value = 1 /"),
        ("pre without eps", "value + (1 - part) * eps", "value"),
        ("post with eps", "value + (1 - part) * eps", "value + eps"),
        ("the scale of pre for post", "f32_at(scale + part * s0)", "f32_at(scale)"),
        ("the matrix over pre", "c += 2 * o1", "c += 0 * o1"),
    ),
    *of(
        "hyper_connections", ("dsv4_hc_post",),
        ("the matrix transposed", "weights = comb + d * c0 + t * c2",
         "weights = comb + d * c1 + t * c2"),
        ("the first stream only", "for s in range(1, hc):", "for s in range(1, 1):"),
        ("the first stream again", "streams + s * r1, n", "streams, n"),
        ("the first token's streams", "old + t * r2", "old"),
        ("the first token's result", "t * o2, x + t * x1", "t * o2, x"),
        ("the first token's shares", "post + d * p0 + t * p1", "post + d * p0"),
        ("the first token's matrix", "comb + d * c0 + t * c2", "comb + d * c0"),
        ("the first stream without a matrix", "share, streams + d * r1, 1.0",
         "share, streams, 1.0"),
    ),
)  # fmt: skip

MUTANTS = (*ELEMENTWISE, *COPIES, *NORM, *REDUCE, *SORT, *TOP_K, *MOE, *HYPER_CONNECTIONS)
