"""The GPU's record and the parity workers, without a GPU: other scripts, the NumPy backend."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.base import Address
from pyggml.dtypes import dtype
from pyggml.node import Spec
from pyggml.parity import running
from pyggml.parity.case import Case
from pyggml.parity.cases import cases
from tests.cuda.conftest import Machine

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`script(name)` imports a file of benchmarks/."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(sys, "path", list(sys.path))  # gpu.py adds to it
    return importlib.import_module


# -- memory that is mirrored ------------------------------------------------------------------


@pytest.fixture
def mirror(script: Any) -> Iterator[Any]:
    """A mirror of the NumPy backend in its place."""
    module = importlib.import_module("pyggml.backends.numpy")
    device = module.device
    made = script("gpu_mirror").Mirrored(backends.get("numpy"), 1 << 20)
    made.install()
    yield made
    module.device = device
    backends.get.cache_clear()


def test_a_mirrored_backend_gives_the_same_outcomes_and_keeps_nothing(mirror: Any) -> None:
    some = [*cases()[::60], Case.parse("add(f32[100000,5], f32[100000,5])")]
    mirrored = [running.tested(case, "numpy") for case in some]
    assert backends.get("numpy") is mirror and mirror.seconds > 0
    assert mirror.live == mirror.top == 0
    importlib.import_module("pyggml.backends.numpy").device = lambda index: mirror.backend
    backends.get.cache_clear()
    assert mirrored == [running.tested(case, "numpy") for case in some]


def test_a_kernel_that_writes_beside_its_own_on_the_device_is_found(mirror: Any) -> None:
    case = Case.parse("relu(f32[64,5])")
    with running.restored("numpy") as table:
        row = table.KERNELS[gg.relu]

        def run(*args: Any, **named: Any) -> None:
            row.run(*args, **named)
            mirror.there[mirror.top - 1] ^= 1  # the last guard of what is in use

        table.KERNELS[gg.relu] = replace(row, run=run)
        outcome = running.tested(case, "numpy")
    assert outcome.status == "fail" and "wrote past" in outcome.why


def test_rows_far_apart_are_copied_one_by_one(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies between them is neither read nor written."""
    machine("gpu")
    device: Any = backends.get("cuda")
    spec, step = Spec.of(dtype("f16"), (40, 3, 2)), 20 << 20
    at = Address(device.alloc(6 * step), 64, (2, step, 3 * step, 6 * step))
    values = np.random.default_rng(0).standard_normal((2, 3, 40)).astype(np.float16)
    copied: list[int] = []
    upload, download = device.staging.upload, device.staging.download

    def up(ptr: int, data: Any) -> None:
        copied.append(len(data))
        upload(ptr, data)

    def down(data: Any, ptr: int) -> None:
        copied.append(len(data))
        download(data, ptr)

    monkeypatch.setattr(device.staging, "upload", up)
    monkeypatch.setattr(device.staging, "download", down)
    device.upload(at, spec, values)
    np.testing.assert_array_equal(device.download(at, spec), values)
    assert copied == [80] * 12
    row = Address(at.buffer, 64 + 4 * step, (2, 80, 80, 80))
    np.testing.assert_array_equal(device.download(row, Spec.of(dtype("f16"), (40,))), values[1, 1])


# -- workers ----------------------------------------------------------------------------------


