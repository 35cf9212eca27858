"""Random weights in place of a file's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyggml import gguf
from pyggml.dtypes import TYPES
from pyggml.errors import DTypeError, GGUFError
from pyggml.gguf.writer import Tensor, write
from pyggml.models.model import load
from pyggml.models.presets import PRESETS, preset
from pyggml.models.synth import IDS, leaf_of, scale_of, synth
from pyggml.quants import decode_rows

TOKENS = [(37 * i * i + 5 * i) % 512 for i in range(40)]


def header(path: Path, name: str = "tiny-deepseek4", dtype: str = "iq3_xxs") -> Path:
    synth(path, preset(name), dtype=dtype, header_only=True)
    return path


def logits_of(path: Path, place: str, **options: Any) -> Any:
    """Of a prompt, of a token after it, and of a token that a device chose."""
    with load(path, backends=[place], **options) as model:
        session = model.session(n_ctx=64, n_batch=32)
        rows = [session.forward(TOKENS, "all"), session.forward([7])]
        rows.append(session.forward([*session.generate([3], 2)][-1:]))
        return np.concatenate(rows)


@pytest.mark.parametrize("place", ["numpy", "null"])
def test_a_header_gives_the_logits_of_a_file_with_these_values(tmp_path: Path, place: str) -> None:
    short, whole = header(tmp_path / "header.gguf"), tmp_path / "whole.gguf"
    with load(short, random_weights=True) as model:
        infos = model.file.tensors.values()
        tensors = [
            Tensor(t.name, t.dtype, t.ne, lambda name=t.name: [model.file.array(name)])
            for t in infos
        ]
        write(whole, model.file.typed_fields(), tensors)
    drawn, read = logits_of(short, place, random_weights=True), logits_of(whole, place)
    assert np.array_equal(drawn, read) and np.isfinite(drawn).all()
    assert len(set(drawn.argmax(1).tolist())) > 10  # not a model in which all tokens are alike


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("tiny")])
@pytest.mark.parametrize("dtype", ["q4_K", "mxfp4"])
def test_the_values_have_the_scales_of_synth(tmp_path: Path, name: str, dtype: str) -> None:
    with load(header(tmp_path / "x.gguf", name, dtype), random_weights=True) as model:
        for info in model.file.tensors.values():
            values = model.file.array(info.name)
            if leaf_of(info.name) == IDS:
                assert all(len({*row}) == info.ne[0] for row in values.tolist())
                continue
            if info.dtype.numpy is None:
                values = decode_rows(info.dtype, values)
            std, mean = scale_of(leaf_of(info.name), info.ne)
            assert values.shape == info.shape and np.isfinite(values).all()
            if info.n_elements >= 4096:
                assert abs(values.mean() - mean) < 0.1 * std and 0.9 < values.std() / std < 1.1


def test_layers_differ_and_the_host_has_one_array_for_all(tmp_path: Path) -> None:
    with load(header(tmp_path / "x.gguf"), random_weights=True) as model:
        file = model.file
        arrays = [
            file.array(name) for name, t in file.tensors.items()
            if leaf_of(name) in ("ffn_up_exps.weight", "ffn_gate_exps.weight")
        ]  # fmt: skip
        assert len(arrays) == 8 and len({array.tobytes() for array in arrays}) == 8
        [pool] = {id(owner(array)): owner(array) for array in arrays}.values()
        step = 98 * 32 // 2  # whole blocks of iq3_xxs, and 32 bytes
        assert pool.nbytes < max(array.nbytes for array in arrays) + len(file.tensors) * step


def owner(array: Any) -> Any:
    while array.base is not None:
        array = array.base
    return array


def test_the_same_values_each_time(tmp_path: Path) -> None:
    path = header(tmp_path / "x.gguf", dtype="q8_0")
    first, again = (logits_of(path, "numpy", random_weights=True) for _ in range(2))
    assert np.array_equal(first, again)


def test_weights_of_a_file_are_not_those(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    synth(path, preset("tiny"), dtype="q8_0")
    with load(path) as model, load(path, random_weights=True) as other:
        for name in ("token_embd.weight", "output.weight"):
            assert not np.array_equal(model.file.array(name), other.file.array(name))
            assert model.file.source(name) != other.file.source(name)


def test_without_the_option_a_header_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="the file is incomplete"):
        load(header(tmp_path / "x.gguf"))


def test_a_type_that_cannot_be_drawn(tmp_path: Path) -> None:
    path, other = header(tmp_path / "x.gguf", "tiny", "q8_0"), tmp_path / "y.gguf"
    with gguf.open(path, allow_missing_data=True) as file:
        types = {name: t.dtype for name, t in file.tensors.items()}
        types["output.weight"] = TYPES["nvfp4"]
        tensors = [Tensor(t.name, types[t.name], t.ne, tuple) for t in file.tensors.values()]
        write(other, file.typed_fields(), tensors, header_only=True)
    with pytest.raises(DTypeError, match="cannot draw random nvfp4 weights"):
        load(other, random_weights=True)
