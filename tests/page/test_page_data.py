"""The data of a page: every number on it is the plan's."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import gguf, page
from pyggml.cli import main
from pyggml.generate.fit import Planner, Setup
from pyggml.generate.variants import changes, variants
from pyggml.models.batch import Options
from pyggml.models.model import Model
from pyggml.node import label_of, labels
from pyggml.page.arena import LOOP, SCORES, SCRATCH, blocks_of
from pyggml.page.document import Document, View
from pyggml.page.html import SCRIPTS, text_of
from pyggml.page.names import LAYER
from pyggml.page.variants import budgets, by_budget
from pyggml.runtime.places import parse
from pyggml.runtime.plan import Plan

HOST = {"exps": "numpy"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def tiny(folder: Path) -> str:
    path = folder / "tiny.gguf"
    assert main(["synth", str(path), "--preset", "tiny", "--layers", "6"]) == 0
    return str(path)


def model_plan(path: str, *places: str, n_tokens: int = 256, **options: Any) -> Plan:
    pins = options.pop("pins", None)
    amb = options.pop("amb", None)
    file = gguf.open(path, allow_missing_data=True)
    model = Model(file, backends=places, pins=pins, amb=amb, options=Options(**options))
    return model.session(n_ctx=512, n_batch=n_tokens).plan(n_tokens, 512, 1)


@pytest.fixture(
    scope="module",
    params=["numpy", "loops", "two devices", "cuda", "lent weights"],
)
def plan(request: pytest.FixtureRequest, tiny: str) -> Plan:
    return {
        "numpy": lambda: model_plan(tiny, "numpy"),
        "loops": lambda: model_plan(tiny, "numpy", flash=False, amb=1),
        "two devices": lambda: model_plan(tiny, "null", "numpy", pins=HOST, n_tokens=8),
        "cuda": lambda: model_plan(tiny, "cuda:0:24GiB"),
        "lent weights": lambda: model_plan(tiny, "cuda:0:24GiB", "numpy", pins=HOST),
    }[request.param]()  # fmt: skip


def data_of(plan: Plan, times: Any = None) -> dict[str, Any]:
    data = Document("a title", [View("now", plan, times)], plan.memory).data()
    again: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    assert again.keys() == data.keys()
    return again


# -- the arena ------------------------------------------------------------------------------------


def test_blocks_add_up_to_the_live_bytes_and_to_the_arena(plan: Plan) -> None:
    work, blocks = plan._work, blocks_of(plan._work)
    for device, arena in work.placed.arenas.items():
        own = [block for block in blocks if block.device == device]
        live = [sum(b.nbytes for b in own if b.start <= i <= b.end) for i in range(len(plan.steps))]
        assert tuple(live) == arena.live
        alignment = max(b.alignment for b in work.backends if b.device == device)
        ends = [-(-(b.offset + b.nbytes) // alignment) * alignment for b in own]
        assert max(ends, default=0) == arena.nbytes


def test_blocks_that_are_alive_together_do_not_overlap(plan: Plan) -> None:
    blocks = [block for block in blocks_of(plan._work) if block.nbytes]
    for a, b in combinations(blocks, 2):
        if a.device == b.device and a.start <= b.end and b.start <= a.end:
            assert a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset


def test_blocks_name_what_they_hold(plan: Plan) -> None:
    spots, n = plan._work.placed.spots, len(plan.steps)
    for block in blocks_of(plan._work):
        assert 0 <= block.start <= block.end < n
        assert bool(block.tensors) == (block.kind not in (SCRATCH, LOOP))
        for step, node in block.tensors:
            assert block.start <= step <= block.end and node in plan.steps[step].nodes
            assert block.offset <= spots[node].offset < block.offset + block.nbytes
    held = [node for block in blocks_of(plan._work) for _, node in block.tensors]
    assert len(held) == len(set(held))


def test_scores_and_loops_are_told_apart(tiny: str) -> None:
    whole = blocks_of(model_plan(tiny, "numpy", flash=False)._work)
    cut = blocks_of(model_plan(tiny, "numpy", flash=False, amb=1)._work)
    assert SCORES in {block.kind for block in whole} and LOOP not in {b.kind for b in whole}
    assert LOOP in {block.kind for block in cut}


def test_the_peak_is_that_of_the_memory(plan: Plan) -> None:
    data = data_of(plan)["plans"][0]
    largest = max(data["devices"], key=lambda row: row["peak_live"])
    assert largest["peak_live"] == plan.memory.peak_live
    node = data["steps"]["node"][largest["peak_step"]]
    label = plan.memory.peak_step
    assert label in (name_of(data_of(plan), node), op_of(data_of(plan), node))
    rows = {row["device"]: row for row in data["memory"]["devices"]}
    for row in plan.memory.devices:
        assert {key: rows[row.device][key] for key in ("weights", "compute", "total")} == {
            "weights": row.weights, "compute": row.compute, "total": row.total,
        }  # fmt: skip
    for device in data["devices"]:
        assert device["nbytes"] == plan._work.placed.arenas[device["device"]].nbytes


def name_of(data: dict[str, Any], node: int) -> str:
    nodes = data["plans"][0]["nodes"]
    text: str = data["texts"][nodes["name"][node]]
    return text.replace(LAYER, str(nodes["layer"][node]))


def op_of(data: dict[str, Any], node: int) -> str:
    text: str = data["texts"][data["plans"][0]["nodes"]["op"][node]]
    return text


# -- nodes and steps ------------------------------------------------------------------------------


def test_every_node_and_step_is_there_with_its_own_values(plan: Plan) -> None:
    data = data_of(plan)
    one, texts = data["plans"][0], data["texts"]
    nodes, steps = one["nodes"], one["steps"]
    assert len(set(map(len, nodes.values()))) == 1 and len(set(map(len, steps.values()))) == 1
    order = plan._work.order
    assert len(steps["node"]) == len(plan.steps) and len(nodes["op"]) >= len(order)
    for i, node in enumerate(order):
        assert name_of(data, i) == (label_of(node) if labels(node) else "")
        assert texts[nodes["type"][i]] == node.dtype.name
        assert texts[nodes["ne"][i]] == ", ".join(map(str, node.ne[: node.spec.rank]))
        assert one["places"][nodes["place"][i]] == plan.place_of(node)
        assert [order[k] for k in nodes["src"][i]] == [s for s in node.src if s is not None]
        assert (order[nodes["base"][i]] if nodes["base"][i] >= 0 else node) is node.base
    splits = [s for s in plan.splits for _ in (*s.copies, *s.steps)]
    for i, step in enumerate(plan.steps):
        assert steps["scratch"][i] == step.scratch and len(steps["nodes"][i]) == len(step.nodes)
        assert op_of(data, steps["node"][i]) == step.node.op.name
        assert plan.splits[steps["split"][i]] is splits[i]
        number = len(plan.splits[steps["split"][i]].copies)
        assert one["splits"][steps["split"][i]][1] == number
    for kernels, text, why in zip(plan.kernels(), steps["kernels"], steps["why"]):
        assert all(name in texts[text] for name in kernels.names) and texts[why] == kernels.why
    lines = {texts[line] for line in nodes["line"]}
    assert any(re.fullmatch(r"pyggml/models/\w+\.py:\d+", line) for line in lines)


def test_the_costs_add_up_to_the_profile(tiny: str) -> None:
    plan = model_plan(tiny, "numpy", n_tokens=8)
    pos = np.arange(8, dtype=np.int32)
    profile = plan.profile(tokens=pos, pos=pos, rows=pos, outputs=[7])
    one = data_of(plan, profile)["plans"][0]["steps"]
    assert sum(one["seconds"]) == pytest.approx(profile.seconds, rel=1e-3)
    assert sum(one["traffic"]) == pytest.approx(sum(row.nbytes for row in profile.rows))
    assert sum(one["flops"]) == pytest.approx(sum(row.flops for row in profile.rows))
    by_step = {step: row.seconds for step, row in zip(plan.steps, profile.rows)}
    assert data_of(plan, by_step)["plans"][0]["steps"] == one
    assert "seconds" not in data_of(plan)["plans"][0]["steps"]


def test_times_of_another_plan_are_refused(tiny: str, tmp_path: Path) -> None:
    plan = model_plan(tiny, "numpy", n_tokens=8)
    x = gg.input("x", ne=(8,))
    other = gg.compile({"y": gg.silu(x)})
    profile = other.profile(x=np.ones(8))
    with pytest.raises(gg.PyggmlError, match="the profile is of another plan: it has 1 steps"):
        plan.page(tmp_path / "page.html", profile=profile)
    with pytest.raises(gg.PyggmlError, match="another plan: a step has none"):
        plan.page(tmp_path / "page.html", profile={other.steps[0]: 1.0})
    assert not list(tmp_path.iterdir())


# -- layers ---------------------------------------------------------------------------------------


def test_every_step_is_in_one_section_and_alike_layers_are_together(
    plan: Plan, request: pytest.FixtureRequest
) -> None:
    data = data_of(plan)
    one = data["plans"][0]
    steps = [i for section in one["sections"] for part in section["steps"] for i in part]
    assert sorted(steps) == list(range(len(plan.steps)))
    numbers = [n for section in one["sections"] for n in section["layers"]]
    assert sorted(numbers) == list(range(6))
    for section in one["sections"]:
        assert len(section["steps"]) == max(1, len(section["layers"]))
        first, *others = section["steps"]
        for other in others:  # equal but for the layer's number
            for a, b in zip(first, other, strict=True):
                assert spec_and_ops(plan, a) == spec_and_ops(plan, b)
                assert one["steps"]["kernels"][a] == one["steps"]["kernels"][b]
    layers = [section["layers"] for section in one["sections"]]
    kind = request.node.callspec.params["plan"]
    if kind == "cuda":
        # The sum over a layer's experts makes the next one's norm, but not from 0, which has none,
        # and to 5, which computes the last token only.
        assert layers == [[], [0], [1], [2, 3], [4], [5], []]
    elif kind == "lent weights":
        # Each reads the experts of the next one ahead; no layer does so for 1, and 5 reads none.
        assert layers == [[0], [1], [2, 3], [4], [5], []]
    else:
        assert max(map(len, layers)) >= 3


def spec_and_ops(plan: Plan, i: int) -> Any:
    step = plan.steps[i]
    reads = tuple(node.spec for node in step.reads)
    return step.node.spec, tuple(n.op for n in step.nodes), plan.place_of(step.node), reads


def test_a_layer_begins_with_its_norm(tiny: str) -> None:
    data = data_of(model_plan(tiny, "numpy"))
    one = data["plans"][0]
    for section in one["sections"]:
        if section["name"] == "layers":
            assert all(op_of(data, one["steps"]["node"][part[0]]) in ("rms_norm", "get_rows")
                       for part in section["steps"])  # fmt: skip
    assert [section["name"] for section in one["sections"]][:: len(one["sections"]) - 1] == [
        "input", "output",
    ]  # fmt: skip


def test_layers_with_other_types_are_apart() -> None:
    x = gg.label(gg.silu(gg.input("x", ne=(64, 4))), "inp_embd")
    for il, dtype in enumerate(["f32", "f16", "f32", "f16"]):
        w = gg.constant(np.ones((64, 64)), dtype=dtype, name=f"blk.{il}.w.weight")
        x = gg.label(gg.mul_mat(w, x), f"out-{il}")
    sections = data_of(gg.compile({"y": x}))["plans"][0]["sections"]
    assert [section["layers"] for section in sections] == [[], [0, 2], [1, 3]]


def test_layers_with_other_masks_or_attributes_are_apart(folder: Path) -> None:
    path = folder / "gpt-oss.gguf"
    assert main(["synth", str(path), "--preset", "tiny-gpt-oss", "--layers", "6"]) == 0
    plan = model_plan(str(path), "numpy", n_tokens=4)
    layers = [s["layers"] for s in data_of(plan)["plans"][0]["sections"] if s["layers"]]
    assert [0] in layers or [0, 2, 4] in layers  # windows, then full attention, in turn
    assert not any({a % 2 for a in same} == {0, 1} for same in layers)
    x = gg.label(gg.silu(gg.input("x", ne=(64, 4))), "inp_embd")
    for il, eps in enumerate([1e-5, 1e-6, 1e-5, 1e-6]):
        x = gg.label(gg.rms_norm(x, eps=eps), f"out-{il}")
    sections = data_of(gg.compile({"y": x}))["plans"][0]["sections"]
    assert [section["layers"] for section in sections] == [[], [0, 2], [1, 3]]


def test_a_mask_that_some_layers_share_keeps_them_apart() -> None:
    x = gg.label(gg.silu(gg.input("x", ne=(64, 4))), "inp_embd")
    masks = [gg.label(gg.exp(gg.input(f"m{i}", ne=(64, 4))), f"mask{i}") for i in range(2)]
    for il in range(8):
        x = gg.label(gg.add(x, masks[il % 2]), f"out-{il}")
    sections = data_of(gg.compile({"y": x}))["plans"][0]["sections"]
    layers = [section["layers"] for section in sections if section["layers"]]
    assert not any({il % 2 for il in same} == {0, 1} for same in layers)
    assert max(map(len, layers)) >= 3


def test_a_graph_without_layers_is_one_section() -> None:
    x = gg.input("x", ne=(64, 4))
    data = data_of(gg.compile({"y": gg.silu(gg.rms_norm(x, eps=1e-6))}))["plans"][0]
    assert data["sections"] == [{"name": "graph", "layers": [], "steps": [[0, 1]]}]


def test_a_plan_without_steps_has_a_page(tmp_path: Path) -> None:
    x = gg.input("x", ne=(64, 4))
    plan = gg.compile({"y": x})
    assert not plan.steps and data_of(plan)["plans"][0]["sections"] == []
    assert plan.page(tmp_path / "page.html").stat().st_size > 1000
    assert plan._repr_html_()


# -- other options --------------------------------------------------------------------------------


def test_variants_have_the_memory_that_a_plan_with_them_has(tiny: str) -> None:
    with gguf.open(tiny) as file:
        model = Model(file, options=Options(flash=False))
        planner = Planner(model, [parse("numpy")], {})
        setup = Setup(n_ctx=512, n_batch=256)
        every = list(variants(planner, setup))
        assert [v.change for v in every] == [change.text for change in changes(planner, setup)]
        assert every[0].change == "without -amb -ub 256 -mla 3 -fa off"
        texts = " ".join(variant.change for variant in every)
        for option in ("-amb", "-ub 64", "-ub 128", "-ub 512", "-mla 0", "-mla 1", "-fa on"):
            assert option in texts
        assert "-ub 1024" not in texts  # more than the context
        by_change = {variant.change: variant.memory for variant in every}
        memory = planner.memory(setup)
        assert by_change[every[0].change] == memory
        assert by_change["-ub 64"] == planner.memory(Setup(n_ctx=512, n_batch=64))
        other = Model(file, options=Options(flash=True))
        flash = Planner(other, [parse("numpy")], {}).memory(setup)
        assert by_change["-fa on"] == flash != memory


def test_budgets_are_below_the_peak_and_not_the_current_one(tiny: str) -> None:
    plan = model_plan(tiny, "numpy", flash=False)
    plain = plan.memory.score_peak_plain / 2**20
    sizes = budgets(plan.memory)
    assert sizes and None not in sizes and all(0 < amb < plain for amb in sizes if amb)
    assert budgets(model_plan(tiny, "numpy", mla=1).memory) == []
    now, *others = by_budget(plan)
    assert now.memory == plan.memory and [v.change for v in others] == [
        f"-amb {a:g}" for a in sizes
    ]
    for amb, variant in zip(sizes, others):
        if variant.memory is not None:
            assert variant.memory == model_plan(tiny, "numpy", flash=False, amb=amb).memory
        else:
            assert "amb" in variant.reason
    cut = model_plan(tiny, "numpy", flash=False, amb=sizes[0])
    assert None in budgets(cut.memory) and sizes[0] not in budgets(cut.memory)


# -- the file -------------------------------------------------------------------------------------


def test_nothing_in_a_label_can_leave_the_data(tmp_path: Path) -> None:
    evil = "</script><img src=x onerror=alert(1)>&amp;\u2028-3"
    x = gg.label(gg.silu(gg.input("x", ne=(8,))), evil)
    plan = gg.compile({evil: x})
    text = plan.page(tmp_path / "page.html", title=evil).read_text()
    assert "<img" not in text and text.count("</script>") == 2
    script = re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.DOTALL)
    assert script and json.loads(script[1])["title"] == evil
    for made in (
        plan._repr_html_(),
        plan.memory._repr_html_(),
        plan.profile(x=np.ones(8))._repr_html_(),
    ):
        assert "<img" not in made and "<table>" in made


def test_the_page_loads_nothing(tiny: str) -> None:
    plan = model_plan(tiny, "numpy", n_tokens=8)
    text = text_of(Document("a", [View("a", plan)], plan.memory))
    markup = re.sub(r"<script.*?</script>|<style>.*?</style>", "", text, flags=re.DOTALL)
    assert "default-src 'none'" in markup and "sha256-" in markup
    assert not re.search(r"https?://|src=|@import|url\(", markup)
    style = re.search(r"<style>(.*?)</style>", text, re.DOTALL)
    assert style and not re.search(r"url\(|@import", style[1])


def test_every_asset_is_used() -> None:
    assets = Path(page.__file__).parent / "assets"
    assert {path.name for path in assets.iterdir()} == {*SCRIPTS, "page.html", "page.css"}
    assert all(path.read_text().count("\n") <= 300 for path in assets.iterdir())


def test_a_page_replaces_an_old_one_and_leaves_nothing_else(tmp_path: Path) -> None:
    plan = gg.compile({"y": gg.silu(gg.input("x", ne=(8,)))})
    path = tmp_path / "page.html"
    path.write_text("old")
    assert plan.page(str(path)) == path and path.read_text().startswith("<!doctype html>")
    with pytest.raises(OSError):
        plan.page(tmp_path / "no folder" / "page.html")
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_notebooks_show_memory_steps_and_times(tiny: str) -> None:
    plan = model_plan(tiny, "numpy", n_tokens=8)
    made = plan._repr_html_()
    assert made.count("<table>") == made.count("</table>") >= 4
    for row in plan.memory.devices:
        assert all(f"<td>{cell}</td>" in plan.memory._repr_html_() for cell in row.row())
    assert re.search(r"layers 1, 2, 3, 4: 4 times \d+ steps", made)
    pos = np.arange(8, dtype=np.int32)
    profile = plan.profile(tokens=pos, pos=pos, rows=pos, outputs=[7])
    assert f"{len(plan.steps)} steps" in profile._repr_html_()
