"""Dumps of other engines: their names and shapes, and where they part from ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyggml import gguf
from pyggml.cli import main
from pyggml.dtypes import dtype
from pyggml.errors import GGUFError, UnknownNameError
from pyggml.gguf import Tensor
from pyggml.models.batch import Batch
from pyggml.models.model import load
from pyggml.models.presets import preset
from pyggml.models.synth import synth
from pyggml.node import label
from pyggml.ops import input, reshape, top_k
from pyggml.parity.against import against, details, paired
from pyggml.parity.dump import fitted, names_for, read_dump
from pyggml.runtime.compile import compile

TOKENS = [3, 1, 4, 1, 5]
Streams = pytest.CaptureFixture[str]
Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("model") / "tiny.gguf"
    synth(file, preset("tiny-llama"), dtype="f32", seed=1)
    return file


@pytest.fixture(scope="module")
def run(path: Path) -> Arrays:
    """All labelled tensors of a run, as another engine might dump them."""
    n = len(TOKENS)
    with load(path, backends=["numpy"]) as model:
        batch = Batch(n, n, model.options, n, padded=False)
        graph = model.graph(batch, model.caches(n, n))
        plan = compile(
            graph.outputs, updates=graph.updates, observe=["*-0", "*-1", "result_*", "inp_embd"]
        )
        outputs = plan.run(tokens=TOKENS, pos=np.arange(n))
    return {name: np.array(array) for name, array in outputs.items() if name != "logits"}


def write_gguf(path: Path, arrays: Arrays) -> None:
    tensors = [
        Tensor(name, dtype("i32" if a.dtype == np.int32 else "f32"), a.shape[::-1], lambda a=a: [a])
        for name, a in arrays.items()
    ]
    gguf.write(path, {"general.architecture": "dump"}, tensors)


@pytest.mark.parametrize("kind", ["npz", "gguf"])
def test_a_dump_of_the_same_run(
    kind: str, path: Path, run: Arrays, tmp_path: Path, capsys: Streams
) -> None:
    dump, arrays = tmp_path / f"dump.{kind}", {"tokens": np.array(TOKENS, np.int32), **run}
    np.savez(dump, **arrays) if kind == "npz" else write_gguf(dump, arrays)
    words = ["diff", "-m", str(path), "--against", str(dump), "--backend", "numpy"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"{len(run)} tensors compared, 0 beyond the bound" in out and "first" not in out
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] and result["first"] is None and len(result["tensors"]) == len(run)
    assert all(row["error"] == 0.0 for row in result["tensors"])
    assert main([*words, "--node", "l_out-0"]) == 0
    assert capsys.readouterr().out.startswith("l_out-0 = add f32 [256, 5], built at ")


def test_our_own_dump_compares_places_and_options(
    path: Path, tmp_path: Path, capsys: Streams
) -> None:
    dump = tmp_path / "ours.npz"
    words = ["diff", "-m", str(path), "--backend", "numpy"]
    assert main([*words, "--tokens", "3,1,4", "--dump", str(dump)]) == 0
    n_tensors = int(capsys.readouterr().out.split(": ")[1].split()[0])
    assert main([*words, "--against", str(dump), "-fa", "off", "-ctk", "f32"]) == 0
    out = capsys.readouterr().out
    assert f"{n_tensors} tensors compared" in out and "only in the model: kq-0, " in out
    assert main([*words, "--against", str(dump), "--dump", str(dump)]) == 2


def test_the_first_and_the_worst_node(path: Path, run: Arrays) -> None:
    changed = {name: array.copy() for name, array in run.items()}
    for name, size in (("attn_out-1", 1.5), ("ffn_inp-1", 100.0), ("l_out-1", 3.0)):
        changed[name][2, 7] += size
    with load(path, backends=["numpy"]) as model:
        result = against(model, TOKENS, changed)
        assert result.first is not None and result.first.label == "attn_out-1"
        assert result.worst is not None and result.worst.label == "ffn_inp-1"
        assert [pair.label for pair in result.pairs if not pair.ok] == [
            "attn_out-1", "ffn_inp-1", "l_out-1",
        ]  # fmt: skip
        assert result.first.largest == pytest.approx(1.5, rel=1e-5)
        assert "(2, 7)" in list(details(result.first))[2]
        assert against(model, TOKENS, changed, bound=1e9).ok
        assert not against(model, TOKENS, {"l_out-0": run["l_out-0"] * np.nan}).ok
        with pytest.raises(UnknownNameError, match="no node is labelled 'l_out-9'; the closest"):
            result.pair("l_out-9")
        with pytest.raises(UnknownNameError, match="none of the model's labels; it has x"):
            against(model, TOKENS, {"x": np.zeros(3)})


def test_names_and_shapes_of_other_engines(path: Path, run: Arrays) -> None:
    """transformers has a batch dimension and flat heads; llama.cpp the last row of the logits."""
    theirs = {
        "model.embed_tokens": run["inp_embd"][None],
        "model.layers.1": run["l_out-1"][None],
        "model.layers.0.self_attn.v_proj": run["Vcur-0"].reshape(1, 5, -1),
        "result_output": run["result_output"][-1:],
        "ffn_out-0": run["ffn_out-0"][:, :-1],
        "Qcur-0 (view)": run["Qcur-0"],
    }
    with load(path, backends=["numpy"]) as model:
        result = against(model, TOKENS, theirs)
    assert {pair.label: (pair.name, pair.ok, pair.note) for pair in result.pairs} == {
        "inp_embd": ("model.embed_tokens", True, ""),
        "l_out-1": ("model.layers.1", True, ""),
        "Vcur-0": ("model.layers.0.self_attn.v_proj", True, ""),
        "result_output": ("result_output", True, "the last row"),
        "ffn_out-0": ("ffn_out-0", False, ""),
    }
    assert result.first is not None and "shape (5, 256) does not fit (5, 255)" in str(result.first)
    assert result.only_theirs == ("Qcur-0 (view)",) and "l_out-0" in result.only_ours


def test_names_for_a_label() -> None:
    assert names_for("l_out-12") == ("l_out-12", "model.layers.12")
    assert names_for("inp_embd") == ("inp_embd", "embd", "model.embed_tokens")
    assert names_for("ffn_moe_weights-3") == (
        "ffn_moe_weights_scaled-3", "ffn_moe_weights_norm-3", "ffn_moe_weights-3",
    )  # fmt: skip
    assert names_for("attn_out-0")[1:] == (
        "model.layers.0.self_attn.o_proj", "model.layers.0.self_attn",
    )  # fmt: skip


@pytest.mark.parametrize(
    "ours, theirs, rows",
    [
        ((5, 8), (1, 5, 8), 5),
        ((5, 2, 4), (5, 8), 5),
        ((5, 8), (2, 8), 2),
        ((1, 8), (8,), 1),
        ((5, 8), (8, 5), None),
        ((5, 8), (6, 8), None),
        ((5, 8), (2, 7), None),
    ],
)
def test_shapes(ours: tuple[int, ...], theirs: tuple[int, ...], rows: int | None) -> None:
    ways = fitted(np.zeros(ours), np.zeros(theirs))
    assert len(ways) == (rows is not None)
    for way in ways:
        assert way.ours.shape == way.theirs.shape and way.ours.size == 8 * (rows or 0)


def test_heads_before_tokens() -> None:
    """With as many heads as tokens, the values tell which dimension is which."""
    x = label(input("x", ne=(2, 3, 3)), "Qcur-0")
    ours = np.random.default_rng(0).standard_normal((3, 3, 2))
    pair = paired("Qcur-0", "Qcur-0", x, ours, ours.swapaxes(0, 1)[None], 1e-10)
    assert pair.ok and pair.note == "heads and tokens swapped"
    pair = paired("Qcur-0", "Qcur-0", x, ours, ours, 1e-10)
    assert pair.ok and pair.note == ""


def test_chosen_experts_may_come_in_any_order() -> None:
    ids = label(top_k(reshape(input("x", ne=(8, 2)), ne=(8, 2)), k=3), "ffn_moe_topk-0")
    ours = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    assert paired("ffn_moe_topk-0", "x", ids, ours, ours[:, ::-1], 0.1).ok
    assert not paired("ffn_moe_topk-0", "x", ids, ours, ours + 1, 0.1).ok


def test_errors(path: Path, run: Arrays, tmp_path: Path, capsys: Streams) -> None:
    dump = tmp_path / "dump.npz"
    np.savez(dump, **run)
    words = ["diff", "-m", str(path), "--against", str(dump), "--backend", "numpy"]
    assert main(words) == 2
    assert "--tokens or -p must say what was read" in capsys.readouterr().err
    assert main([*words, "--tokens", "1,2,99999"]) == 2
    assert "ids from 0 to" in capsys.readouterr().err
    text = tmp_path / "text.npz"
    text.write_text("no dump")
    with pytest.raises(GGUFError, match=r"a dump is an \.npz file of NumPy or a GGUF file"):
        read_dump(text)
    text.write_bytes(b"PK\3\4 and nothing else")
    with pytest.raises(GGUFError, match=r"text\.npz: "):
        read_dump(text)
    np.savez(text, a=np.array([{}], object))
    with pytest.raises(GGUFError, match="pickle"):
        read_dump(text)
