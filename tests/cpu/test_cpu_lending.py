"""The cpu backend lends weights to a GPU: from fewer rows on than NumPy, without another copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import gguf
from pyggml.backends.host_tiles import FORMS, LAYOUT, tiles_of
from pyggml.backends.step import LoadStep
from pyggml.dtypes import TYPES
from pyggml.models.model import Model, load
from pyggml.models.presets import PRESETS, TINY
from pyggml.models.synth import synth
from pyggml.node import Node
from pyggml.runtime.memory import Memory
from pyggml.runtime.plan import Plan

K, M, EXPERTS = 256, 19, 4
PINS = {"exps": "cpu"}


@pytest.mark.parametrize(
    ("host", "tokens", "place"),
    [("cpu", 7, "cpu"), ("cpu", 8, "cuda:0"), ("numpy", 31, "numpy"), ("numpy", 32, "cuda:0")],
)
def test_from_how_many_rows_a_gpu_borrows(host: str, tokens: int, place: str) -> None:
    w = gg.constant(np.zeros((24, 64), np.float32), dtype="q8_0", name="w")
    y = gg.mul_mat(w, gg.input("x", ne=(64, tokens)))
    plan = gg.compile({"y": y}, backends=["cuda:0", host], pins={"^w$": host})
    assert plan.place_of(plan.graph.outputs["y"]) == place


# -- one copy on the host -----------------------------------------------------------------------


def rows(name: str, seed: int = 0) -> Any:
    shape = (EXPERTS, M, TYPES[name].row_bytes(K))
    return np.random.default_rng(seed).integers(0, 64, shape, np.uint8)


def experts(name: str, tokens: int) -> dict[str, Node]:
    """A layer's experts: up and gate in one product, down in another."""
    up, gate = (
        gg.constant(rows(name, seed), dtype=name, name=f"{which}_exps")
        for seed, which in enumerate(("up", "gate"))
    )
    b, ids = gg.input("b", ne=(K, 1, tokens)), gg.input("ids", "i32", ne=(2, tokens))
    return {"y": gg.moe_up_gate(up, gate, b, ids)}


def plans(name: str, device: str = "cuda:0:24GiB") -> tuple[Plan, Plan]:
    """Of a prompt and of a token."""
    store = gg.Store()
    prompt, token = (
        gg.compile(experts(name, tokens), backends=[device, "cpu"], pins=PINS, store=store)
        for tokens in (64, 1)
    )
    assert sum(isinstance(step, LoadStep) for step in prompt.steps) == 2
    assert not any(isinstance(step, LoadStep) for step in token.steps)
    return prompt, token


def on_host(*all_plans: Plan) -> int:
    """The bytes of weights on the host of plans of one store."""
    first, *others = all_plans
    return host_weights(first.memory_with(*others))


def host_weights(memory: Memory) -> int:
    return sum(row.weights for row in memory.devices if row.device == "cpu")


@pytest.mark.parametrize("name", FORMS)
def test_what_the_host_computes_with_and_lends_is_there_once(name: str) -> None:
    tiles = 2 * tiles_of(TYPES[name], (K, M, EXPERTS, 1)).nbytes
    prompt, token = plans(name)
    assert on_host(prompt) == on_host(token) == on_host(prompt, token) == tiles


@pytest.mark.parametrize("name", ["f16", "iq2_xs"])
def test_types_without_tiles_stay_as_in_the_file(name: str) -> None:
    data = np.zeros((EXPERTS, M, TYPES[name].row_bytes(K)), np.uint8)
    w = gg.constant(data.view(np.float16) if name == "f16" else data, dtype=name, name="exps")
    ids = [gg.input("ids", "i32", ne=(2, tokens)) for tokens in (64, 1)]
    ys = [gg.mul_mat_id(w, gg.input("b", ne=(K, 1, i.ne[1])), i) for i in ids]
    both = [gg.compile({"y": y}, backends=["cuda:0:24GiB", "cpu"], pins=PINS) for y in ys]
    assert on_host(*both) == data.nbytes


def test_a_gpu_that_needs_rows_borrows_the_file() -> None:
    """Its view of a weight does not begin and end with tiles."""
    w = gg.constant(rows("q4_0")[0], dtype="q4_0", name="exps")
    part = gg.view(w, ne=(K, 8), start=(0, 8))
    y = gg.mul_mat(part, gg.input("x", ne=(K, 64)))
    plan = gg.compile({"y": y}, backends=["cuda:0:24GiB", "cpu"], pins=PINS)
    assert [plan._work.layouts[n].name for n in plan._work.layouts] == ["plain", "plain"]


@pytest.mark.parametrize("name", ["iq4_nl", "q6_K"])
def test_results_do_not_change(name: str) -> None:
    """A prompt on a device that borrows equals NumPy's, before and after a token on the host."""
    prompt, token = plans(name, "null:0")
    rng = np.random.default_rng(0)
    feed = {
        tokens: {
            "b": rng.standard_normal((tokens, 1, K)).astype(np.float32),
            "ids": rng.integers(-1, EXPERTS, (tokens, 2)),
        }
        for tokens in (64, 1)
    }
    want = gg.compile(experts(name, 64)).run(feed[64])["y"]
    alone = gg.compile(experts(name, 1), backends=["cpu"]).run(feed[1])["y"]
    for _ in range(2):
        assert (prompt.run(feed[64])["y"] == want).all()
        assert (token.run(feed[1])["y"] == alone).all()
    weights = {key[2] for key in prompt.store.shared.weights}
    assert weights == {LAYOUT}  # nothing else is on the host


def test_a_session_on_a_device_and_the_host(tmp_path: Path) -> None:
    """Every weight of the host is there once, whatever plans there are."""
    synth(tmp_path / "m.gguf", TINY, dtype="q4_0")
    tokens = [(31 * i * i + 7 * i) % 512 for i in range(100)]
    with load(tmp_path / "m.gguf", backends=["null:0", "cpu"], pins=PINS) as model:
        session = model.session(256)
        session.forward(tokens)
        session.forward([3])
        keys = [key for key in model.store.shared.weights if key[1] == "host"]
    assert len({key[0] for key in keys}) == len(keys) and LAYOUT in {key[2] for key in keys}


@pytest.mark.parametrize("n_ubatch", [128, 512])
def test_deepseek_v3_with_experts_on_the_host(tmp_path: Path, n_ubatch: int) -> None:
    """The host holds the experts once, in 4-bit tiles of the file's size."""
    synth(tmp_path / "m.gguf", PRESETS["deepseek-v3"], dtype="iq4_nl", header_only=True)
    with gguf.open(tmp_path / "m.gguf", allow_missing_data=True) as file:
        model = Model(file, backends=["cuda:0:80GiB", "cpu"], pins=PINS)
        memory = model.session(2048, n_ubatch).memory()
        exps = sum(t.nbytes for name, t in file.tensors.items() if "exps" in name)
    # Also the row of each router's bias, and padding.
    assert 0 <= host_weights(memory) - exps < 2**20
