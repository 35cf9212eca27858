"""The record of the GPU benchmarks, tried without a GPU on other scripts and tests."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from benchmarks.bars import BARS
from tools.kernel_record import fingerprint

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
record: Any = importlib.import_module("benchmarks.gpu_record")

ROW = {
    "name": "layer_decode_d4096", "value": 2.0, "unit": "us", "better": "less", "bar": None,
    "goal": None, "peer": None, "samples": [1, 2, 3],
}  # fmt: skip
SCRIPTS = {
    "good": """
from benchmarks import gpu_bench
gpu_bench.write_row("layer_decode_d4096", "us", [3, 1, 2])
gpu_bench.write_clocks("layer", lambda: None, 1e7)
""",
    "bad": """
import sys
from benchmarks import gpu_bench
gpu_bench.write_row("other_d4096", "us", [3, 1, 2])
gpu_bench.write_skipped("v4_whole: no room")
sys.exit("why")
""",
    "late": "import subprocess; subprocess.run(['sleep', '60'])",
    "example": "import sys; open(sys.argv[1], 'w').write(sys.argv[2])",
    "test_gpu_sample": """
import pytest
def test_good(record_property): record_property("memcheck_cases", 7)
def test_bad(): assert False
@pytest.mark.skip(reason="one GPU here")
def test_two(): pass
""",
    "test_gpu_absent": """
import pytest
def test_one(): pytest.skip("nothing here")
""",
}


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """benchmarks.gpu with other parts: among them, one fails after its row and one is late."""
    module = importlib.import_module("benchmarks.gpu")
    for name, text in SCRIPTS.items():
        (tmp_path / f"{name}.py").write_text(text)
    first = '{"rows": [{"cache": "f16", "error": 0.5}, {"cache": "q8_0", "error": 0.1}]}'
    second = '{"rows": [{"cache": "f16", "prompt_error": 0.25, "decode_error": 0.75}]}'

    def script(name: str, *words: str) -> tuple[str, ...]:
        return (str(tmp_path / f"{name}.py"), *words)

    def parts(args: Any, folder: Path) -> Any:
        examples = tuple(
            script("example", str(folder / f"examples_{name}.json"), text)
            for name, text in (("a_default", first), ("b_default", second), ("b_f32", first))
        )
        tests = [str(tmp_path / f"{name}.py") for name in SCRIPTS if name.startswith("test_")]
        junit = ("-p", "no:cacheprovider", f"--junitxml={folder / 'checks.xml'}")
        return {
            "good": module.Part((script("good"),), 30),
            "bad": module.Part((script("bad"), script("good")), 30),
            "late": module.Part((script("late"),), 0.5),
            "examples": module.Part(examples, 30),
            "checks": module.Part((("-m", "pytest", *junit, *tests),), 60),
        }

    machine = {**module.machine(), "gpu": "NVIDIA H100 80GB HBM3"}
    monkeypatch.setattr(module, "machine", lambda: machine)
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "NAMES", ("good", "bad", "late", "examples", "checks"))
    monkeypatch.setattr(module, "parts", parts)
    return module


def record_of(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, Any]:
    """The exit status and the record of a run."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    status = gpu.main()
    (path,) = (gpu.HERE / "results" / "h100").glob("*.json")
    return status, json.loads(path.read_text())


