"""What `shard=` cuts: parts, errors, memory, stores, and the models that the library knows."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.errors import DeviceError, DTypeError, GraphError, UnknownNameError
from pyggml.models.model import load
from pyggml.models.presets import TINY as DEEPSEEK
from pyggml.passes.parts import Part, divided, interleaved, through
from pyggml.traits import Cut
from tests.models.test_architectures import TINY, write_file
from tests.shard.test_sharded import places

RNG = np.random.default_rng(0)


def weight(name: str, *ne: int, dtype: str = "f32") -> gg.Node:
    return gg.constant(RNG.standard_normal(ne[::-1], np.float32) / 8, dtype=dtype, name=name)


def feed_forward(n_ff: int = 96, dtype: str = "f32") -> gg.Node:
    x = gg.input("x", ne=(64, 3))
    hidden = gg.fused_up_gate(
        weight("up", 64, n_ff, dtype=dtype), weight("gate", 64, n_ff, dtype=dtype), x
    )
    return gg.mul_mat(weight("down", n_ff, 64, dtype=dtype), hidden)


def attention(heads: int = 4, groups: int = 2, dtype: str = "f32") -> tuple[gg.Node, list[gg.Node]]:
    h, rows = gg.input("x", ne=(64, 3)), gg.input("rows", "i32", ne=(3,))

    def split(name: str, n: int) -> gg.Node:
        y = gg.mul_mat(weight(name, 64, 16 * n), h)
        return gg.permute(gg.reshape(y, ne=(16, n, 3)), axes=(0, 2, 1, 3))

    states = [gg.state(name, "f16", ne=(16, 8, groups)) for name in ("k", "v")]
    k, v = (gg.set_rows(s, split(f"w{i}", groups), rows) for i, s in enumerate(states))
    y = gg.flash_attn_ext(split("wq", heads), k, v, scale=0.25)
    y = gg.reshape(y, ne=(16 * heads, 3))
    return gg.mul_mat(weight("wo", 16 * heads, 64, dtype=dtype), y), [k, v]


def weights(plan: gg.Plan) -> dict[str, list[str]]:
    """The place of each weight, by name."""
    found: dict[str, list[str]] = {}
    for node in plan.graph.nodes:
        if node.op.name in ("constant", "state"):
            found.setdefault(node.attrs["name"], []).append(plan.place_of(node))
    return found


def collectives(plan: gg.Plan) -> list[str]:
    names = [step.node.op.name for step in plan.steps]
    return [n for n in names if n in ("all_reduce", "all_gather", "reduce_scatter", "broadcast")]


# -- parts --------------------------------------------------------------------------------------


def test_parts_are_in_proportion() -> None:
    def sizes(*args: Any) -> list[int]:
        return [part.n for part in divided(*args) or ()]

    assert sizes(64, (1, 1)) == [32, 32] and sizes(6, (1, 1, 1, 1)) == [2, 2, 1, 1]
    assert sizes(64, (3, 1), 4) == [48, 16] and sizes(96, (1, 1), 32) == [64, 32]
    assert sizes(8, (100, 1)) == [7, 1] and sizes(64, (1, 1, 1), 32) == []
    parts = divided(10, (1, 2, 1)) or ()
    assert [(part.start, part.n) for part in parts] == [(0, 3), (3, 5), (8, 2)]


def test_parts_of_sources() -> None:
    part = Part(0, 6, 6)
    assert through(Cut(1), part) == Part(1, 6, 6)
    assert through(Cut(2, mul=16), part) == Part(2, 96, 96)
    assert through(Cut(1, div=3), part) == Part(1, 2, 2)
    assert through(Cut(1, div=4), part) is None  # one and a half groups
    assert through(Cut(1, div=12), part) == Part(1, 0, 1)  # inside of a group
    assert through(Cut(1, mod=6), part) == Part(1, 0, 6)
    assert through(Cut(1, mod=8), part) is None  # goes over the end
    assert through(Cut(1, add=2), part) == Part(1, 8, 6)
    turns = (interleaved(1, 8, 2) or ())[1]
    assert turns == Part(1, 1, 4, 2) and through(Cut(0, add=0), turns) == Part(0, 1, 4, 2)
    assert through(Cut(0, mul=2), turns) is None and interleaved(1, 9, 2) is None


# -- plans --------------------------------------------------------------------------------------


def test_a_feed_forward_net_is_cut_by_rows_and_columns() -> None:
    plan = gg.compile({"y": feed_forward()}, backends=places(2), shard={"rows": 2})
    assert weights(plan) == {
        "up[ne1 0:48]": ["null:0"], "gate[ne1 0:48]": ["null:0"], "down[ne0 0:48]": ["null:0"],
        "up[ne1 48:96]": ["null:1"], "gate[ne1 48:96]": ["null:1"], "down[ne0 48:96]": ["null:1"],
    }  # fmt: skip
    assert collectives(plan) == ["all_reduce"]
    assert "all_reduce" in str(plan) and "all_reduce" in str(plan.graph)


def test_without_kernels_each_device_sums_the_parts() -> None:
    """In simpler ops: two copies, and a sum on either device."""
    x = gg.rms_norm(feed_forward(), eps=1e-6)
    y = gg.mul_mat(weight("w", 64, 32), gg.silu(gg.mul_mat(weight("v", 64, 64), x)))
    devices = [backends.get("null", i) for i in range(2)]
    with devices[0].denying("all_reduce"), devices[1].denying("all_reduce"):
        plan = gg.compile({"y": y}, backends=places(2), shard={"rows": 2})
    sums = [plan.place_of(step.node) for step in plan.steps if step.node.op.name == "add"]
    assert sums == ["null:0", "null:1", "null:0"] and not collectives(plan)
    assert sum(len(split.copies) for split in plan.splits) == 3
    values = {"x": RNG.standard_normal((3, 64))}
    whole = gg.compile({"y": y}).run(values)["y"]
    np.testing.assert_allclose(plan.run(values)["y"], whole, rtol=1e-5, atol=1e-6)


def test_blocks_are_not_cut() -> None:
    plan = gg.compile({"y": feed_forward(96, "q8_0")}, backends=places(2), shard={"rows": 2})
    assert {"down[ne0 0:64]", "down[ne0 64:96]"} <= set(weights(plan))
    with pytest.raises(GraphError, match="'rows': 4"):
        gg.compile({"y": feed_forward(96, "q8_0")}, backends=places(4), shard={"rows": 4})


def test_an_attention_is_cut_by_heads_with_its_cache() -> None:
    y, updates = attention()
    plan = gg.compile({"y": y}, updates=updates, backends=places(2), shard={"heads": 2})
    assert {"k@0", "k@1", "wq[ne1 0:32]", "w0[ne1 16:32]", "wo[ne0 32:64]"} <= set(weights(plan))
    assert collectives(plan) == ["all_reduce"]
    states = [row.states for row in plan.memory.devices]
    assert states == [2 * 16 * 8 * 2] * 2


def test_heads_that_share_keys_have_them_on_each_device() -> None:
    y, updates = attention(4, 1)
    plan = gg.compile({"y": y}, updates=updates, backends=places(2), shard={"heads": 2})
    assert [row.states for row in plan.memory.devices] == [2 * 16 * 8 * 2] * 2


def test_rows_of_a_cache_take_turns() -> None:
    y, updates = attention()
    plan = gg.compile({"y": y}, updates=updates, backends=places(2), shard={"sequence": 2})
    assert [row.states for row in plan.memory.devices] == [2 * 16 * 4 * 2 * 2] * 2
    inputs = {"x": RNG.standard_normal((3, 64)), "rows": [0, 5, 2]}
    plan.run(inputs)
    whole = gg.compile({"y": y}, updates=updates)
    whole.run(inputs)
    np.testing.assert_array_equal(plan.store.read("k"), whole.store.read("k"))


def test_stages_have_their_own_weights() -> None:
    x = gg.input("x", ne=(64, 3))
    for i in range(4):
        x = gg.add(x, gg.silu(gg.mul_mat(weight(f"w{i}", 64, 64), x)))
    plan = gg.compile({"y": x}, backends=places(2), shard={"layers": 2})
    assert weights(plan) == {
        "w0": ["null:0"], "w1": ["null:0"], "w2": ["null:1"], "w3": ["null:1"]
    }  # fmt: skip
    assert sum(len(split.copies) for split in plan.splits) == 1
    uneven = gg.compile({"y": x}, backends=places(2), shard={"layers": (3, 1)})
    assert weights(uneven)["w2"] == ["null:0"] and weights(uneven)["w3"] == ["null:1"]


def test_parts_follow_the_sizes_of_the_devices() -> None:
    plan = gg.compile(
        {"y": feed_forward()}, backends=["null:0:24MiB", "null:1:8MiB"], shard={"rows": 2}
    )
    assert "down[ne0 0:72]" in weights(plan)


ERRORS = [
    ("heads", DTypeError, "must be 'auto' or a dict"),
    ({"columns": 2}, UnknownNameError, "no cut 'columns'"),
    ({"heads": 0}, DTypeError, "expected a number of devices"),
    ({"heads": (1, -1)}, DTypeError, "expected a number of devices"),
    ({"heads": True}, DTypeError, "expected a number of devices"),
    ({"heads": 2, "rows": 3}, DTypeError, "their numbers must be equal"),
    ({"heads": (1, 2), "rows": (2, 1)}, DTypeError, "the shares of all cuts"),
    ({"heads": 9}, DeviceError, "needs 9 devices of one kind, and backends= names 8: null:0, "),
    ({"heads": 2}, GraphError, "nothing in the graph is divided so"),
    ({"experts": 2}, GraphError, "nothing in the graph is divided so"),
]


@pytest.mark.parametrize(("shard", "error", "text"), ERRORS, ids=lambda x: str(x)[:20])
def test_wrong_cuts(shard: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        gg.compile({"y": feed_forward()}, backends=places(8), shard=shard)


def test_heads_that_cannot_be_cut() -> None:
    y, updates = attention(6, 2)
    with pytest.raises(GraphError, match=r"the 6 heads of \w+ cannot be divided over 4 devices"):
        gg.compile({"y": y}, updates=updates, backends=places(4), shard={"heads": 4})


def test_a_state_that_is_also_read_whole_is_on_every_device() -> None:
    y, updates = attention()
    outputs = {"y": y, "k": gg.cast(updates[0], dtype="f32")}
    for shard in ({"heads": 2}, {"sequence": 2}):
        plan = gg.compile(outputs, updates=updates, backends=places(2), shard=shard)
        values = {"x": RNG.standard_normal((3, 64)), "rows": [0, 5, 2]}
        whole = gg.compile(outputs, updates=updates).run(values)
        for name, array in plan.run(values).items():
            np.testing.assert_allclose(array, whole[name], rtol=1e-3, atol=1e-3)


# -- stores -------------------------------------------------------------------------------------


def test_a_store_shows_a_cut_state_as_a_whole() -> None:
    y, updates = attention()
    plan = gg.compile({"y": y}, updates=updates, backends=places(2), shard={"heads": 2}).bind()
    array = RNG.standard_normal((2, 8, 16)).astype(np.float16)
    plan.store.write("k", array)
    np.testing.assert_array_equal(plan.store.read("k"), array)
    np.testing.assert_array_equal(plan.store.read("k@1"), array[1:])
    plan.store.clear("k")
    assert not plan.store.read("k").any()
    with pytest.raises(UnknownNameError, match="its states are: k, v"):
        plan.store.read("q")


@pytest.mark.parametrize("shards", [(None, {"heads": 2}), ({"heads": 2}, {"sequence": 2})])
def test_plans_of_a_store_cut_a_state_alike(shards: Any) -> None:
    y, updates = attention()
    store, on = gg.Store(), places(2)
    first, second = shards
    plan = gg.compile({"y": y}, updates=updates, backends=on, shard=first, store=store).bind()
    for shard in (second, first) if first is None else (second,):
        if shard is None:
            continue
        with pytest.raises(
            GraphError, match=r"use the same shard=|use another name or another store"
        ):
            gg.compile({"y": y}, updates=updates, backends=on, shard=shard, store=store)
    plan.run(x=np.zeros((3, 64)), rows=[0, 1, 2])


# -- models -------------------------------------------------------------------------------------

MODELS = {**TINY, "deepseek2": replace(DEEPSEEK, n_rot=32, d_v=32)}
TOKENS = [(31 * i * i + 7 * i) % 50 for i in range(21)]


def logits(path: Path, on: list[str], **options: Any) -> Any:
    """Of a prompt in batches, the first of them without outputs, and of single tokens."""
    with load(path, backends=on, **options) as model:
        session = model.session(n_ctx=32, n_batch=4)
        rows = [session.forward(TOKENS[:14])]
        fork = session.fork()
        rows += [session.forward([t]) for t in TOKENS[14:18]]
        rows += [fork.forward(TOKENS[14:])]
        return np.concatenate(rows)


@pytest.mark.parametrize("cache", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, cache: str, tmp_path: Path) -> None:
    path = write_file(tmp_path, MODELS[name])
    types = {"cache_k": cache, "cache_v": cache}
    if cache == "q8_0" and name != "deepseek2":
        pytest.skip("rows of 12 and 10 elements are not whole blocks")
    kinds: list[dict[str, Any]] = [{}] if name != "deepseek2" else [{"mla": 1}, {}]
    if name == "deepseek2" and cache != "q8_0":
        kinds.append({"mla": 0})
    if cache == "f32":
        kinds.append({"flash": False, "mla": 1})
    for kind in kinds:
        one = logits(path, ["numpy"], **types, **kind)
        shards: list[Any] = ["auto", {"layers": 2}]
        if kind.get("flash", True):  # without it, keys are not divided
            shards.append({"sequence": 2})
        for shard in shards:
            other = logits(path, places(2), shard=shard, **types, **kind)
            error = np.linalg.norm(one - other) / np.linalg.norm(one)
            assert error < {"f32": 2e-6, "f16": 1e-3, "q8_0": 1e-2}[cache], (kind, shard)
