"""The grids: number and kinds of cases, their graphs, and their bounds."""

from __future__ import annotations

import pytest

from pyggml import ops
from pyggml.backends import get
from pyggml.backends.numpy.table import KERNELS
from pyggml.backends.step import WeightLayout
from pyggml.graph import Graph
from pyggml.node import Node
from pyggml.ops.leaf import constant_op
from pyggml.parity.case import Case, build
from pyggml.parity.cases import BLOCKS, PLAIN, cases, composes, has_meaning
from pyggml.parity.check import check, numeric_class
from pyggml.parity.grid import all_cases, perf_cases
from pyggml.parity.guarded import Bed, results
from pyggml.parity.running import Outcome
from pyggml.parity.support import table
from pyggml.parity.tolerance import STORAGE
from pyggml.quants import ENCODABLE


def test_the_large_grid_is_large() -> None:
    grid = all_cases()
    assert len(grid) >= 15_000 and len({case.kind for case in grid}) >= 1_500
    assert set(map(str, cases())) <= set(map(str, grid))
    assert len({str(case) for case in grid}) == len(grid)
    public = {name for name in ops.ALL if name in ops.BUILDERS}  # others are made by loops only
    meant = {name for name in public if ops.ALL[name].meaning is not None}  # in simpler ops
    kernels = {op.name for op in KERNELS}
    assert {case.op for case in grid} == {case.op for case in cases()}
    assert {case.op for case in grid} >= public - (meant - kernels) - {"state_of"}


def test_every_meaning_is_compared_with_the_oracle_too() -> None:
    def fused(grid: tuple[Case, ...]) -> list[tuple[str, ...]]:
        return sorted((c.op, *map(str, c.sources)) for c in grid if c.means or composes(c))

    for grid in (cases(), all_cases()):
        means = tuple(case for case in grid if case.means)
        all_ops = {c.op for c in grid}
        assert {c.op for c in means} == {op for op in all_ops if has_meaning(op)} >= {"glu"}
        assert fused(means) == fused(tuple(case for case in grid if not case.means))
    case = Case.parse("glu.means(f32[26,7]@wide, act='gelu')")
    nodes = Bed(get("numpy"), build(case).node, build(case).inputs).work.graph.nodes
    assert case.op == "glu" and {node.op for node in nodes} >= {ops.gelu, ops.mul}
    assert ops.glu not in {node.op for node in nodes}


def test_weights_of_every_type_are_constants() -> None:
    types = {*PLAIN.split("|"), *BLOCKS.split("|")}
    for op in ("mul_mat", "mul_mat_id", "moe_up_gate", "fused_up_gate", "get_rows"):
        firsts = [case.sources[0] for case in all_cases() if case.op == op and case.sources[0]]
        for part in (False, True):
            weights = {s.type for s in firsts if s.weight and bool(s.layout) == part}
            assert weights == types, (op, part)
    case = Case.parse("mul_mat(q8_0[64,7]@weight@inner, f32[64,3])")
    (leaf,) = [n for n in Graph({"y": build(case).node}).nodes if n.op is constant_op]
    assert leaf.ne == (160, 10, 3, 2) and case.vars.startswith("type_a=q8_0,ne_a=[64,7]")
    assert "layout_a=weight@inner," in case.vars and "weight" not in build(case).inputs
    assert list(build(case).inputs) == ["s1"]


def test_a_weight_is_stored_in_the_layout_that_the_backend_chose() -> None:
    """Each weight is made once, in the layout for its uses, and read in that layout."""
    device, layouts = get("null"), []

    class Recorder:
        def __getattr__(self, name: str) -> object:
            return getattr(device, name)

        def weight(self, constant: Node, layout: WeightLayout, data: object) -> object:
            layouts.append(layout.name)
            return device.weight(constant, layout, data)  # type: ignore[arg-type]

    for place, private in (("", True), ("@wide", False)):
        case = Case.parse(f"mul_mat(q8_0[64,7]@weight{place}, f32[64,3])")
        graph = build(case)
        assert [values for _, values in results(Recorder(), graph.node, graph.inputs)]  # type: ignore[arg-type]
        assert [name != "plain" for name in layouts] == [private]
        layouts.clear()


