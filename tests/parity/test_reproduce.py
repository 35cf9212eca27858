"""The program that a report writes for one node, and the command on a model's file."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from two_places import B, Host, Model, run_here, scaled, values

import pyggml as gg
from pyggml.cli import main
from pyggml.parity.case import Case, build
from pyggml.parity.cases import cases
from pyggml.parity.nodes import Walk

# -- the script ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "label"),
    [("mul_mat", "h"), ("mul_mat", "kq"), ("soft_max_ext", "p"), ("set_rows", "rows")],
)
def test_the_script_shows_the_same_error(
    model: Model, host: Host, tmp_path: Path, op: str, label: str
) -> None:
    host.wrong[op] = scaled(1.001)
    report = model.on()
    path = report.script(label, tmp_path / "one.py")
    status, names = run_here(path)
    assert status == 1 and names["result"] == report.row(label).comparison
    host.wrong.clear()
    assert run_here(path)[0] == 0


def test_the_script_runs_from_any_folder(model: Model, tmp_path: Path) -> None:
    report = model.on()
    (tmp_path / "elsewhere").mkdir()
    path = report.script(report.row("rows"), tmp_path / "rows.py")
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path / "elsewhere", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"numpy and {B}: NMSE 0 within 0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere", "rows.npz", "rows.py"]


def test_wrong_scripts(model: Model, tmp_path: Path) -> None:
    report = model.on()
    with pytest.raises(gg.GraphError, match=r"NAME\.py"):
        report.script("kq", tmp_path / "kq.npz")
    with pytest.raises(gg.UnknownNameError, match=r"no node .* 'kqq'; the closest labels are kq"):
        report.script("kqq", tmp_path / "kq.py")
    with pytest.raises(gg.DTypeError, match="a node's label or its row"):
        report.script(report.outputs[0], tmp_path / "kq.py")

    @gg.op
    def homemade(a: gg.Node) -> gg.define.Spec:
        return a.spec

    x = gg.input("x", ne=(3,))
    wrong = gg.compare({"y": homemade(x)}, "numpy", B, {"x": [1, 2, 3]})
    with pytest.raises(gg.GraphError, match="cannot import the op homemade"):
        wrong.script(wrong.nodes[0], tmp_path / "homemade.py")


OWN = """
import numpy as np
import pyggml as gg
from pyggml.backends.numpy import kernel

@gg.op
def doubled(a: gg.Node) -> gg.define.Spec:
    return a.spec

@kernel(doubled)
def _(out, a):
    np.multiply(a, 2, out=out)
"""


def test_the_script_imports_a_users_own_op(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_ops_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    own = import_module("own_ops_of_mine")
    y = gg.scale(own.doubled(gg.view(gg.input("x", ne=(4, 3)), ne=(2, 3))), s=0.5)
    report = gg.compare({"y": y}, "numpy", B, {"x": values((3, 4))})
    path = report.script(report.nodes[0], tmp_path / "doubled.py")
    assert report and "from own_ops_of_mine import doubled\n" in path.read_text()
    status, names = run_here(path)
    assert (
        status == 0 and names["a"].shape == (3, 2) and names["result"] == report.nodes[0].comparison
    )


def test_every_op_can_be_written_as_a_script(tmp_path: Path) -> None:
    """The script of an op's first case, plain and strided, builds the same node and passes."""
    chosen: dict[tuple[str, bool], Case] = {}
    for case in cases():
        small = all(s is None or np.prod(s.ne) < 5000 for s in case.sources)
        node = build(case, values=False).node
        if small and node.op.view is None:
            strided = any(s is not None and s.layout for s in case.sources)
            chosen.setdefault((case.op, strided), case)
    assert len({op for op, _ in chosen}) >= 40
    for case in chosen.values():
        built = build(case)
        report = gg.compare({"y": built.node}, "numpy", B, built.inputs, states=built.states)
        assert report, f"{case}\n{report}"
        status, names = run_here(report.script(report.nodes[-1], tmp_path / "case.py"))
        assert status == 0 and repr(names["result"]) == repr(report.nodes[-1].comparison), case


