"""`pyggml plan`."""

from __future__ import annotations

import argparse
import json
import shlex
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from pyggml import gguf
from pyggml.backends import on_host
from pyggml.cli import main, parser_of
from pyggml.cli.model_options import layer_pins, open_model
from pyggml.dtypes import TYPES
from pyggml.errors import DeviceError
from pyggml.models import synth
from pyggml.models.model import Model
from tests.work import work

ROOT = Path(__file__).resolve().parent.parent.parent
Streams = pytest.CaptureFixture[str]


@pytest.fixture
def header(tmp_path: Path, capsys: Streams) -> Path:
    path = tmp_path / "v3.gguf"
    words = ["synth", str(path), "--preset", "deepseek-v3", "--layers", "6", "--header-only"]
    assert main(words) == 0
    capsys.readouterr()
    return path


def plan(capsys: Streams, *words: str, status: int = 0) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == status
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def check_memory(args: argparse.Namespace, report: dict[str, Any]) -> None:
    """A session with these options of `pyggml run` takes the memory that the report says."""
    with open_model(args) as model:
        rows = {r.device: r for r in model.session(args.c, args.ub).memory().devices}
    for device in report["devices"]:
        row = rows[device["device"]]
        assert (row.weights, row.states, row.compute) == (
            device["weights"], device["caches"], device["compute"]
        )  # fmt: skip


def test_devices_are_numbered(header: Path, capsys: Streams) -> None:
    devices = ["--device", "cuda:80GiB", "--device", "cuda:60GiB", "--device", "host:100GiB"]
    report = plan(capsys, "-m", str(header), "-c", "1024", *devices)
    assert [(d["device"], d["size"]) for d in report["devices"]] == [
        ("cuda:0", 80 << 30), ("cuda:1", 60 << 30)
    ]  # fmt: skip
    for device in report["devices"]:
        parts = ("weights", "caches", "inputs", "compute", "workspace", "driver_estimate")
        assert device["total"] == sum(device[part] for part in parts)
        assert device["free"] == device["size"] - device["total"] > 0
    assert report["fits"] and report["pinned"] == 56 << 20
    for wrong in (
        ["cuda:1:1GiB", "cuda:1:2GiB"],
        ["host:1GiB", "host:2GiB"],
        ["cpu:1GiB", "numpy:2GiB"],
        ["cuda:big"],
        ["x:1GiB"],
    ):
        assert main(["plan", "-m", str(header), *(w for d in wrong for w in ("--device", d))]) == 2
        assert capsys.readouterr().err.startswith("pyggml: error: ")


def test_text_and_status(header: Path, capsys: Streams) -> None:
    words = ["plan", "-m", str(header), "-c", "1024", "-ub", "64", "--device"]
    assert main([*words, "cuda:1GiB"]) == 1
    out = capsys.readouterr().out
    assert "cuda:0 is too small" in out and "driver (estimate)" in out and "It fits" not in out
    assert main([*words, "cuda:100GiB"]) == 0
    out = capsys.readouterr().out
    assert "It fits" in out
    assert out.splitlines()[-1].startswith(f"pyggml run -m {header} -c 1024 -ub 64")


def test_the_command_of_a_fit_has_the_planned_memory(tmp_path: Path, capsys: Streams) -> None:
    """The printed words, read by `pyggml run`'s own parser, give a session of the same size."""
    path = str(tmp_path / "t.gguf")
    assert main(["synth", path, "--preset", "tiny", "--layers", "5", "--type", "q8_0"]) == 0
    capsys.readouterr()
    whole = plan(capsys, "-m", path, "-c", "512", "-ub", "64", "--device", "null:1GiB")
    size = f"null:{whole['devices'][0]['total'] * 3 // 4 / 1024}KiB"
    devices = ["--device", size, "--device", "host:4GiB"]
    report = plan(capsys, "-m", path, "-c", "512", "-ub", "64", *devices, "--fit", "-ctk", "f32")
    assert report["fits"] and report["host_experts"] and report["plans"] < 40
    words = shlex.split(report["command"])
    assert words[:2] == ["pyggml", "run"]
    args = parser_of("run").parse_args([*words[2:], "-p", "x"])
    check_memory(args, report)


def test_what_fit_chooses_fits_with_the_plan_for_one_token(tmp_path: Path, capsys: Streams) -> None:
    """On CUDA, that plan stores some weights of V3 in a second layout."""
    path = str(tmp_path / "v3.gguf")
    words = ["synth", path, "--preset", "deepseek-v3", "--layers", "6", "--header-only"]
    assert main(words) == 0
    capsys.readouterr()
    devices = ["--device", "cuda:4GiB", "--device", "host:100GiB"]
    report = plan(capsys, "-m", path, *devices, "--fit")
    assert report["fits"] and report["host_experts"] and report["n_ctx"] > 65536


