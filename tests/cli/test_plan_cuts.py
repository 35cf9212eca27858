"""`pyggml plan --fit` over several devices: which cut it chooses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pyggml import gguf
from pyggml.cli import main, parser_of
from pyggml.generate.cuts import candidates
from pyggml.generate.fit import Planner, Setup
from pyggml.generate.sampled import Sampled
from pyggml.models.model import Model
from pyggml.models.presets import preset
from pyggml.models.synth import synth
from pyggml.runtime.places import parse
from pyggml.runtime.shards import shard_of, with_shares
from tests.cli.test_plan import check_memory

Streams = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cuts") / "tiny.gguf"
    synth(path, preset("tiny-llama", layers=3))
    return path


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("experts") / "tiny.gguf"
    synth(path, preset("tiny", layers=3))
    return path


def plan(capsys: Streams, *words: str, status: int = 0) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["plan", *words, "--json"]) == status
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def devices(*sizes: float) -> list[str]:
    """Of these sizes in MiB."""
    return [word for mib in sizes for word in ("--device", f"null:{mib}MiB")]


# -- what is tried ------------------------------------------------------------------------------


def test_candidates(experts: Path) -> None:
    with gguf.open(experts) as file:
        cuts = list(candidates(Model(file), 4))
    assert len(cuts) == 2 * 11 + 1 and len({str(each) for each in cuts}) == len(cuts)
    assert {"layers": 4} in cuts and {"layers": 2, "heads": 2, "rows": 2} in cuts
    assert all(each.get("layers", 1) * max([1, *(n for k, n in each.items() if k != "layers")]) == 4
               for each in cuts)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "cuts"),
    [
        ("tiny", {"heads": 2, "experts": 2, "rows": 2}),
        ("tiny-qwen3moe", {"layers": (2.0, 1.0), "heads": 2}),
        ("tiny", {"layers": 2, "sequence": 2, "experts": 2}),
        ("tiny-deepseek32", {"layers": 2}),
        ("tiny-gpt-oss", {"heads": (3, 1)}),
    ],
)
def test_a_few_layers_have_the_memory_and_the_time_of_all(
    name: str, cuts: Any, tmp_path: Path
) -> None:
    """Weights and caches are equal. In these small models, what is before and after the layers is a
    large part of the arenas, and each stage of the estimate has both."""
    path = tmp_path / "model.gguf"
    synth(path, preset(name, layers=5))
    count = 4 if isinstance(cuts, dict) and len(cuts) > 1 and "layers" in cuts else 2
    places = [parse(f"null:{i}:1GiB") for i in range(count)]
    setup = Setup(n_ctx=256, n_batch=32)
    with gguf.open(path) as file:
        model = Model(file, shard=cuts)
        sampled = Sampled(Model(file), places, {}, (), cuts)
        few, all_ = sampled.memory(setup), Planner(model, places, {}, ()).memory(setup)
        times = sampled.times(setup), Planner(model, places, {}, ()).times(setup)
    assert [row.device for row in few.devices] == [row.device for row in all_.devices]
    for one, other in zip(few.devices, all_.devices):
        assert (one.weights, one.states) == (other.weights, other.states)
        assert 0.9 * other.compute <= one.compute <= 1.5 * other.compute
    for one_time, other_time in zip(*times):
        assert abs(one_time.total - other_time.total) < 0.1 * other_time.total


def test_a_prompt_whose_experts_end_with_the_next_norm(tmp_path: Path) -> None:
    """On GPUs, a step goes over the border between two layers."""
    places = [parse(f"cuda:{i}:80GiB") for i in range(2)]
    cuts: Any = {"heads": 2, "experts": 2}
    synth(
        tmp_path / "lite.gguf",
        preset("deepseek-v2-lite", layers=6),
        dtype="iq4_nl",
        header_only=True,
    )
    with gguf.open(tmp_path / "lite.gguf", allow_missing_data=True) as file:
        setup = Setup(n_ctx=2048, n_batch=2048)
        sampled, _ = Sampled(Model(file), places, {}, (), cuts).times(setup)
        exact, _ = Planner(Model(file, shard=cuts), places, {}, ()).times(setup)
    assert sampled.total == pytest.approx(exact.total, rel=0.05)


def test_parts_for_places_without_sizes() -> None:
    places = [parse(f"null:{i}:{size}GiB") for i, size in enumerate((80, 80, 20, 20))]
    plain = [parse(f"null:{i}") for i in range(4)]
    for cuts in ({"heads": 4}, {"layers": 2, "rows": 2}, {"heads": (1.0,) * 4}, "auto"):
        one, other = shard_of(cuts, places), shard_of(with_shares(cuts, places), plain)
        assert one is not None and other is not None and one.cuts == other.cuts
        assert [s / sum(one.shares) for s in one.shares] == pytest.approx(
            [s / sum(other.shares) for s in other.shares]
        )
        assert one.stages[0] / sum(one.stages) == pytest.approx(other.stages[0] / sum(other.stages))
    equal = shard_of({"heads": (1.0,) * 4}, places)
    assert equal is not None and equal.shares == (1.0,) * 4


# -- what is chosen -----------------------------------------------------------------------------


def test_the_fastest_of_those_that_fit(path: Path, capsys: Streams) -> None:
    report = plan(capsys, "-m", str(path), "-c", "256", "-ub", "32", *devices(512, 512), "--fit")
    tried = report["tried"]
    assert report["fits"] and report["n_ctx"] == 256 and report["shard"] == tried[0]["shard"]
    costs = [512 / 32 * t["prompt_seconds"] + 128 * t["token_seconds"] for t in tried]
    assert len(tried) == 6 and costs == sorted(costs)


@pytest.mark.parametrize("uneven", [False, True])
def test_the_command_has_the_planned_memory(path: Path, capsys: Streams, uneven: bool) -> None:
    """With little memory: the cut, the context and the batch are chosen together."""
    words = ["-m", str(path), "-c", "1024", "-ub", "64"]
    whole = plan(capsys, *words, "--device", "null:1GiB")["devices"][0]["total"] / 2**20
    sizes = (0.7 * whole, 0.4 * whole) if uneven else (0.4 * whole, 0.4 * whole)
    report = plan(capsys, *words, *devices(*sizes), "--fit")
    assert report["fits"] and report["n_ctx"] < 1024
    command = shlex.split(report["command"])
    args = parser_of("run").parse_args([*command[2:], "-p", "x"])
    check_memory(args, report)
    shard = command[command.index("--shard") + 1]
    assert parser_of("bench").parse_args(["-m", "x", "--shard", shard]).shard == args.shard
    assert (":" in shard) == uneven


def test_the_command_runs(path: Path, capsys: Streams) -> None:
    report = plan(capsys, "-m", str(path), "-c", "256", "-ub", "32", *devices(9, 9), "--fit")
    words = shlex.split(report["command"])
    assert main([*words[1:], "-p", "hello", "-n", "2"]) == 0


def test_experts_on_the_host(experts: Path, capsys: Streams) -> None:
    words = ["-m", str(experts), "-c", "256", "-ub", "32", "--fit", "--shard", "heads=2"]
    host = ["--device", "host:4GiB"]
    report = plan(capsys, *words, *devices(2.8, 2.8), *host)
    assert report["fits"] and report["host_experts"] and "_exps" in report["command"]
    assert plan(capsys, *words, *devices(64, 64), *host)["host_experts"] == 0


def test_a_cut_that_is_given(path: Path, capsys: Streams) -> None:
    words = ["-m", str(path), "-c", "256", *devices(64, 64), "--fit", "--shard", "heads=2"]
    report = plan(capsys, *words)
    assert report["shard"] == "heads=2" and len(report["tried"]) == 1


def test_text(path: Path, capsys: Streams) -> None:
    capsys.readouterr()
    assert main(["plan", "-m", str(path), "-c", "256", *devices(3.6, 3.6), "--fit"]) == 0
    out = capsys.readouterr().out
    assert "Cuts that fit, by " in out and "request, ms" in out and "Too large with" in out


def test_nothing_fits(path: Path, capsys: Streams) -> None:
    capsys.readouterr()
    assert main(["plan", "-m", str(path), *devices(1, 1), "--fit"]) == 1
    err = capsys.readouterr().err
    assert "no cut fits; " in err and "MiB too much on one device" in err
    small = ["--device", "cuda:4KiB", "--device", "cuda:4KiB"]
    assert main(["plan", "-m", str(path), *small, "--fit"]) == 1
    assert "no cut fits: the weights alone are at least " in capsys.readouterr().err
    words = ["plan", "-m", str(path), *devices(64, 64), "--fit", "-fa", "off", "--shard"]
    assert main([*words, "sequence=2"]) == 1
    assert "shard={'sequence': 2}: nothing in the graph is divided so" in capsys.readouterr().err
