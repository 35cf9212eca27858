"""Which ops of models run by NumPy's kernels beside the native ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import pyggml as gg
from pyggml.backends.cpu.runner import CpuStep
from pyggml.backends.step import LoopStep, Step
from pyggml.models.presets import PRESETS, preset
from pyggml.models.synth import synth
from pyggml.node import Node, label_of

TINY = [name for name in PRESETS if name.startswith("tiny")]
#: Ops that may still be NumPy's in the plans of models.
OTHERS = {
    "add_id", "cast", "clamp", "concat", "fill", "grouped_topk", "repeat", "scale", "set_rows",
    "sum_rows",
}  # fmt: skip


def by_numpy(steps: Iterable[Step]) -> Iterator[Node]:
    """The nodes that NumPy computes, those in loops included."""
    for step in steps:
        if isinstance(step, LoopStep):
            for body in step.bodies:
                yield from by_numpy(body.steps)
        elif not isinstance(step, CpuStep):
            yield step.node


def _weight(node: Node) -> str:
    return label_of(node[node.op.weights[0]].root)


def check(path: Path, *, but: str = "-", **options: object) -> None:
    """No product is NumPy's, except those whose weight has `but` in its name."""
    with gg.load(path, backends=["cpu"], **options) as model:
        session = model.session(n_ctx=128, n_batch=64)
        for n_tokens in (1, 3, 64):
            nodes = list(by_numpy(session.plan(n_tokens, 64, 1).steps))
            left = {n.op.name for n in nodes if not n.op.weights or but not in _weight(n)}
            assert left <= OTHERS


@pytest.mark.parametrize("type_", ["f16", "q4_0"])
@pytest.mark.parametrize("name", TINY)
def test_no_product_of_a_model_is_left_to_numpy(tmp_path: Path, name: str, type_: str) -> None:
    synth(tmp_path / "m.gguf", PRESETS[name], type=type_)
    check(tmp_path / "m.gguf")


@pytest.mark.parametrize("form", [0, 1, 3])
@pytest.mark.parametrize("kv_b", ["split", "joined"])
def test_no_product_of_latent_attention_is_left_to_numpy(
    tmp_path: Path, kv_b: str, form: int
) -> None:
    """attn_v_b is a matrix of each head in one form and one matrix in the other. Of attn_kv_b the
    latent form casts one half of each head, which NumPy reads as it is in the file."""
    synth(tmp_path / "m.gguf", preset("tiny", kv_b=kv_b), type="q8_0")
    check(tmp_path / "m.gguf", mla=form, but="attn_kv_b" if form else "-")