def test_the_record_of_a_part(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    status, result = record_of(gpu, monkeypatch, "good", "--commit", "abc")
    assert status == 0 and result["about"]["faults"] == []
    bar, goal = BARS[ROW["name"]]
    assert result["rows"] == [{**ROW, "samples": [3, 1, 2], "bar": bar, "goal": goal}]
    assert result["commit"] == "abc" and result["kernels"] == fingerprint()
    assert result["command"] == "python benchmarks/gpu.py good"
    assert result["versions"]["numpy"] == np.__version__
    (clocks,) = result["clocks"]
    assert clocks["clocks"] == "layer" and {"sm", "memory", "power"} < clocks.keys()


def test_a_part_that_fails_or_is_late_is_reported_and_the_others_are_measured(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, result = record_of(gpu, monkeypatch)
    assert status == 1
    # Two parts measure one row: the record has it once.
    assert sorted(row["name"] for row in result["rows"][:2]) == [ROW["name"], "other_d4096"]
    faults = ["bad: bad.py: 1", "late: late.py: no end within 0.5 s", "checks: pytest: 1"]
    assert result["about"]["faults"][:3] == faults
    missing = {*result["about"]["faults"]}
    assert "no row parity_failed" in missing
    measured = {"no row layer_decode_d4096", "no row example_worst_error_f16"}
    assert not (measured | {"no row v4_whole_prompt_2048"}) & missing
    out = capsys.readouterr().out
    assert "!! bad: bad.py: 1\n" in out and "why" in out and "no end within" in out
    rows = {r["name"]: (r["value"], r["unit"], len(r["samples"])) for r in result["rows"][2:]}
    assert rows == {
        "example_worst_error_f16": (0.75, "", 3),
        "example_worst_error_q8_0": (0.1, "", 1),
        "example_worst_error_f16_prec_f32": (0.5, "", 1),
        "example_worst_error_q8_0_prec_f32": (0.1, "", 1),
        "memcheck_cases": (7, "cases", 1),
        "sample_failed": (1, "tests", 1),  # and no row for `absent`: none of its tests ran
        "checks_passed": (1, "tests", 1),
    }
    tests = ["test_two: one GPU here", "test_one: nothing here"]
    assert result["about"]["skipped"] == ["v4_whole: no room", *tests]
    assert "skipped: test_two: one GPU here\n" in out


def test_a_row_may_have_a_bar_and_a_plan_of_its_own(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = SCRIPTS["good"].replace("])", "], bar=2.5, planned=2)") + SCRIPTS["good"]
    text = text.replace('"layer_decode_d4096", "us", [3, 1, 2], b', '"own", "GiB", [1, 2, 3], b')
    (tmp_path / "good.py").write_text(text)
    assert status_of(tmp_path / "x.json", gpu, monkeypatch, "good") == 0
    own, layer = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert (own["bar"], own["planned"], own["value"]) == (2.5, 2, 2)
    assert (layer["bar"], layer["goal"]) == gpu.BARS["layer_decode_d4096"]


def test_an_interrupted_test_has_not_passed(tmp_path: Path) -> None:
    case = '<testcase classname="tests.gpu.test_gpu_sample" name="test_one">'
    properties = '<properties><property name="memcheck_cases" value="3"/></properties></testcase>'
    path = tmp_path / "checks.xml"
    path.write_text(f"<testsuites><testsuite>{case}{properties}</testsuite></testsuites>")
    names = [[row["name"] for row in record.report_rows(path, end)[0]] for end in (True, False)]
    assert names == [["memcheck_cases", "sample_failed", "checks_passed"], ["memcheck_cases"]]


def test_two_records_are_joined(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    paths = []
    for part in ("good", "examples"):
        paths.append(tmp_path / f"{part}.json")
        assert status_of(paths[-1], gpu, monkeypatch, part) == 0
    assert status_of(tmp_path / "both.json", gpu, monkeypatch, "--join", *map(str, paths)) == 0
    first, second, joined = (json.loads(p.read_text()) for p in (*paths, tmp_path / "both.json"))
    assert joined["rows"] == first["rows"] + second["rows"] and joined["clocks"] == first["clocks"]
    assert joined["command"] == "python benchmarks/gpu.py good examples"
    assert joined["about"]["seconds"].keys() == {"good", "examples"}
    paths[1].write_text(json.dumps({**second, "kernels": "others"}))
    with pytest.raises(SystemExit, match="they differ in kernels"):
        status_of(tmp_path / "no.json", gpu, monkeypatch, "--join", *map(str, paths))


def status_of(path: Path, gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit status of gpu.py with this output file."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words, "--out", str(path)])
    status: int = gpu.main()
    return status


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla V100-PCIE-16GB", "v100"),
    ],
)
def test_the_folder_of_a_card(name: str, folder: str) -> None:
    assert record.card(name) == folder


def test_every_row_of_the_table_is_measured_by_some_script() -> None:
    """Its name, or a prefix that a script completes, is in the script's source."""
    files = [*BENCHMARKS.glob("gpu*.py"), *(ROOT / "tests" / "gpu").glob("*.py")]
    text = "".join(path.read_text() for path in files)
    prefixes = (
        "mul_mat_vec_", "mul_mat_", "moe_up_gate_iq4_nl_t", "amb_", "example_worst_error_",
        "model_prompt_", "model_decode", "model_standard_decode_loop_d", "model_q8_0_decode_loop_d",
        "model_softmax", "fuzz_", "sparse_indexer_n",
        "sparse_top_k_n", "sparse_gain", "sparse_prompt_", "v4_flash_",
    )  # fmt: skip
    for name in BARS:
        if name.endswith("_of_llama"):
            assert f'"{name.partition("_")[0]}": (' in text  # SETTINGS of gpu_peers.py
            continue
        if name.startswith("v4_whole_"):  # tests/test_v4_benchmark.py compares them
            continue
        assert f'"{name}"' in text or any(
            name.startswith(prefix) and f'f"{prefix}{{' in text for prefix in prefixes
        ), name
