"""The memory of a session: the figures before anything is allocated are those of a real session."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pyggml import gguf
from pyggml.backends import on_host
from pyggml.errors import BudgetError, OutOfMemoryError
from pyggml.generate.division import either, expert_bytes, expert_pins, layer_pins
from pyggml.generate.fit import HOST_ROOM, Planner, Setup, fit, lines, memory
from pyggml.generate.plans import KV_STEP, padded_rows
from pyggml.models.batch import Options
from pyggml.models.indexer import Indexer
from pyggml.models.model import Model
from pyggml.models.presets import TINY, TINY_DEEPSEEK32, TINY_GLM_DSA, TINY_GPT_OSS, TINY_V4
from pyggml.models.synth import synth
from pyggml.node import labels
from pyggml.runtime.leaves import Leaf
from pyggml.runtime.places import Place, parse

SIX = replace(TINY, n_block=6)
MODELS = {
    "tiny": TINY,
    "deepseek2": SIX,
    "gpt-oss": TINY_GPT_OSS,
    "deepseek4": replace(TINY_V4, attn=replace(TINY_V4.attn, top_k=3)),
    "glm-dsa": replace(TINY_GLM_DSA, indexer=Indexer(n_head=8, d=64, top_k=16)),
    "dense to 512": replace(TINY_DEEPSEEK32, indexer=Indexer(n_head=8, d=64, top_k=700)),
}
NEEDS_CPU = pytest.mark.skipif(on_host() != "cpu", reason="pyggml doctor says what is missing")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, arch in MODELS.items():
        synth(folder / f"{name}.gguf", arch, dtype="q8_0")
        synth(folder / f"{name}-header.gguf", arch, dtype="q8_0", header_only=True)
    return folder


def opened(folder: Path, name: str, **options: Any) -> Model:
    chosen = {k: options.pop(k) for k in ("flash", "mla") if k in options}
    file = gguf.open(folder / f"{name}.gguf", allow_missing_data=True)
    return Model(file, options=Options(**chosen), **options)


def allocated(leaves: Iterable[Leaf]) -> int:
    """The bytes of their blocks. On the host, a block may be rows in the file's memory map."""
    blocks = {
        id(leaf.at.buffer): leaf.at.buffer.nbytes
        if leaf.backend.device == "host"
        else len(leaf.at.buffer.data)
        for leaf in leaves
    }
    return sum(blocks.values())


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("name", ["deepseek2", "gpt-oss", "deepseek4", "glm-dsa"])
@pytest.mark.parametrize(
    ("backends", "pins", "decoded"),
    [(("numpy",), None, False), (("numpy",), None, True),
     pytest.param(("cpu",), None, False, marks=NEEDS_CPU),
     pytest.param(("cpu", "numpy"), {"ffn_|cache_": "numpy"}, True, marks=NEEDS_CPU),
     (("null:0",), None, False),
     (("null:0", "numpy"), {"ffn_.*_exps": "numpy"}, False),
     (("null:0", "numpy"), {"ffn_.*_exps": "numpy"}, True),
     pytest.param(("null:0", "cpu"), {"ffn_.*_exps": "cpu"}, False, marks=NEEDS_CPU),
     (("null:0", "null:1"), {r"(blk\.[12]\.|cache_\w+_l[12]$)": "null:1"}, False)],
)  # fmt: skip
def test_a_session_uses_what_the_plan_says(
    folder: Path, name: str, backends: Any, pins: Any, decoded: bool, flash: bool
) -> None:
    """Memory of a header, against the blocks that a session of the whole file allocated."""
    arguments = {"backends": backends, "pins": pins, "flash": flash, "decode_weights": decoded}
    planned = memory(opened(folder, f"{name}-header", **arguments), 24, 8)
    model = opened(folder, name, **arguments)
    session = model.session(24, 8)
    for n in (8, 8):
        session.forward(range(n))
    while session.n_free:
        session.forward([1])
    leaves = session.store._leaves
    for row in planned.devices:
        device = parse(row.device).backend.device
        tables = model.store.shared.weights, leaves.states, leaves.inputs
        expected = [
            allocated(leaf for leaf in table.values() if leaf.backend.device == device)
            for table in tables
        ]
        assert [row.weights, row.states, row.inputs] == expected
        assert row.compute == session.store.arenas[device].nbytes
        assert row.total == sum(expected) + row.compute
    assert set(session.store.arenas) == {
        parse(row.device).backend.device for row in planned.devices
    }
    model.file.close()


