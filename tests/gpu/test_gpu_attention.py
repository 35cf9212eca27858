"""flash_attn_ext on a GPU, by every kernel, also where it would not be chosen; the ops beside it.

Results and scratch are poisoned, memory around them is watched, two runs give the same bits
(parity.guarded)."""

from __future__ import annotations

import pytest

import pyggml as gg
from pyggml import backends
from pyggml.parity import guarded, running, tolerance
from pyggml.parity.case import Case, build
from pyggml.parity.cases import expand
from tests.gpu import kernels
from tests.gpu.attention_cases import Attention, attentions, forced, reference

#: The ops beside flash_attn_ext, by sizes that one warp, one block or several blocks take.
BESIDE = """
soft_max_ext(f32[{1|37|300|1024|5000},9,6,2], f16[$1,11,2]~mask, scale=0.7, max_bias=8.0)
soft_max_ext(f32[{1|37|300|1024|5000},9,4], -, f32[4], scale=0.5)
soft_max_ext(f32[{1|37|300|1024|5000},9,4], f32[$1,9], scale=0.5)
merge_lse(f32[33,3,5,2], f32[33,3,5,2])
"""
#: Of the attention budget, without a statement in float64: beside NumPy.
PARTS = """
lse_sum(f32[33,3,5,2])
lse_sum(f32[33,3,5,2], f32[34,3,5,2])
lse_finish(f32[34,3,5,2]~above, lse=True)
"""


def judged(case: Attention, place: str) -> str:
    """What is wrong with the case there; empty where all is right."""
    with forced(case.route):
        node, leaves, device = case.node(), case.leaves(), backends.get(place)
        bound = tolerance.CLASSES[device.numeric(node)]
        want = reference(case, leaves)
        for how, values in guarded.results(device, node, leaves):
            result = tolerance.within(values.reshape(want.shape), want, bound)
            if not result:
                return f"{how or 'at first'}: {result}"
    return ""


@pytest.mark.parametrize("case", attentions(), ids=str)
def test_kernel(case: Attention) -> None:
    with kernels.bound() as ran:
        wrong = judged(case, "cuda")
    assert not wrong, wrong
    files = {file for file, _ in ran}
    assert not case.route or f"attention_{case.route}.cu" in files, f"it ran {dict(ran)}"


@pytest.mark.parametrize("case", expand(BESIDE), ids=str)
def test_beside(case: Case) -> None:
    outcome = running.tested(case, "cuda")
    assert outcome.status == "ok", outcome.why


@pytest.mark.parametrize("case", expand(PARTS), ids=str)
def test_parts(case: Case) -> None:
    graph = build(case)
    want = gg.compile({"y": graph.node}).run(graph.inputs)["y"]
    for how, values in guarded.results(backends.get("cuda"), graph.node, graph.inputs):
        result = tolerance.within(values.reshape(want.shape), want, tolerance.CLASSES["f32"])
        assert result, f"{how}: {result}"
