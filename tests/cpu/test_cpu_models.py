"""The plans of models have no steps that run by NumPy's kernels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import pyggml as gg
from pyggml.backends.cpu.table import CpuStep
from pyggml.backends.step import LoopStep, Step
from pyggml.generate.loop import Draw
from pyggml.models.presets import PRESETS, preset
from pyggml.models.synth import synth
from pyggml.node import Node, label_of

TINY = [name for name in PRESETS if name.startswith("tiny")]


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
    """No step is NumPy's, except products whose weight has `but` in its name."""
    with gg.load(path, backends=["cpu"], **options) as model:
        session = model.session(n_ctx=128, n_batch=64)
        plans = [session.plan(n_tokens, 64, 1) for n_tokens in (1, 3, 64)]
        draws = None, Draw(0.8, 40, 0.9, 16)
        plans += [session.plans.loop(64, (3,), draw) for draw in draws]
        for plan in plans:
            nodes = list(by_numpy(plan.steps))
            assert not [n.op.name for n in nodes if not n.op.weights or but not in _weight(n)]


@pytest.mark.parametrize("type_", ["f16", "q4_0"])
@pytest.mark.parametrize("name", TINY)
def test_no_step_of_a_model_is_left_to_numpy(tmp_path: Path, name: str, type_: str) -> None:
    synth(tmp_path / "m.gguf", PRESETS[name], dtype=type_)
    check(tmp_path / "m.gguf")


@pytest.mark.parametrize("form", [0, 1, 3])
@pytest.mark.parametrize("kv_b", ["split", "joined"])
def test_no_step_of_latent_attention_is_left_to_numpy(tmp_path: Path, kv_b: str, form: int) -> None:
    """attn_v_b is a matrix of each head in one form and one matrix in the other. Of attn_kv_b the
    latent form casts one half of each head, which NumPy reads as it is in the file."""
    synth(tmp_path / "m.gguf", preset("tiny", kv_b=kv_b), dtype="q8_0")
    check(tmp_path / "m.gguf", mla=form, but="attn_kv_b" if form else "-")