@pytest.mark.parametrize("pieces", [None, 2, 5])
@pytest.mark.parametrize(
    ("name", "mla", "flash"),
    [("tiny", 0, False), ("tiny", 1, False), ("tiny", 3, True),
     ("dense to 512", 1, False), ("dense to 512", 3, True), ("deepseek4", 3, True)],
)  # fmt: skip
@pytest.mark.parametrize("place", ["numpy", "cuda:0:1GiB"])
def test_no_plan_of_a_session_needs_more(
    folder: Path, place: str, name: str, mla: int, flash: bool, pieces: int | None
) -> None:
    """All steps of cache rows, for prompts of several lengths, with and without a budget."""
    n_ctx, n_batch = 1536, 160
    model = opened(folder, f"{name}-header", backends=(place,), mla=mla, flash=flash)
    session = model.session(n_ctx, n_batch)
    if pieces is not None:
        model.amb = session.memory().score_peak / 2**20 / pieces
        try:
            model.session(n_ctx, n_batch).memory()
        except BudgetError as error:
            model.amb = error.least * 1.05
        session = model.session(n_ctx, n_batch)
    plans = [
        session.plan(*session.plans.sizes(n_tokens, n_kv, n_outputs), n_outputs)
        for n_tokens in (1, 6, 96, 128, 160)
        for n_kv in {padded_rows(n, n_ctx) for n in range(n_tokens, n_ctx, KV_STEP)}
        for n_outputs in (0, 1)
    ]
    most, real = session.memory(), plans[0].memory_with(*plans)
    for what in ("weights", "states", "compute", "workspace"):
        assert getattr(real, what) <= getattr(most, what), what


# -- dividing the layers ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers", [[0], [3, 4, 5], range(43), range(61), [7, 9, 19, 29, 100, 111]]
)
def test_either_matches_these_numbers_only(numbers: Any) -> None:
    pattern = re.compile(f"^({either(numbers)})$")
    assert [n for n in range(2000) if pattern.match(str(n))] == list(numbers)


def test_layers_are_divided_by_the_sizes_of_devices(folder: Path) -> None:
    model = opened(folder, "deepseek2-header")
    places = [parse("cuda:0:10GiB"), parse("cuda:1:30GiB"), parse("numpy:1GiB")]
    pins = layer_pins(model, places, n_ctx=64, n_batch=8)
    planner = Planner(model, places, {})
    plan = planner.session(Setup(n_ctx=64, n_batch=8)).plan(8, 64, 1)
    home = {label: plan.place_of(n) for n in plan.graph.nodes if n.op.leaf for label in labels(n)}
    layers = {il: home[f"blk.{il}.attn_norm.weight"] for il in range(6)}
    assert list(layers.values()) == sorted(layers.values())
    assert {"cuda:0", "cuda:1"} == set(layers.values())
    for label, place in home.items():
        match = re.match(r"blk\.(\d)\.|cache_kv_l(\d)$", label)
        if match:
            assert place == layers[int(match[1] or match[2])], label
    assert home["token_embd.weight"] == "cuda:0" and home["output.weight"] == "cuda:1"
    share = {row.device: row.weights + row.states for row in plan.memory.devices}
    assert 0.1 < share["cuda:0"] / sum(share.values()) < 0.4
    assert layer_pins(model, places[:1], n_ctx=64, n_batch=8) == {}
    assert len(pins) == 3 and set(expert_pins(2, "cpu").values()) == {"cpu"}


