"""`quantize`: types, values and keys of the new file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pyggml import gguf
from pyggml.cli import main
from pyggml.dtypes import dtype
from pyggml.errors import DTypeError, GGUFError
from pyggml.gguf.quantize import QUANTIZABLE, quantize
from pyggml.models.model import load
from pyggml.models.presets import TINY, TINY_GPT_OSS
from pyggml.models.synth import synth
from pyggml.quants import decode_rows, encode_rows


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "f32.gguf"
    synth(path, TINY, dtype="f32")
    return path


@pytest.mark.parametrize("type_", QUANTIZABLE)
def test_every_tensor_is_the_encoding_of_the_source(
    source: Path, tmp_path: Path, type_: str
) -> None:
    path = tmp_path / "q.gguf"
    with gguf.open(source) as old:
        assert quantize(old, path, type_) == path.stat().st_size
        with gguf.open(path) as new:
            assert list(new.tensors) == list(old.tensors)
            for name, info in new.tensors.items():
                kept = len(info.ne) == 1 or name.endswith("ffn_gate_inp.weight")
                small = dtype(type_).nbytes * 256 < dtype("q6_K").nbytes * dtype(type_).block
                expected = "q8_0" if name == "output.weight" and small else type_
                assert info.dtype.name == ("f32" if kept else expected)
                values = old.array(name)
                assert (new.array(name) == encode_rows(info.dtype, values)).all()
    model = load(path, backends=["numpy"])
    assert np.isfinite(model.session(8).forward([1, 2, 3])).all()


def test_keys_keep_their_types(tmp_path: Path) -> None:
    fields = {
        "general.architecture": "x", "a.u8": np.uint8(7), "a.i64": np.int64(-7),
        "a.u64": np.uint64(1), "a.f64": np.float64(0.1), "a.bool": True,
        "a.words": ["one", "two", ""],
        "a.i8s": np.array([1, -2], np.int8), "split.no": np.uint16(0), "general.file_type": 0,
    }  # fmt: skip
    rows = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)
    one = gguf.Tensor("w.weight", dtype("f32"), (32, 2), lambda: [rows])
    gguf.write(tmp_path / "a.gguf", fields, [one])
    with gguf.open(tmp_path / "a.gguf") as old:
        quantize(old, tmp_path / "b.gguf", "q4_0")
        before = old.typed_fields()
    with gguf.open(tmp_path / "b.gguf") as new:
        after = new.typed_fields()
    assert "split.no" not in after
    assert after.pop("general.file_type") == 2 and after.pop("general.quantization_version") == 2
    for key, value in after.items():
        assert type(value) is type(before[key])
        assert np.array_equal(np.asarray(value), np.asarray(before[key]))
    types = {key: np.asarray(after[key]).dtype for key in ("a.u8", "a.i64", "a.u64", "a.f64")}
    assert list(types.values()) == ["uint8", "int64", "uint64", "float64"]


def test_rows_that_do_not_fit_and_tied_heads(tmp_path: Path) -> None:
    arch = replace(
        TINY_GPT_OSS, n_embd=80, tied=True, experts=replace(TINY_GPT_OSS.experts, n_ff=64)
    )
    synth(tmp_path / "a.gguf", arch, dtype="f16")
    with gguf.open(tmp_path / "a.gguf") as old:
        quantize(old, tmp_path / "b.gguf", "iq4_nl")
    with gguf.open(tmp_path / "b.gguf") as new:
        types = {name: info.dtype.name for name, info in new.tensors.items()}
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "f16"  # rows of 80
    assert types["blk.0.attn_output.weight"] == "iq4_nl"
    assert types["blk.0.ffn_gate_exps.bias"] == "f32" == types["blk.0.attn_sinks.weight"]


def test_refusals_leave_the_file_as_it_was(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "q.gguf"
    path.write_text("before")
    with gguf.open(source) as old:
        with pytest.raises(DTypeError, match="cannot encode q6_K"):
            quantize(old, path, "q6_K")
        quantize(old, tmp_path / "q8.gguf", "q8_0")
    with gguf.open(tmp_path / "q8.gguf") as old:
        with pytest.raises(GGUFError, match=r"'token_embd\.weight' is q8_0 already"):
            quantize(old, path, "q4_0")
        assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 2
        quantize(old, path, "q4_0", requantize=True)
        with gguf.open(path) as new:
            name = "blk.0.attn_output.weight"
            values = decode_rows("q8_0", old.array(name))
            assert (new.array(name) == encode_rows("q4_0", values)).all()


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "q.gguf")
    assert main(["quantize", str(source), out, "Q4_0"]) == 0
    assert "bytes from" in capsys.readouterr().out
    assert main(["quantize", out, out, "q5_0"]) == 1
    assert "loses quality" in capsys.readouterr().err
    assert main(["quantize", out, out, "q5_0", "--allow-requantize"]) == 0
    assert main(["quantize", out, out, "q6_K"]) == 2
