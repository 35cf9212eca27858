"""Random cases of every op of the oracle: sizes, types, layouts, values and attributes.

Sizes differ from the grid's: odd, 1, on either side of a tile. Sources hold NaN and infinity where
these must not reach the result (keys that a mask or kv_len hides, experts that no token uses), and
where their effect is defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from random import Random

from pyggml.errors import PyggmlError
from pyggml.parity import fuzz_products as products
from pyggml.parity.case import Case, build
from pyggml.parity.cases import LEGACY, composes
from pyggml.parity.fuzz_draw import BLOCKS, PLAIN, Draw
from pyggml.parity.oracle import ORACLE

ANY = (*PLAIN, *BLOCKS)
#: Block types that backends write.
ENCODED = tuple(LEGACY.split("|"))


# -- elementwise ops and copies ---------------------------------------------------------------


def _binary(d: Draw) -> Case:
    op = d.pick(("add", "sub", "mul", "div", "add_mask"))
    dtype = d.pick(("f32", "f32", "f16"))
    fill = d.special()
    if op == "add" and d.chance(0.2):
        dtype, fill = d.pick(("i32", "i64")), "<1000-"
    ne = d.ne()
    second = [n if d.chance(0.5) else d.divisor(n) for n in ne]
    other = {"div": "~above", "add_mask": d.pick(("~mask", "~wild"))}.get(op, fill)
    return d.case(op, d.source(dtype, ne, fill), d.source(dtype, second, other))


def _unary(d: Draw) -> Case:
    dtype, ne = d.pick(("f32", "f16")), d.ne()
    names = ("exp", "sqr", "tanh", "relu", "sigmoid", "silu", "gelu", "log", "sqrt", "softplus")
    op = d.pick(names)
    fill = "~above" if op in ("log", "sqrt") else d.special()
    if dtype == "f32" and op not in ("silu", "gelu"):
        fill = "~wild" if d.chance(0.2) else fill
    return d.case(op, d.source(dtype, ne, fill))


def _simple(d: Draw) -> Case:
    a = d.source(d.pick(("f32", "f16")), d.ne(), d.special())
    which = d.rng.randrange(3)
    if which == 0:
        return d.case("scale", a, s=d.number(), b=d.number())
    if which == 1:
        return d.case("fill", replace(a, fill="~wild"), value=d.number())
    low, high = sorted((d.number(), d.number()))
    low, high = d.pick(((low, high), (float("-inf"), high), (low, float("inf"))))
    return d.case("clamp", a, min=low, max=high)


def _glu(d: Draw) -> Case:
    dtype, ne = d.pick(("f32", "f16")), d.ne()
    act: dict[str, object] = {"act": d.pick(("silu", "gelu", "relu")), **products.limit(d)}
    if d.chance(0.5):
        return d.case("glu", d.source(dtype, ne, d.special()), d.source(dtype, ne), **act)
    a = d.source(dtype, (2 * ne[0], *ne[1:]))
    return d.case("glu", a, **act, swapped=d.chance(0.5))


def _add_id(d: Draw) -> Case:
    n, used, tokens, experts = d.size(300), d.size(9), d.size(17), d.size(33)
    a, b = d.source("f32", (n, used, tokens)), d.source("f32", (n, experts))
    return d.case("add_id", a, b, d.ids((used, tokens), experts))


def _copied(d: Draw) -> Case:
    dtype = d.pick((*PLAIN, *PLAIN, "i32", d.pick(BLOCKS)))
    ne = d.ne(d.row(dtype))
    fill = "<999-" if dtype == "i32" else d.special() if dtype in PLAIN else ""
    a = d.source(dtype, ne, fill)
    which = d.rng.randrange(5)
    if which == 0:
        return d.case("cont", a)
    if which == 1:
        dim = d.rng.randrange(4)
        other = [*ne, 1, 1, 1][:4]
        if d.chance(0.7):
            other[dim] = d.row(dtype) if dim == 0 else d.size(9)
        return d.case("concat", a, replace(d.source(dtype, other), fill=fill), dim=dim)
    if which == 2 and dtype in (*PLAIN, "i32"):
        times = [d.pick((1, 1, 2, 3)) for _ in ne]
        return d.case("repeat", a, ne=tuple(n * k for n, k in zip(ne, times)))
    if which == 3:
        a = replace(a, layout="")
        flat = prod(ne[1:])
        return d.case("reshape", a, ne=(ne[0], flat))
    encoded = ne[0] % 32 == 0 and dtype in (*PLAIN, *ENCODED) and not fill
    target = d.pick((*PLAIN, *ENCODED) if encoded else PLAIN)
    if dtype == "i32":
        target = d.pick(("i32", "i64", "f32"))
    return d.case("cast", replace(a, fill="<99-" if dtype == "i32" else ""), dtype=target)


def _get_rows(d: Draw) -> Case:
    dtype = d.pick((*ANY, "i32"))
    n, rows, outer = d.row(dtype), d.size(40), d.ne(d.size(4), 8, 2)
    fill = "<99-" if dtype == "i32" else d.pick(("", "", "~nan3")) if dtype in PLAIN else ""
    a = d.source(dtype, (n, rows, *outer), fill)
    return d.case("get_rows", a, d.ids((d.size(17), *outer), rows))


def _set_rows(d: Draw) -> Case:
    dtype = d.pick((*PLAIN, *ENCODED, "i32"))
    n, rows, ne2, ne3 = d.row(dtype), d.size(40), d.size(4), d.size(3)
    count = d.rng.randint(1, rows)
    source = dtype if dtype == "i32" and d.chance(0.7) else d.pick(("f32", "f16"))
    fill = "<99-" if source == "i32" else "~ties" if dtype == "i32" else ""
    if dtype == "f32" and source == "f32":
        fill = d.special()
    a = d.state(dtype, (n, rows, ne2, ne3), "<99" if dtype == "i32" else "")
    ids = d.source(d.pick(("i32", "i64")), (count, d.divisor(ne2), d.divisor(ne3)), f"!{rows}")
    ids = replace(ids, fill=ids.fill + "-" * d.chance(0.5))
    return d.case("set_rows", a, d.source(source, (n, count, ne2, ne3), fill), ids)


def _cpy(d: Draw) -> Case:
    """Rows of one length into rows of another; sometimes more than a kernel's buffer holds."""
    a_type, b_type = d.pick(PLAIN), d.pick(PLAIN)
    if d.chance(0.25):
        a_type, b_type = d.pick((*PLAIN, *ENCODED)), d.pick((*PLAIN, *ENCODED))
        row = max(32, d.row(a_type))
        row -= row % 32
        ne = (row, d.size(9))
        return d.case("cpy", d.source(a_type, ne), d.state(b_type, (row, 1, ne[1])))
    if d.chance(0.2):
        a_type, b_type = d.pick((("f16", "bf16"), ("bf16", "f16"), (a_type, b_type)))
        row, rows = d.rng.randint(1000, 2500), d.rng.randint(40, 60)
        flat = (row * rows,)
        pair = [(row, rows), flat] if d.chance(0.7) else [flat, (row, rows)]
        plain = [replace(d.state(t, ne), layout="") for t, ne in zip((a_type, b_type), pair)]
        return d.case("cpy", *plain)
    sizes = d.ne()
    other = list(sizes)
    d.rng.shuffle(other)
    if d.chance(0.3):
        other = [prod(sizes)]
    return d.case("cpy", d.source(a_type, sizes), d.state(b_type, other))


