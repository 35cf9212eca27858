"""Plans of one model divide its states and weights alike, and hold nothing for long."""

from __future__ import annotations

from pathlib import Path

import pytest

import pyggml as gg
from pyggml import gguf
from pyggml.generate.session import Session
from pyggml.models.batch import Options
from pyggml.models.model import Model
from pyggml.models.presets import preset
from pyggml.models.synth import synth
from pyggml.transfer import origin
from tests.shard.test_sharded import places


@pytest.mark.parametrize("name", ["tiny-deepseek32", "tiny-deepseek4"])
def test_all_plans_have_the_same_stages(name: str, tmp_path: Path) -> None:
    """Of sparse and of dense attention, which only writes the keys of its indexer; without outputs,
    too."""
    path = tmp_path / "model.gguf"
    synth(path, preset(name, layers=4), header_only=True)
    with gguf.open(path, allow_missing_data=True) as file:
        model = Model(file, backends=places(2), shard={"layers": 2})
        session = Session(model, n_ctx=64, n_batch=8)
        homes: dict[str, set[str]] = {}
        for n_kv in (64, 32):
            for n_tokens, n_outputs in ((8, 1), (8, 0), (1, 1)):
                for need in session.plan(n_tokens, n_kv, n_outputs).needs:
                    leaf = origin(need.node)
                    if leaf.attrs["name"] and leaf.attrs["name"].startswith(("blk.", "cache_")):
                        homes.setdefault(leaf.attrs["name"], set()).add(need.backend.place)
    assert {len(each) for each in homes.values()} == {1}
    assert set.union(*homes.values()) == {"null:0", "null:1"}


def test_rows_that_only_later_graphs_read_take_no_memory(tmp_path: Path) -> None:
    """An arena does not grow with the layers, although nothing reads the indexer's new keys."""
    sizes = []
    for layers in (3, 12):
        path = tmp_path / f"{layers}.gguf"
        synth(path, preset("tiny-deepseek32", layers=layers), header_only=True)
        with gguf.open(path, allow_missing_data=True) as file:
            plan = Session(Model(file), n_ctx=32, n_batch=32).plan(32, 32, 1)
        sizes.append(plan.memory.compute)
    assert sizes[0] == sizes[1]


def test_queries_are_not_gathered() -> None:
    """A tall matrix before an attention is no vocabulary."""
    x, rows = gg.input("x", ne=(32, 1)), gg.input("rows", "i32", ne=(1,))
    tall = gg.constant([[0.1] * 32] * 256, name="tall")
    cache = gg.set_rows(gg.state("kv", "f16", ne=(64, 8)), gg.input("row", ne=(64, 1)), rows)
    q = gg.permute(gg.reshape(gg.mul_mat(tall, x), ne=(64, 4, 1)), axes=(0, 2, 1, 3))
    y = gg.flash_attn_ext(q, cache, cache, scale=0.1)
    logits = gg.mul_mat(tall, gg.reshape(gg.view(y, ne=(32, 1, 1)), ne=(32, 1)))
    plan = gg.compile({"y": logits}, updates=[cache], backends=places(2), shard={"rows": 2})
    assert [s.node.ne[0] for s in plan.steps if s.node.op.name == "all_gather"] == [256]


def test_views_of_weights_are_cut_in_every_stage(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    synth(path, preset("tiny", layers=4), header_only=True)
    with gguf.open(path, allow_missing_data=True) as file:
        shard = {"layers": 2, "heads": 2}
        model = Model(file, backends=places(4), shard=shard, options=Options(expand_from=1))
        names = [
            origin(need.node).attrs["name"]
            for plan in Session(model, n_ctx=64, n_batch=32).plans.largest()
            for need in plan.needs
        ]
    assert not [name for name in names if name and name.endswith("attn_v_b.weight")]