# -- fit --------------------------------------------------------------------------------------


def sized(*bytes_of: tuple[str, int]) -> list[Place]:
    return [parse(f"{name}:{nbytes / 2**10}KiB") for name, nbytes in bytes_of]


def planner(folder: Path, *sizes: tuple[str, int], **options: Any) -> Planner:
    return Planner(opened(folder, "deepseek2-header", **options), sized(*sizes), {})


def test_everything_that_fits_needs_two_plans(folder: Path) -> None:
    big = planner(folder, ("null", 1 << 32))
    assert fit(big, n_ctx=1024, n_batch=64) == Setup(n_ctx=1024, n_batch=64)
    assert big.n_plans == 2


def test_fit_is_the_largest_that_fits(folder: Path) -> None:
    """Each step up of what was chosen no longer fits."""
    whole = planner(folder, ("null", 1 << 40)).memory(Setup(n_ctx=16384, n_batch=512)).total
    some = planner(folder, ("null", whole * 3 // 4), flash=False, mla=1)
    setup = fit(some, n_ctx=65536, n_batch=256, budgets=(8, 16, 32, None))
    assert some.n_plans < 40
    assert some.excess(setup) <= 0 and setup.n_ctx % 256 == 0 and 256 < setup.n_ctx < 65536
    assert some.excess(replace(setup, n_ctx=setup.n_ctx + 256, n_batch=32, amb=8)) > 0
    assert setup.n_batch == 256 or some.excess(replace(setup, n_batch=2 * setup.n_batch, amb=8)) > 0
    if setup.amb is not None:
        larger = next(amb for amb in (16, 32, None) if amb is None or amb > setup.amb)
        assert some.excess(replace(setup, amb=larger)) > 0
    table = lines(some.memory(setup), some.places)
    assert all(line.free is not None and line.free >= 0 for line in table)


def test_fit_puts_few_experts_on_the_host(folder: Path) -> None:
    setup = Setup(n_ctx=512, n_batch=64)
    all_of_it = planner(folder, ("null", 1 << 40)).memory(setup).total
    some = planner(folder, ("null", all_of_it * 3 // 4), ("numpy", 1 << 40))
    chosen = fit(some, n_ctx=512, n_batch=64)
    assert chosen.n_ctx == 512 and chosen.n_batch == 64 and 0 < chosen.host_experts < 6
    assert some.excess(chosen) <= 0
    assert some.excess(replace(chosen, host_experts=chosen.host_experts - 1)) > 0


@pytest.mark.parametrize("decoded", [False, True])
def test_fit_counts_experts_as_the_host_holds_them(folder: Path, decoded: bool) -> None:
    """q8_0 takes 34 bytes for 32 weights in the file, and 128 decoded."""
    model = opened(folder, "deepseek2-header")
    layers = [nbytes for nbytes in expert_bytes(model) if nbytes]
    room = layers[0] * len(layers) * 2  # plus what is not experts; nothing is, without -ngl
    sizes = ("null", 1 << 20), ("numpy", HOST_ROOM + room)
    some = planner(folder, *sizes, decode_weights=decoded)
    number = 1 + 2 * len(layers) * 34 // 128 if decoded else 6  # layer 0 has no experts
    with pytest.raises(OutOfMemoryError, match=f"experts of {number} layers on the host"):
        fit(some, n_ctx=512, n_batch=64)


def test_fit_says_what_is_missing(folder: Path) -> None:
    with pytest.raises(OutOfMemoryError, match="256 tokens in batches of 32 does not fit"):
        fit(planner(folder, ("null", 1 << 20)), n_ctx=4096, n_batch=64)


def test_a_given_budget_that_is_too_small_is_an_error(folder: Path) -> None:
    some = planner(folder, ("null", 1 << 22), flash=False, mla=1)
    with pytest.raises(BudgetError):
        fit(some, n_ctx=4096, n_batch=64, budgets=(0.01,))
