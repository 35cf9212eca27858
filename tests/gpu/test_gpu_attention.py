"""flash_attn_ext on a GPU with every kernel, also where another would be chosen; related ops.

Results and scratch are poisoned, the memory around them is checked, and two runs must give the same
bits (parity.guarded).
"""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.cuda.attention import routes
from pyggml.parity import guarded, running, tolerance
from pyggml.parity.case import Case, build
from pyggml.parity.cases import expand
from tests.gpu import kernels
from tests.gpu.attention_cases import Attention, attentions, forced, reference

#: Related ops, with sizes for one warp, one block and several blocks.
RELATED = """
soft_max_ext(f32[{1|37|300|1024|5000},9,6,2], f16[$1,11,2]~mask, scale=0.7, max_bias=8.0)
soft_max_ext(f32[{1|37|300|1024|5000},9,4], -, f32[4], scale=0.5)
soft_max_ext(f32[{1|37|300|1024|5000},9,4], f32[$1,9], scale=0.5)
merge_lse(f32[33,3,5,2], f32[33,3,5,2])
"""
#: Ops of the attention budget. They have no float64 oracle and are compared with NumPy.
PARTS = """
lse_sum(f32[33,3,5,2])
lse_sum(f32[33,3,5,2], f32[34,3,5,2])
lse_finish(f32[34,3,5,2]~above, lse=True)
"""


def judged(case: Attention, place: str) -> str:
    """The fault of the case on a place; empty if there is none."""
    with forced(case.route):
        node, leaves, device = case.node(), case.leaves(), backends.get(place)
        bound = tolerance.CLASSES[device.numeric(node)]
        expected = reference(case, leaves)
        for how, values in guarded.results(device, node, leaves):
            result = tolerance.within(values.reshape(expected.shape), expected, bound)
            if not result:
                return f"{how or 'first run'}: {result}"
    return ""


@pytest.mark.parametrize("case", attentions(), ids=str)
def test_kernel(case: Attention) -> None:
    with kernels.bound() as counts:
        fault = judged(case, "cuda")
    assert not fault, fault
    files = {file for file, _ in counts}
    assert not case.route or f"attention_{case.route}.cu" in files, f"it used {dict(counts)}"


@pytest.mark.parametrize("route", ["any", "latent", "list_token", "list_hopper"])
@pytest.mark.parametrize("pair", routes.LATENT)
def test_ids_that_are_no_keys(route: str, pair: tuple[int, int]) -> None:
    """Ids past the keys are like negative ones. A key that is twice in a list counts twice. Rows
    that no list names, or that kv_len hides, may hold NaN."""
    case = Attention(route, *pair, 3, 500, 100, 1, inside=0, n_ids=200, kv_len=300)
    case.attrs = {"lse": True, "prec": "f32" if route == "any" else "default"}
    leaves, rng = case.leaves(), np.random.default_rng(0)
    leaves["ids"] = rng.integers(-1, 450, leaves["ids"].shape, np.int32)
    expected = reference(case, leaves)
    leaves["k"][..., 300:, :] = np.nan
    past = leaves["ids"] < 0
    leaves["ids"][past] = rng.choice([500, 501, 1 << 20, 2**31 - 1, -(2**31)], past.sum())
    device = backends.get("cuda")
    with forced(route):
        for how, values in guarded.results(device, case.node(), leaves):
            result = tolerance.within(
                values.reshape(expected.shape), expected, tolerance.CLASSES["f16"]
            )
            assert result, f"{how}: {result}"


@pytest.mark.parametrize("case", expand(RELATED), ids=str)
def test_related_op(case: Case) -> None:
    outcome = running.tested(case, "cuda")
    assert outcome.status == "ok", outcome.why


@pytest.mark.parametrize("case", expand(PARTS), ids=str)
def test_op_of_the_budget(case: Case) -> None:
    graph = build(case)
    expected = gg.compile({"y": graph.node}).run(graph.inputs)["y"]
    for how, values in guarded.results(backends.get("cuda"), graph.node, graph.inputs):
        result = tolerance.within(
            values.reshape(expected.shape), expected, tolerance.CLASSES["f32"]
        )
        assert result, f"{how}: {result}"