@pytest.mark.parametrize(
    ("place", "decoded"), [("numpy", False), ("numpy", True), ("cpu", False), ("host", False)]
)
def test_weights_of_the_host_are_those_of_its_backend(
    tmp_path: Path, capsys: Streams, place: str, decoded: bool
) -> None:
    """As in the file, as f32, or in tiles; "host" is the backend that `auto` would take."""
    path = str(tmp_path / "t.gguf")
    assert main(["synth", path, "--preset", "tiny", "--layers", "3", "--type", "q4_K"]) == 0
    capsys.readouterr()
    words = ["-m", path, "-c", "256", "-ub", "32", *["--decode-weights"] * decoded]
    devices = ["--device", "null:1GiB", "--device", f"{place}:4GiB", "-ngl", "2"]
    name = on_host() if place == "host" else place
    row = next(r for r in plan(capsys, *words, *devices)["devices"] if r["device"] == name)
    with gguf.open(path) as file:
        pins = layer_pins(2, 3, ["null", name], tied=False)
        model = Model(file, backends=["null", name], pins=pins, decode_weights=decoded)
        expected = next(r for r in model.session(256, 32).memory().devices if r.device == name)
        in_file = sum(
            t.nbytes for n, t in file.tensors.items() if n.startswith(("blk.0.", "blk.1."))
        )
    assert row["weights"] == expected.weights
    assert (row["weights"] > 5 * in_file) == decoded
    assert (row["weights"] == in_file) == (name == "numpy" and not decoded)


def test_decoded_weights_need_numpy(header: Path, capsys: Streams) -> None:
    words = ["plan", "-m", str(header), "--device", "null:1GiB", "--decode-weights"]
    assert main(words) == 1
    assert "null:0 cannot keep weights decoded; numpy can" in capsys.readouterr().err


def test_layers_on_the_host(header: Path, capsys: Streams) -> None:
    devices = ["--device", "cuda:0:100GiB", "--device", "host:100GiB"]
    whole = plan(capsys, "-m", str(header), "-c", "512", *devices)
    part = plan(capsys, "-m", str(header), "-c", "512", *devices, "-ngl", "2")
    assert len(whole["devices"]) == 1
    gpu, host = part["devices"]
    assert host["caches"] == 5 * whole["devices"][0]["caches"] // 6
    assert host["weights"] > gpu["weights"] > 0
    assert host["pinned"] == 28 << 20


def test_the_whole_of_v3_is_planned_within_a_second(tmp_path: Path) -> None:
    """A prompt and a decode plan: 17 million lines and calls, which take 0.5 s."""
    path = tmp_path / "v3.gguf"
    assert main(["synth", str(path), "--preset", "deepseek-v3", "--header-only"]) == 0
    words = ["plan", "-m", str(path), "-c", "16384", "--device", "cuda:80GiB"]
    assert work(lambda: main(words)) < 30_000_000


@pytest.mark.parametrize("preset", ["deepseek-v2-lite", "deepseek-v3.2", "gpt-oss-120b"])
def test_the_tables_of_the_memory_page_are_up_to_date(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If this fails, run python tools/memory_record.py && python tools/tables.py"""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    record = import_module("memory_record")
    rows = json.loads(record.RECORD.read_text())["rows"]
    row = next(row["case"] for row in rows if row["model"] == preset)
    case = {key: row[key] for key in ("mla", "fa", "amb", "n_ctx")}
    assert case | record.measure(record.header(preset, tmp_path), case) == row


def test_v4_flash_with_experts_of_iq3_xxs_fits_one_card(
    tmp_path: Path, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """141 GB, 8192 tokens, all else q8_0. A GPU has each weight in the bytes of the file."""
    chosen = synth._type_of
    monkeypatch.setattr(
        synth,
        "_type_of",
        lambda leaf, ne, t: t if "_exps." in leaf else chosen(leaf, ne, TYPES["q8_0"]),
    )
    path = str(tmp_path / "v4.gguf")
    words = ["--preset", "deepseek-v4-flash", "--type", "iq3_xxs", "--header-only"]
    assert main(["synth", path, *words]) == 0
    capsys.readouterr()
    report = plan(capsys, "-m", path, "-c", "8192", "-ub", "1", "--device", "cuda:0:131.3GiB")
    (card,) = report["devices"]
    with gguf.open(path, allow_missing_data=True) as file:
        experts = {t.dtype.name for name, t in file.tensors.items() if "_exps." in name}
        nbytes = sum(t.nbytes for t in file.tensors.values())
    assert experts == {"iq3_xxs"} and nbytes == 114_075_287_900
    assert 0 <= card["weights"] - nbytes < 1 << 14  # and constants of the graph
    assert report["fits"] and card["free"] > 20e9


def test_no_such_device() -> None:
    from pyggml.cli.plan import places_of

    args = parser_of("plan").parse_args(["-m", "x", "--device", "cuda:0", "--device", "cuda:0"])
    with pytest.raises(DeviceError, match="twice"):
        places_of(args)
