"""`pyggml graph`: how a model's graph runs, as text and as a drawing."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyggml import gguf
from pyggml.cli import main
from tests import dot_syntax


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    assert main(["synth", str(path), "--preset", "tiny", "--layers", "6"]) == 0
    return str(path)


def test_experts_on_the_host(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "-m", tiny, "--backend", "null,numpy", "-ot", "exps=numpy"]) == 0
    out = capsys.readouterr().out
    # Five layers have experts. Each sends to the host, goes on, and gets the result of the host.
    assert re.search(r"21 splits, \d+ steps, \d+ copies of", out)
    assert "split 1 on numpy:" in out and "after split 0" in out
    assert re.search(r"copy\(ffn_moe_topk-1\) .* from null:0", out)
    assert re.search(r"the last \d+ rows \d times more", out)
    assert re.search(r"^ +all \|", out, re.MULTILINE)
    assert "; @N is byte N of it" in out and "plain: without a budget" in out
    columns = {line.index(" f32 [") for line in out.splitlines() if re.search(r"\] +@\d", line)
               and " f32 [" in line}  # fmt: skip
    assert columns == {42}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["-fa", "off"],
        ["-fa", "off", "-amb", "1", "-c", "256"],
        ["--backend", "null,numpy", "-ot", r"exps=numpy,blk\.[34]\.=null:1"],
    ],
)
def test_every_end_of_an_edge_is_drawn_once(tiny: str, words: list[str], tmp_path: Path) -> None:
    out = tmp_path / "plan.dot"
    assert main(["graph", "-m", tiny, "--dot", str(out), *words]) == 0
    text = out.read_text()
    drawing = dot_syntax.read(text)
    assert {end for edge in drawing.edges for end in edge} == set(drawing.nodes)
    assert all(name.startswith("out") for name in drawing.loose)
    assert "split 0 on" in text
    if "-ot" not in words:  # all layers are equal, so they are drawn once
        assert re.search(r"\(\d times\)", text)


def test_a_drawing_goes_to_stdout(
    tiny: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["graph", "-m", tiny, "--dot", "-"]) == 0
    out, err = capsys.readouterr()
    assert dot_syntax.read(out).boxes and not err and not list(tmp_path.iterdir())
    dot_syntax.drawn_by_dot(out)


def test_a_comma_inside_a_pattern_is_part_of_it(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["graph", "-m", tiny, "--backend", "null,numpy", "-ot", r"blk\.0{0,1}5\.=null:1"]
    assert main(words) == 0
    assert "on null:1" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, why",
    [
        (["-fa", "off", "-amb", "0.0001"], "amb=0.0001 MiB is too small"),
        (["-ub", "500"], "does not fit"),
    ],
)
def test_errors_are_one_line(
    tiny: str, words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["graph", "-m", tiny, *words]) == (2 if "-ub" in words else 1)
    err = capsys.readouterr().err
    assert why in err and err.count("\n") == 1


@pytest.mark.parametrize("words", [["graph", "-m"], ["parity", "-m"]])
def test_a_header_without_weights(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "head.gguf"
    assert main(["synth", str(path), "--preset", "tiny", "--header-only"]) == 0
    assert main([*words, str(path)]) == 1
    err = capsys.readouterr().err
    assert f"{path}: weights are missing" in err and "`pyggml info` reads" in err
    assert "allow_missing_data" not in err and err.count("\n") == 1


@pytest.mark.parametrize("words", [["graph", "-m"], ["parity", "-m"]])
def test_a_model_without_one_of_its_parts(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "m-00001-of-00002.gguf"
    fields = {"general.architecture": "deepseek2", "split.count": 2, "split.no": 0}
    gguf.write(path, fields, [])
    assert main([*words, str(path)]) == 1
    assert re.search(r"parts of the model are missing: .*-00002-of-00002\.gguf\n$",
                     capsys.readouterr().err)  # fmt: skip
    assert main(["info", str(path)]) == 0
    assert "in 2 parts, 1 of them missing" in capsys.readouterr().out


def test_a_pin_that_matches_nothing_is_a_warning(
    tiny: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["graph", "-m", tiny, "-ot", "nothing=numpy"]) == 0
    assert "'nothing' to numpy matches no label" in capsys.readouterr().err