# -- rows ------------------------------------------------------------------------------------


def _rows(d: Draw) -> Case:
    op = d.pick(("sum_rows", "norm", "rms_norm", "argsort", "top_k", "argmax"))
    ne = d.ne(d.size(2100), 9000)
    if op == "top_k" and d.chance(0.15):  # rows that threads share
        ne = (d.rng.randint(15000, 60000), d.pick((1, 1, 3, 5)))
    ordered = op in ("argsort", "top_k", "argmax")
    fill = d.pick(("", "~ties", "~nan", "~wild")) if ordered else d.special()
    a = d.source("f32", ne, fill)
    if op == "norm" and d.chance(0.3):
        return d.case(op, replace(a, fill="~level"), eps=d.pick((0.0, 1e-6)))
    if op in ("norm", "rms_norm"):
        return d.case(op, a, eps=d.pick((1e-6, 1e-5, 0.1, 10.0)))
    if op == "argsort":
        return d.case(op, a, order=d.pick(("asc", "desc")))
    if op == "top_k":
        return d.case(op, a, k=d.rng.randint(1, min(ne[0], d.pick((40, 40, 9000)))))
    return d.case(op, a)


def _soft_max(d: Draw) -> Case:
    n_kv, n_q, heads, n3 = d.size(1100), d.size(12), d.size(12), d.size(3)
    a = d.source("f32", (n_kv, n_q, heads, n3), d.special(0.1))
    ne = (n_kv, n_q + d.pick((0, 0, 3)), d.divisor(heads), d.divisor(n3))
    fill = d.pick(("~mask", "~causal", "~blocks", f"~upto{d.rng.randint(1, n_kv)}"))
    mask = d.maybe(d.source(d.pick(("f16", "f32")), ne, fill, rows=True))
    sinks = d.maybe(d.source("f32", (heads,)), 0.3)
    attrs = products.slopes(d, heads) if mask is not None else {}
    return d.case("soft_max_ext", a, mask, sinks, scale=d.number(), **attrs)