# -- the module and the command -----------------------------------------------------------------


def test_compare_is_imported_when_first_used() -> None:
    code = (
        "import sys, pyggml as gg; assert 'pyggml.parity' not in sys.modules\n"
        "x = gg.input('x', ne=(3,))\n"
        "assert gg.compare({'y': gg.relu(x)}, 'numpy', 'numpy', {'x': [1, -1, 0]})\n"
        "assert gg.parity is sys.modules['pyggml.parity']"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("model") / "tiny.gguf")
    assert main(["synth", path, "--preset", "tiny", "--layers", "2"]) == 0
    return path


@pytest.mark.parametrize(
    "options", ["", "-mla 0 -fa off", "-mla 3 -fa -ctk bf16", "-mla 2 -fa off"], ids=str
)
def test_a_model(tiny: str, capsys: Any, options: str) -> None:
    assert main(["parity", "-m", tiny, "-c", "24", "-ub", "5", *options.split()]) == 0
    out = capsys.readouterr().out
    assert out.startswith("numpy and null: ") and "fail" not in out
    assert main(["parity", "-m", tiny, "-c", "24", "-ub", "5", *options.split(), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] and data["first"] is None
    labels = {row["label"] for row in data["nodes"]}
    assert {"attn_out-0", "attn_out-1", "l_out-1"} < labels
    assert ("kq-1" in labels) == ("off" in options)


def test_a_model_with_a_wrong_kernel(tiny: str, host: Host, capsys: Any, tmp_path: Path) -> None:
    host.wrong["rope_ext"] = scaled(1.01)
    words = ["parity", "-m", tiny, "--a", "numpy", "--b", B, "-ub", "3", "-c", "8"]
    assert main(words) == 1
    out = capsys.readouterr().out
    assert re.search(
        r"^first(?: and worst)?: .* = rope_ext .* at .*models/layers\.py:\d", out, re.M
    )
    assert "--script " in out
    script = tmp_path / "k_pe.py"
    assert main([*words, "--script", "k_pe-1", "--out", str(script), "--json"]) == 1
    data = json.loads(capsys.readouterr().out)
    assert {row["op"] for row in data["nodes"] if row["status"] == "fail"} == {"rope_ext"}
    assert script.exists() and script.with_suffix(".npz").exists()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["-m", "TINY", "-o", "relu"], "--op does not work with a model"),
        (["--script", "kq-0"], "--script needs a model, -m FILE"),
        (["-c", "64"], "-c needs a model, -m FILE"),
        (["-m", "TINY", "-ub", "200"], "does not fit in -c 128 rows"),
        (["-m", "TINY", "-ctk", "q3"], "q3"),
        (["-m", "TINY", "--b", "abacus"], "no backend 'abacus'"),
        (
            ["-m", "TINY", "-c", "8", "-ub", "1", "--script", "kq"],
            "no node is labelled 'kq'; some are",
        ),
        (["-m", "TINY", "--script", "k_pe-1", "--out", "kq.txt"], "the script must be a NAME.py"),
        (["-m", "TINY", "--script", "k_pe-1", "--out", "no/kq.py"], "there is no folder no"),
        (["-m", "missing.gguf"], "No such file"),
    ],
)
def test_errors_are_one_line(tiny: str, capsys: Any, words: list[str], why: str) -> None:
    failed = why.startswith(("no node", "No such file"))
    assert main(["parity", *(tiny if w == "TINY" else w for w in words)]) == (1 if failed else 2)
    err = capsys.readouterr().err
    assert "error: " in err.splitlines()[-1] and why in err.splitlines()[-1]


@pytest.mark.parametrize("words", [["nolabel"], ["k_pe-1", "--out", "kq.txt"]])
def test_errors_of_a_script_come_before_anything_runs(
    tiny: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    def report(_: object) -> None:
        raise AssertionError("it ran")

    monkeypatch.setattr(Walk, "report", report)
    assert main(["parity", "-m", tiny, "--script", *words]) in (1, 2)
    assert "pyggml: error: " in capsys.readouterr().err