def test_workers_check_every_case_and_outlive_one_that_ends_its_process(
    script: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parity = script("gpu_parity")
    monkeypatch.setattr(parity, "CHUNK", 3)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    good = [str(case) for case in cases()[:5]]
    lines = [*good[:1], "no case at all", *good[1:]]
    outcomes, spent = parity.checked(lines, 2, 60, "numpy")
    assert sorted(o[0] for o in outcomes) == sorted(lines)
    failed = [o for o in outcomes if o[1] != "ok"]
    assert [(o[0], o[1]) for o in failed] == [("no case at all", "fail")]
    assert "the worker died" in failed[0][2] and "is no case" in failed[0][2]
    assert spent and all(s["cases"] >= s["runs"] > 0 for s in spent)
    assert parity.checked(lines, 1, 0, "numpy") == ([], [])


# -- the record -------------------------------------------------------------------------------

ROW = {"name": "layer_decode_d4096", "value": 2.0, "unit": "us", "samples": [1, 2, 3]}
WRITES = """
import os, sys
sys.path.insert(0, {benchmarks!r})
import gpu_bench
gpu_bench.tell("layer_decode_d4096", "us", [3, 1, 2])
gpu_bench.tell_clocks("layer", lambda: None, 1e7)
"""


@pytest.fixture
def gpu(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """gpu.py with three parts: one measures, one fails after its row, one never ends."""
    module: ModuleType = script("gpu")
    good = WRITES.format(benchmarks=str(BENCHMARKS))
    scripts = {
        "good": good,
        "bad": good.replace("layer_decode", "other") + "print('why'); sys.exit(3)",
        "late": "import subprocess; subprocess.run(['sleep', '60'])",
        "example": "import sys; open(sys.argv[1], 'w').write(sys.argv[2])",
    }
    for name, text in scripts.items():
        (tmp_path / f"{name}.py").write_text(text)
    one = '{"rows": [{"cache": "f16", "error": 0.5}, {"cache": "q8_0", "error": 0.1}]}'
    two = '{"rows": [{"cache": "f16", "prompt_error": 0.25, "decode_error": 0.75}]}'

    def parts(args: Any, folder: Path) -> Any:
        examples = tuple(
            ("example.py", str(folder / f"examples_{name}.json"), text)
            for name, text in (("a_default", one), ("b_default", two), ("b_f32", one))
        )
        return {
            "good": module.Part((("good.py",),), 30),
            "bad": module.Part((("bad.py",), ("good.py",)), 30),
            "late": module.Part((("late.py",),), 0.5),
            "examples": module.Part(examples, 30),
        }

    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "NAMES", ("good", "bad", "late", "examples"))
    monkeypatch.setattr(module, "parts", parts)
    return module


def recorded(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, Any]:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    status = gpu.main()
    (path,) = (gpu.HERE / "results" / "h200").glob("*.json")
    return status, json.loads(path.read_text())


def test_the_record_of_a_part(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    status, found = recorded(gpu, monkeypatch, "good", "--commit", "abc")
    assert status == 0 and found["faults"] == []
    assert found["rows"] == [{**ROW, "samples": [3, 1, 2]}]
    assert found["commit"] == "abc" and found["kernels"] == gpu.fingerprint()
    assert found["command"] == "python benchmarks/gpu.py good"
    assert found["machine"]["numpy"] == np.__version__
    (clocks,) = found["clocks"]
    assert clocks["clocks"] == "layer" and {"sm", "memory", "power"} < clocks.keys()


def test_a_part_that_fails_or_is_late_is_loud_and_the_others_are_measured(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = recorded(gpu, monkeypatch)
    assert status == 1
    # Two scripts of a part run beside each other.
    names = [ROW["name"], ROW["name"], "other_d4096"]
    assert sorted(row["name"] for row in found["rows"][:3]) == names
    assert found["faults"][:2] == ["bad: bad.py: 3", "late: late.py: no end within 0.5 s"]
    assert "no row parity_failed" in found["faults"]
    assert not {"no row layer_decode_d4096", "no row example_worst_error_f16"} & {*found["faults"]}
    out = capsys.readouterr().out
    assert "!! bad: bad.py: 3\n" in out and "why" in out and "no end within" in out
    worst = {r["name"]: (r["value"], len(r["samples"])) for r in found["rows"][3:]}
    assert worst == {
        "example_worst_error_f16": (0.75, 3),
        "example_worst_error_q8_0": (0.1, 1),
        "example_worst_error_f16_prec_f32": (0.5, 1),
        "example_worst_error_q8_0_prec_f32": (0.1, 1),
    }


def test_every_row_that_is_wanted_is_measured_by_some_script() -> None:
    """By name, or by the beginning of one that a script completes."""
    told = "".join(path.read_text() for path in BENCHMARKS.glob("gpu*.py"))
    begins = ("mul_mat_vec_", "mul_mat_", "moe_up_gate_iq4_nl_t", "amb_", "example_worst_error_")
    for name in importlib.import_module("tools.tables").BARS:
        assert f'"{name}"' in told or any(
            name.startswith(b) and f'f"{b}{{' in told for b in begins
        ), name
