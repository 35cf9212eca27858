"""Mutants of the cpu backend's products: the source of a module with one place changed.

The modules of `MODULES` are executed again, one of them changed, in place of the right ones. Then
kernels are compiled without the cache of object code, and cases run until one fails. None of the
mutants writes outside the memory of its operands: they run in this process.

    python -m tests.mutants.cpu_products      hunts all of them, in five minutes
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pyggml
from pyggml.ops.rules import Precision
from pyggml.parity.case import Case
from pyggml.parity.cases import cases
from pyggml.parity.running import restored, tested
from tests.cpu import test_cpu_products as products
from tests.mutants.hunt import Fate

PACKAGE = "pyggml.backends"
FOLDER = Path(pyggml.__file__).parent / "backends"
#: In the order in which they import each other.
MODULES = (
    "host_tiles", "cpu.weights.extract", "cpu.weights.repack", "cpu.weights.tiles",
    "cpu.linear.put", "cpu.linear.quantize", "cpu.linear.widen", "cpu.linear.tile",
    "cpu.linear.exact", "cpu.linear.floats", "cpu.linear.inner", "cpu.linear.products",
    "cpu.linear.operands", "cpu.linear.kernels", "cpu.linear.experts",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ProductMutant:
    """A mistake: `old`, which must be once in a module, becomes `new`.

    type   only cases with a tensor of this type
    check  a test that must notice if no case does
    """

    module: str
    op: str
    what: str
    old: str
    new: str
    type: str = ""
    check: Callable[[], None] | None = None


def _of(module: str, *rows: tuple[Any, ...]) -> tuple[ProductMutant, ...]:
    """Rows: op, what, old, new and perhaps a type and a check."""
    return tuple(ProductMutant(module, *row) for row in rows)


def _view(name: str) -> Callable[[], None]:
    return partial(products.test_a_product_of_a_view_of_a_weight, view=name, name="q4_0")


def _bound(name: str, m: int, n: int) -> Callable[[], None]:
    return partial(products.test_a_product_is_within_the_bound_of_quantized_activations, name, m, n)


def _exact(name: str, m: int = 33, n: int = 13) -> Callable[[], None]:
    return partial(products.test_a_product_in_f32_reads_exact_weights, name, m, n)


def _items(shape: str, prec: Precision = "default") -> Callable[[], None]:
    return partial(products.test_every_item_has_its_matrix_and_its_columns, prec, "f32", shape)


def _not_finite() -> None:
    products.test_activations_that_are_not_finite_make_their_column_nan(float("nan"))


def _gated() -> None:
    products.test_every_item_of_a_gated_product_has_its_columns("default")


def _pairs(n_b: int = 3) -> Callable[[], None]:
    return partial(products.test_every_pair_has_its_expert_and_its_row, "q4_0", "default", n_b)


DENSE, UP, IDS, MOE = "mul_mat", "fused_up_gate", "mul_mat_id", "moe_up_gate"

MUTANTS = (
    *_of(
        "host_tiles",
        (DENSE, "q4_0's zero is 7", 'Form("q4_0", (4,), "half", 8)',
         'Form("q4_0", (4,), "half", 7)', "q4_0"),
        (DENSE, "q6_K's zero is 31", '"bytes", 32)', '"bytes", 31)', "q6_K"),
        (DENSE, "iq4_nl's zero is 127", '"half", 128, _IQ4)', '"half", 127, _IQ4)', "iq4_nl"),
        (DENSE, "mxfp4's zero is 11", '"bf16", 12,', '"bf16", 11,', "mxfp4"),
        (DENSE, "tiles without the last rows' own", "-(-ne[1] // ROWS), prod",
         "max(1, ne[1] // ROWS), prod", "q4_0", _bound("q4_0", 37, 4)),
    ),
    *_of(
        "cpu.weights.extract",
        (DENSE, "the first two scales' high bits in q3_K", "(number // 4 * 2) & 3", "0 & 3",
         "q3_K"),
        (DENSE, "q5_K's bit of the next group", "block + 16 + i) >> group & 1",
         "block + 16 + i) >> (group ^ 1) & 1", "q5_K"),
        (DENSE, "q6_K's halves swapped", "half, part = group // 4, group % 4",
         "half, part = 1 - group // 4, group % 4", "q6_K"),
        (DENSE, "iq4_xs's high bits of group 0", ">> (2 * group) & 3", "& 3", "iq4_xs"),
    ),
    *_of(
        "cpu.weights.repack",
        (DENSE, "the first matrix's rows", "(matrix * m + first + row)", "(first + row)", "q4_0",
         _view("heads in two dimensions")),
        (DENSE, "the last row of a tile is dropped", "for row in range(min(ROWS, m - first))",
         "for row in range(min(ROWS, m - first) - 1)", "q4_0"),
        (DENSE, "factors of the first 256 weights", "if inside == 0:", "if group == 0:", "q6_K",
         _bound("q6_K", 37, 4)),
        (DENSE, "no minimum", "put_i16(at + 32 + 2 * row, i64_at(head + 8))",
         "put_i16(at + 32 + 2 * row, 0)", "q4_1"),
    ),
    *_of(
        "cpu.weights.tiles",
        (DENSE, "views begin at the first tile",
         "offset = first // m * per_matrix + first % m // ROWS * tiles.tile", "offset = 0",
         "q4_0", _view("the last rows of heads")),
        (DENSE, "views begin in the first matrix", "offset = first // m * per_matrix +",
         "offset = 0 +", "q4_0", _view("rows of the last head")),
        (DENSE, "any start of a view", "if first % m % ROWS or any", "if any", "q4_0",
         _view("rows from the middle of a tile")),
        (DENSE, "any step of a view", "or any(step % m for step in steps)", "", "q4_0",
         _view("matrices that begin in a tile")),
        (DENSE, "a view over the end of a matrix", "elif first % m + node.ne[1] > m:",
         "elif first % m + node.ne[1] > 2 * m:", "q4_0",
         _view("tiles that end in another matrix")),
        (DENSE, "rows apart as if adjacent", "or (node.ne[1] > 1 and node.nb[1] != row)", "",
         "q4_0", _view("every other row")),
        (DENSE, "parts of rows as whole ones", "if node.ne[0] != k or", "if", "q4_0",
         _view("half of each row")),
        (DENSE, "the output of a view in tiles", "return all(shown.values())", "return True",
         "q4_0", products.test_a_view_of_a_weight_that_is_an_output_keeps_the_file_layout),
        (DENSE, "tiles for all readers", "elif not names or not names <= set(use.op.weights):",
         "elif not names:", "q4_0",
         products.test_a_weight_that_other_ops_read_stays_as_in_the_file),
    ),
    *_of(
        "cpu.linear.put",
        (DENSE, "15 of 16 rows", "e.store_first(value, out, count)",
         "e.store_first(value, out, e.add(count, -1))"),
        (UP, "the activation of up", "e.load(FLOATS, gate), e.load(FLOATS, up)",
         "e.load(FLOATS, up), e.load(FLOATS, gate)"),
        (IDS, "ones for a negative id", "row.store(e.zero(FLOATS), out, offset)",
         "row.store(e.constant(FLOATS, 1.0), out, offset)"),
    ),
    *_of(
        "cpu.linear.quantize",
        (DENSE, "no infinities", "d = e.b.fadd(e.b.fmul(largest, e.number(1 / 127)), unusual)",
         "d = e.b.fmul(largest, e.number(1 / 127))", "q4_0",
         _not_finite),
        (DENSE, "rounds toward zero", "e.nearest(e.b.fmul(v, e.splat(inverse)))",
         "e.b.fmul(v, e.splat(inverse))", "q4_0", _bound("q8_0", 33, 11)),
        (DENSE, "the first half's sum for both", "e.store(sums[1], out, X_SUM_HIGH)",
         "e.store(sums[0], out, X_SUM_HIGH)", "q6_K"),
        (DENSE, "the first sequence", "outer // n2 * nb3 + group", "0 + group", "q4_0",
         _items("heads")),
        (DENSE, "the first item of the third axis", "outer % n2 * nb2", "0", "q4_0",
         _items("heads")),
    ),
    *_of(
        "cpu.linear.widen",
        (DENSE, "without what is past whole vectors", 'e.b.icmp_signed(">", rest, e.integer(0))',
         'e.b.icmp_signed(">", rest, e.integer(16))', "f16",
         partial(products.test_products_of_floats, "f32", "f16", False, 37, 3, 33)),
        (DENSE, "strided items from the first",
         "        source = x + outer % n2 * nb2 + outer // n2 * nb3\n            for i",
         "        source = x\n            for i", "f16"),
    ),
    *_of(
        "cpu.linear.tile",
        (DENSE, "one scale for both halves", "e.fma(parts[1][c], factors[1],",
         "e.fma(parts[1][c], factors[0],", "q6_K"),
        (DENSE, "one minimum for both halves", "(X_SUM, X_SUM_HIGH)[half]), f32)",
         "(X_SUM, X_SUM)[half]), f32)", "q2_K"),
        (DENSE, "without zero in the second half",
         "count = e.load(i32, x, (X_SUM, X_SUM_HIGH)[half])",
         "count = e.load(i32, x, (X_SUM, X_SUM)[half])", "q3_K"),
        (DENSE, "the first 256 weights' factors", "eighth = e.b.lshr(number, e.integer(3))",
         "eighth = e.b.lshr(number, e.integer(4))", "q4_K", _bound("q4_K", 37, 4)),
        (DENSE, "the minimum is added", "m = e.b.fneg(e.floats(e.load(HALVES, supers, 32)))",
         "m = e.floats(e.load(HALVES, supers, 32))", "q4_K"),
    ),
    *_of(
        "cpu.linear.exact",
        (DENSE, "without zero", "e.constant(BYTES, form.zero))", "e.constant(BYTES, 0))", "q4_0",
         _exact("q4_0")),
        (DENSE, "codes without sign", "e.b.ashr(high,", "e.b.lshr(high,", "q4_0", _exact("q4_0")),
        (DENSE, "the first half's scale for all", "half = j // 4 if len(factors) > 1 else 0",
         "half = 0", "q6_K", _exact("q6_K")),
        (DENSE, "three of four sums", "[part.get() for part in parts]",
         "[part.get() for part in parts[-3:]]", "q4_0",
         _exact("q4_0", 16, 1)),
        (DENSE, "the number before", "e.load(f32, x, 4 * k)", "e.load(f32, x, 4 * max(k - 1, 0))",
         "q4_0", _exact("q4_0")),
        (DENSE, "no minimum", "yield e.fma(code, factors[half], minima[half])",
         "yield e.b.fmul(code, factors[half])", "q4_1", _exact("q4_1")),
    ),
    *_of(
        "cpu.linear.floats",
        (DENSE, "without what is past whole vectors", 'e.b.icmp_signed(">", rest, e.integer(0))',
         'e.b.icmp_signed(">", rest, e.integer(16))', "",
         partial(products.test_products_of_floats, "f32", "f32", False, 37, 3, 33)),
        (DENSE, "the row before past the first of four",
         "addresses.append(e.b.select(there, e.add(before, stride), before))",
         "addresses.append(before)"),
        (DENSE, "columns without what is past whole turns", "add(e.add(done, number), 0, left)",
         "add(done, 0, left)", "",
         partial(products.test_products_of_floats, "f16", "f32", True, 16, 1, 39)),
        (DENSE, "the first sum of columns", "total = e.b.fadd(total, part.get())",
         "total = e.b.fadd(total, e.zero(FLOATS))", "",
         partial(products.test_products_of_floats, "f16", "f32", True, 16, 1, 40)),
    ),
    *_of(
        "cpu.linear.inner",
        (DENSE, "5 columns by the loop of 4", "if n > 4:", "if n > 5:", "q4_0"),
        (DENSE, "2 columns by the loop of 1", "elif n > 1:", "elif n > 2:", "q4_0",
         _bound("q4_0", 16, 2)),
        (DENSE, "the first 4 columns again", "xs + 8 * c, sums + 64 * c", "xs, sums + 64 * c",
         "f32"),
    ),
    *_of(
        "cpu.linear.products",
        (DENSE, "the first matrix for all", "matrix = weights + i2 // r2 * w2 +",
         "matrix = weights +", "q4_0", _items("heads")),
        (DENSE, "the first sequence's matrix", "+ i3 // r3 * w3", "", "q4_0", _items("heads")),
        (DENSE, "matrix i2 % r2", "i2 // r2 * w2", "i2 % r2 * 0", "f32", _items("heads")),
        (DENSE, "the first item's columns", "columns, target = x + i2 * x2 + i3 * x3",
         "columns, target = x + i3 * x3", "q4_0", _items("heads")),
        (DENSE, "the first sequence's columns", "columns, target = x + i2 * x2 + i3 * x3",
         "columns, target = x + i2 * x2", "q4_0", _items("heads")),
        (DENSE, "the first column of eight", "columns + (j + min(c, several - 1)) * x1",
         "columns + j * x1", "q4_0", _items("heads")),
        (DENSE, "8 columns of 9", "per_item = (tiles + share - 1) // share * blocks",
         "per_item = (tiles + share - 1) // share * max(1, blocks - 1)", "",
         products.test_more_columns_than_a_block),
        (UP, "the gate is up", "multiply_gate(g, gate_k,", "multiply_gate(u, gate_k,", "",
         _gated),
        (UP, "the first column of eight", "x + (j + min(c, several - 1)) * x1", "x + j * x1", "",
         _gated),
    ),
    *_of(
        "cpu.linear.operands",
        (DENSE, "f32 by integers", 'node.attrs["prec"] == "default"', 'node.attrs["prec"] != ""',
         "q4_0",
         _exact("q4_0")),
        (DENSE, "row after row where matrices repeat", "row * b.ne[1], row * b.ne[1] * b.ne[2]",
         "row * b.ne[1], row * b.ne[1]", "q4_0", _items("heads")),
    ),
    *_of(
        "cpu.linear.kernels",
        (DENSE, "any items as columns", "n == 1 or (x.nb2 == n * x1 and out.nb[2] == n * y1)",
         "True", "q4_0", _items("shared in one", "f32")),
        (DENSE, "heads share by b's number", "max(1, n2 // a.ne[2])", "max(1, n2)", "q4_0",
         _items("heads")),
        (UP, "the first item", "x.ptr + i2 * x.nb2 + i3 * x.nb3", "x.ptr + i3 * x.nb3", "",
         _gated),
        (UP, "the first sequence", "x.ptr + i2 * x.nb2 + i3 * x.nb3", "x.ptr + i2 * x.nb2", "",
         _gated),
    ),
    *_of(
        "cpu.linear.experts",
        (IDS, "the first row of each token", "pair // n_used * x2 + pair % n_used % n_b * x1",
         "pair // n_used * x2", "", _pairs()),
        (IDS, "slot s reads row s / n_b", "pair % n_used % n_b * x1",
         "pair % n_used * n_b // n_used * x1", "", _pairs()),
        (IDS, "the first token", "pair // n_used * x2 +", "0 * x2 +", "", _pairs()),
        (IDS, "the first expert", "expert * up_matrix", "0 * up_matrix", "", _pairs()),
        (MOE, "the first expert's gate", "expert * gate_matrix", "0 * gate_matrix", "", _pairs()),
        (IDS, "the first of eight pairs", "pairs + 8 * (j + min(c, several - 1))",
         "pairs + 8 * j", "", _pairs()),
        (IDS, "leaves rows of negative ids",
         "(ids + pair % n_used * i0 + pair // n_used * i1) < 0:\n                put",
         "(ids + pair % n_used * i0 + pair // n_used * i1) < -1:\n                put", "",
         _pairs()),
        (MOE, "the gate is up", "multiply_gate(g, gate_k,", "multiply_gate(u, gate_k,", "",
         _pairs()),
    ),
)  # fmt: skip


def changed(mutant: ProductMutant) -> str:
    """The source with the mistake; ValueError if the place is not there, or more than once."""
    source = (FOLDER / f"{mutant.module.replace('.', '/')}.py").read_text()
    if source.count(mutant.old) != 1:
        count = source.count(mutant.old)
        raise ValueError(f"{mutant.module} has {count} times {mutant.old!r}")
    return source.replace(mutant.old, mutant.new)


@contextmanager
def installed(mutant: ProductMutant) -> Iterator[None]:
    """Inside the context, the kernels of `MODULES` are those of the changed source."""
    package, wrong = importlib.import_module(PACKAGE), changed(mutant)
    names = [f"{PACKAGE}.{name}" for name in MODULES]
    before = {name: importlib.import_module(name) for name in names}
    backend = importlib.import_module(f"{PACKAGE}.cpu.backend")
    with (
        restored("cpu"),
        patch(f"{PACKAGE}.cpu.native.objects.read", lambda key: None),
        patch(f"{PACKAGE}.cpu.native.objects.write", lambda key, code: None),
    ):
        try:
            for name in MODULES:
                source = (FOLDER / f"{name.replace('.', '/')}.py").read_text()
                _put(name, _executed(name, wrong if name == mutant.module else source))
            with patch.object(backend, "tiles", sys.modules[f"{PACKAGE}.cpu.weights.tiles"]):
                yield
        finally:
            for name, module in before.items():
                _put(name.removeprefix(f"{package.__name__}."), module)


def _put(name: str, module: ModuleType) -> None:
    parent, _, last = f"{PACKAGE}.{name}".rpartition(".")
    sys.modules[f"{PACKAGE}.{name}"] = module
    setattr(sys.modules[parent], last, module)


def _executed(name: str, source: str) -> ModuleType:
    path = FOLDER / f"{name.replace('.', '/')}.py"
    module = ModuleType(f"{PACKAGE}.{name}")
    module.__file__, module.__package__ = str(path), f"{PACKAGE}.{name}".rpartition(".")[0]
    before = sys.modules[module.__name__]
    sys.modules[module.__name__] = module  # a dataclass looks for its module
    try:
        exec(compile(source, str(path), "exec"), module.__dict__)
    finally:
        sys.modules[module.__name__] = before
    return module


def cases_of(mutant: ProductMutant) -> list[Case]:
    """The cases of the small grid that may notice, those with fewer types first."""

    def types(case: Case) -> list[str]:
        return sorted({source.type for source in case.sources if source is not None})

    own = (case for case in cases() if case.op == mutant.op)
    few = [case for case in own if not mutant.type or mutant.type in types(case)]
    return sorted(
        few, key=lambda case: (not set(types(case)) <= {"f32", "i32", mutant.type}, types(case))
    )


def hunt(mutants: Iterable[ProductMutant] = MUTANTS) -> Iterator[Fate]:
    """Run each mutant until one of its cases, or its check, fails."""
    for mutant in mutants:
        with installed(mutant):
            killed, why = _killed(mutant)
        yield Fate(mutant.module, mutant.what, killed, why)


def _killed(mutant: ProductMutant) -> tuple[str, str]:
    """The case or check that failed, and why; empty if none did."""
    if mutant.check is not None:  # the quickest
        try:
            mutant.check()
        except AssertionError as error:
            return getattr(mutant.check, "func", mutant.check).__name__, str(error)
    for case in cases_of(mutant):
        outcome = tested(case, "cpu")
        if outcome.status == "fail":
            return outcome.case, outcome.why
    return "", ""


def main() -> None:
    alive = 0
    chosen = [m for m in MUTANTS if not sys.argv[1:] or m.module in sys.argv[1:]]
    for fate in hunt(chosen):
        alive += not fate.killed
        print(f"{fate.op}: {fate.what}: {fate.killed or 'ALIVE'}", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} killed")


if __name__ == "__main__":
    main()
