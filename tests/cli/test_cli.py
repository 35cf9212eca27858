"""The command line: exit status, streams, `pyggml info` and `pyggml synth`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

import pyggml
from pyggml import cli, gguf
from pyggml.cli import info, main
from pyggml.errors import OutOfMemoryError
from tests.gguf.gguf_bytes import build, kv, tensor, text

Streams = pytest.CaptureFixture[str]


@pytest.fixture
def tiny(tmp_path: Path, capsys: Streams) -> Path:
    path = tmp_path / "tiny.gguf"
    assert main(["synth", str(path), "--preset", "tiny", "--type", "Q4_K", "--seed", "5"]) == 0
    out, err = capsys.readouterr()
    assert f"{path.stat().st_size:,} bytes" in out and not err
    return path


def test_help_and_usage(capsys: Streams) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in cli.COMMANDS)
    for name in cli.COMMANDS:
        assert main([name, "--help"]) == 0
        assert "pyggml" in capsys.readouterr().out
    for wrong in ([], ["nothing"], ["synth"], ["info", "x", "--no"], ["synth", "x", "--type", "q9"],
                  ["synth", "x", "--seed", "-1"], ["synth", "x", "--layers", "two"]):  # fmt: skip
        assert main(wrong) == 2
        out, err = capsys.readouterr()
        assert not out and "usage" in err


def test_version(capsys: Streams) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"pyggml {pyggml.__version__}\n"


def test_errors_are_one_line_on_stderr(
    tmp_path: Path, capsys: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    for words in (
        ["info", str(tmp_path / "missing")],
        ["synth", str(tmp_path / "no" / "x")],
        ["synth", str(tmp_path)],
    ):
        assert main(words) == 1
        out, err = capsys.readouterr()
        assert not out and err.startswith("pyggml: error: ") and err.count("\n") == 1
        assert "Errno" not in err

    def fail(_: object) -> int:
        raise OutOfMemoryError("two\nlines")

    monkeypatch.setattr(info, "run", fail)
    assert main(["info", "x"]) == 1
    assert capsys.readouterr().err == "pyggml: error: two lines\n"


def test_warnings_are_one_line_on_stderr(capsys: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(_: object) -> int:
        warnings.warn("look out", stacklevel=2)
        return 0

    monkeypatch.setattr(info, "run", warn)
    assert main(["info", "x"]) == 0
    assert capsys.readouterr().err == "pyggml: warning: look out\n"


def test_interrupt(monkeypatch: pytest.MonkeyPatch, capsys: Streams) -> None:
    def stop(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", stop)
    assert main(["info", "x"]) == 130
    assert capsys.readouterr().err == "pyggml: interrupted\n"


def test_info_text(tiny: Path, capsys: Streams) -> None:
    assert main(["info", str(tiny)]) == 0
    out, err = capsys.readouterr()
    assert not err and "GGUF v3" in out and "missing" not in out
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.strip()}
    assert rows["deepseek2.block_count"] == ["3"]
    assert rows["deepseek2.rope.scaling.factor"] == ["40"]
    assert rows["tokenizer.ggml.tokens"][:2] == ["512", "x"]
    assert rows["blk.*.ffn_gate_exps.weight"] == ["q4_K", "[256,", "128,", "8]", "x", "2"]


def test_info_json(tiny: Path, capsys: Streams) -> None:
    assert main(["info", str(tiny), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["complete"] is True and report["version"] == 3
    assert report["keys"]["general.architecture"] == "deepseek2"
    assert report["keys"]["tokenizer.ggml.tokens"]["length"] == 512
    assert report["keys"]["tokenizer.ggml.merges"] == ["a b"]
    with gguf.open(tiny) as file:
        assert [t["name"] for t in report["tensors"]] == list(file.tensors)
        assert report["parameters"] == sum(t.n_elements for t in file.tensors.values())


def test_info_of_a_header(tmp_path: Path, capsys: Streams) -> None:
    path = str(tmp_path / "h.gguf")
    assert main(["synth", path, "--preset", "tiny", "--header-only"]) == 0
    assert main(["info", path]) == 0
    assert "weights missing" in capsys.readouterr().out


def test_info_of_hostile_names_and_numbers(tmp_path: Path, capsys: Streams) -> None:
    path = tmp_path / "x.gguf"
    keys = [kv("bell\x07", 8, text("\x1b[31m")), kv("nan", 6, b"\0\0\xc0\x7f")]
    path.write_bytes(build(keys, [tensor("\x1b[2J", (8,))], bytes(32)))
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\x07" not in out and r"bell\x07" in out
    assert main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["keys"]["nan"] == "nan"


def test_closed_pipe_is_silent(tiny: Path) -> None:
    command = [sys.executable, "-m", "pyggml", "info", str(tiny)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 1


@pytest.mark.parametrize(("target", "status"), [("/dev/full", 1), ("&-", 0)])
def test_output_that_cannot_be_written(tiny: Path, target: str, status: int) -> None:
    command = f"{sys.executable} -m pyggml info {tiny} >{target}"
    done = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == status
    assert done.stderr == ("pyggml: error: No space left on device\n" if status else "")


@pytest.mark.parametrize(
    ("signum", "status", "line"),
    [(signal.SIGTERM, 143, b""), (signal.SIGINT, 130, b"pyggml: interrupted\n")],
)
def test_an_interrupted_synth_leaves_no_file(
    tmp_path: Path, signum: int, status: int, line: bytes
) -> None:
    words = ["synth", str(tmp_path / "x"), "--preset", "deepseek-v2-lite", "--layers", "6"]
    process = subprocess.Popen([sys.executable, "-m", "pyggml", *words], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status and err == line and not list(tmp_path.iterdir())


def test_info_names_the_support(tmp_path: Path, capsys: Streams) -> None:
    def support(path: Path) -> str:
        assert main(["info", str(path)]) == 0
        out = capsys.readouterr().out
        assert main(["info", str(path), "--json"]) == 0
        (line,) = (x for x in out.splitlines() if x.startswith("support: "))
        assert json.loads(capsys.readouterr().out)["support"] == line.removeprefix("support: ")
        return line.removeprefix("support: ")

    path = tmp_path / "m.gguf"
    for name in ("gpt-oss-20b", "llama-3.1-8b", "qwen3-30b-a3b", "glm-4.5-air", "deepseek-v3"):
        assert main(["synth", str(path), "--preset", name, "--layers", "2", "--header-only"]) == 0
        capsys.readouterr()
        assert support(path) == "supported"
    path.write_bytes(build([kv("general.architecture", 8, text("bert"))]))
    assert support(path).startswith("not supported: architecture 'bert' is unknown")
    path.write_bytes(build([kv("general.architecture", 8, text("llama"))]))
    assert support(path).startswith("not supported: key 'llama.block_count': is missing")