def test_far_rows_have_offsets_beyond_32_bits() -> None:
    case = Case.parse("cont(f16[64,5,3]@far)")
    (leaf,) = [n for n in Graph({"y": build(case).node}).nodes if n.op.leaf]
    view = build(case).node.src[0]
    assert view is not None and 2 * view.nb[2] > 2**31 and leaf.spec.nbytes > 2**31
    assert sum("@far" in str(case) for case in cases()) > 50
    assert check(case)


def test_encodable_types_are_all_written() -> None:
    types = {case.sources[0].type for case in cases() if case.op == "set_rows" and case.sources[0]}
    assert types | {str(c.attrs["dtype"]) for c in cases() if c.op == "cast"} >= ENCODABLE


def test_cases_of_the_large_grid_are_their_text_and_can_be_built() -> None:
    for case in (*all_cases()[::7], *perf_cases()):
        assert str(Case.parse(str(case))) == str(case)
        assert build(case, values=False).node.ne


# -- bounds and the table of ops ------------------------------------------------------------------


class Narrow:
    """A backend that declares one numeric class for every node."""

    def __init__(self, numeric: str) -> None:
        self.declared = numeric

    def numeric(self, node: object) -> str:
        return self.declared


def test_bounds_follow_what_the_backend_declares() -> None:
    case, exact = (Case.parse(f"mul_mat(q8_0[32,2], f32[32,3]{p})") for p in ("", ", prec='f32'"))
    node, strict = build(case).node, build(exact).node
    assert case.bound(node, numeric_class(get("numpy"), node)) == 1e-10
    assert case.bound(node, numeric_class(Narrow("quantized"), node)) == 5e-4  # type: ignore[arg-type]
    assert case.bound(strict, numeric_class(Narrow("quantized"), strict)) == 1e-10  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "numeric", "bound"),
    [
        ("mul_mat(q8_0[32,2], f32[32,3])", "quantized", 5e-4),
        ("mul_mat(bf16[32,2], f32[32,3])", "bf16", 5e-5),
        ("soft_max_ext(f32[32,2])", "f16", 1e-6),
        ("soft_max_ext(f32[32,2])", "quantized", 1e-6),
        ("rms_norm(f32[32,2], eps=1e-06)", "bf16", 1e-7),
        ("add(f32[32,2], f32[32])", "f16", 1e-7),
        ("add(f16[32,2], f16[32])", "f16", 1e-6),  # the result's own rounding
        ("get_rows(q8_0[32,2], i32[3]<2)", "quantized", 0.0),
        ("argsort(f32[32,2])", "f16", 0.0),
    ],
)
def test_no_declaration_raises_a_bound_above_the_limit(
    text: str, numeric: str, bound: float
) -> None:
    case = Case.parse(text)
    node = build(case).node
    assert case.bound(node, numeric_class(Narrow(numeric), node)) == bound  # type: ignore[arg-type]
    assert case.bound(node, numeric, "f32") == bound


def test_a_write_is_rounded_to_its_states_type() -> None:
    """Exactly to f16 and bf16; only block types have a bound."""
    for text, bound in (
        ("cpy(f32[64,6], bf16[64,6])", 0.0),
        ("set_rows(f16[64,8], f32[64,3], i32[3]!8)", 0.0),
        ("set_rows(q8_0[64,8], f32[64,3], i32[3]!8)", STORAGE["q8_0"]),
    ):
        result = check(Case.parse(text))
        assert result and result.bound == bound


def test_the_table_has_a_column_for_each_backend() -> None:
    def outcome(backend: str, case: Case) -> Outcome:
        if case.means:
            return Outcome(str(case), "unsupported", "no mul")  # left out: mul has a row
        unsupported = backend == "b" and "f16" in str(case)
        return Outcome(str(case), *(("unsupported", "no f16") if unsupported else ("ok",)))

    selection = [case for case in cases() if case.op in ("glu", "add", "argmax")]
    columns = {name: [outcome(name, case) for case in selection] for name in ("a", "b")}
    rows = table(selection, columns).splitlines()
    assert "| op | a | b |" in rows and "| --- | --- | --- |" in rows
    assert "| `glu`* | a: f32 f16; b: f32 f16 | a: f32; b: f32 |" in rows
    assert "| `argmax` | a: f32 | a: f32 |" in rows
    assert "## Refused by b" in rows and "- no f16" in rows
    assert "## Refused by a" not in rows and "- no mul" not in rows