def _rope(d: Draw) -> Case:
    n = 2 * d.size(100)
    turned = 2 * d.rng.randint(1, n // 2)
    offset = 2 * d.rng.randint(0, (n - turned) // 2)
    tokens = d.size(33)
    a = d.source(d.pick(("f32", "f16")), (n, d.size(9), tokens, d.size(3)), d.special(0.05))
    far = d.pick((2, 60, 600, 6000))
    fill = d.pick(("~above", "~one")) if far < 100 else "~one"  # larger angles are beyond f32
    factors = d.source("f32", (turned // 2 + d.pick((0, 0, 3)),), fill)
    attrs: dict[str, object] = {"n_dims": turned, "mode": d.pick(("normal", "neox"))}
    if d.chance(0.5):
        attrs |= {"offset": offset, "freq_base": d.pick((10000.0, 500000.0, 1000.0))}
    if d.chance(0.3):
        attrs |= {"freq_scale": d.pick((0.25, 1.4)), "attn_factor": d.pick((0.7, 1.3))}
    if d.chance(0.25):
        attrs |= {"ext_factor": d.pick((1.0, 0.75)), "n_ctx_orig": d.pick((100, 4096))}
        attrs |= {"freq_scale": d.pick((0.025, 0.25, 1.4)), "beta_fast": d.pick((32.0, 8.0))}
    if d.chance(0.3):
        attrs |= {"back": True}
    return d.case("rope_ext", a, d.ids((tokens,), far), d.maybe(factors, 0.6), **attrs)


def _collective(d: Draw) -> Case:
    op = d.pick(("all_reduce", "all_reduce", "all_gather", "reduce_scatter", "broadcast"))
    count, rank = d.rng.randint(1, 8), d.rng.randrange(4)
    dim = d.rng.randrange(4)
    if op == "broadcast":
        dtype = d.pick(ANY)
        return d.case(op, d.source(dtype, d.ne(d.row(dtype))), rank=rank)
    if op == "all_gather":
        dtype = d.pick(ANY)
        ne = [*d.ne(d.row(dtype), 2000), 1, 1, 1][:4]
        sizes = [d.row(dtype, 64) if dim == 0 else d.size(9) for _ in range(count)]
        parts = [d.source(dtype, [*ne[:dim], n, *ne[dim + 1 :]]) for n in sizes]
        return d.case(op, *parts, dim=dim, rank=rank)
    dtype = d.pick(("f32", "f32", "f16"))
    if op == "all_reduce" and d.chance(0.3):
        rows = (1 + d.size(80), d.size(9), d.size(9))
        return d.case(op, *(d.source("f32", rows) for _ in range(count)), op="lse", rank=rank)
    ne = [*d.ne(most=3000), 1, 1, 1][:4]
    if op == "all_reduce":
        return d.case(op, *(d.source(dtype, ne) for _ in range(count)), rank=rank)
    pieces = tuple(d.size(9) for _ in range(count))
    ne[dim] = sum(pieces)
    parts = [d.source(dtype, ne) for _ in range(count)]
    return d.case(op, *parts, dim=dim, sizes=pieces, rank=rank % count)


#: Generators and their weights.
MAKERS: Sequence[tuple[Callable[[Draw], Case], int]] = (
    (_binary, 6), (_unary, 5), (_simple, 3), (_glu, 3), (_add_id, 2), (_copied, 8), (_get_rows, 4),
    (_set_rows, 5), (_cpy, 5), (_rows, 6), (_soft_max, 5), (_rope, 9), (products.mul_mat, 8),
    (products.mul_mat_id, 5), (products.moe_up_gate, 4), (products.fused_up_gate, 3),
    (products.routing, 2), (products.sums, 2), (products.attention, 14), (products.indexer, 5),
    (products.masks, 3), (products.hyper_connections, 3), (_collective, 5),
)  # fmt: skip
#: Every op that a generator draws.
OPS = frozenset(ORACLE) - {"view", "permute", "transpose", "soft_max"}


def random_case(seed: int, number: int, ops: frozenset[str] = OPS) -> Case:
    """Case `number` of a seed's sequence, of one of `ops`."""
    draw = Draw(Random(f"{seed}:{number}"))
    makers, weights = zip(*MAKERS)
    while True:
        case: Case = draw.rng.choices(makers, weights)[0](draw)
        if case.op not in ops:
            continue
        try:
            if draw.chance(0.2) and composes(case):
                case = replace(case, means=True)
            build(case, values=False)
        except PyggmlError:
            continue  # the op's rule refuses the layout
        except Exception:
            return case  # the run reports it
        return case
