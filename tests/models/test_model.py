"""Opening a model from the top level, and closing it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.generate.session import Session
from pyggml.gguf import GGUFFile
from pyggml.models.model import Model, load
from pyggml.models.presets import preset
from pyggml.models.synth import synth


@pytest.fixture
def path(tmp_path: Path) -> Path:
    synth(tmp_path / "m.gguf", preset("tiny-llama"), dtype="f16")
    return tmp_path / "m.gguf"


def test_names_at_the_top_level(path: Path) -> None:
    assert (gg.load, gg.Model, gg.Session) == (load, Model, Session)
    assert {"load", "Model", "Session"} <= set(gg.__all__)
    with gg.load(path, backends=["numpy"], cache_k="f32") as model:
        assert model.options.cache_k == "f32" and model.backends == ("numpy",)
        assert isinstance(model.session(8), gg.Session)


def test_a_closed_model_runs_if_its_weights_are_uploaded(path: Path) -> None:
    with gg.load(path, backends=["numpy"]) as model:
        session = model.session(8)
        expected = session.forward([1, 2, 3])
        late = gg.load(path, backends=["numpy"])
    session.truncate(0)
    assert np.array_equal(session.forward([1, 2, 3]), expected)
    late.close()
    late.close()
    with pytest.raises(gg.GGUFError, match="the file is closed"):
        late.session(8).forward([1])


def test_a_file_that_is_not_a_model_is_closed(tmp_path: Path) -> None:
    """Otherwise the warning about an unclosed file would fail this test."""
    gg.gguf.write(tmp_path / "m.gguf", {"general.architecture": "rwkv7"}, [])
    with pytest.raises(gg.GGUFError, match=r"m\.gguf: architecture 'rwkv7' is unknown"):
        gg.load(tmp_path / "m.gguf")


def test_a_file_that_is_opened_again_is_not_compared(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are the same if file, name and offset are; only other files are compared by bytes."""
    tokens = [1, 2, 3]

    def run(model: Model, store: gg.Store) -> np.ndarray[Any, Any]:
        session = model.session(8)
        plan = session.plan(3, 8, 1)
        again = model.compile(plan.graph, store)
        inputs = {k: np.zeros(spec.shape, spec.dtype.numpy) for k, spec in again.inputs.items()}
        return np.asarray(again.run({**inputs, "tokens": tokens})["logits"])

    with gg.load(path, backends=["numpy"]) as model, gg.load(path, backends=["numpy"]) as other:
        expected = run(model, model.store)
        count = len(model.store.shared.weights)
        with monkeypatch.context() as patch:
            patch.setattr(GGUFFile, "array", None)  # any read fails
            assert np.array_equal(run(other, model.store), expected)
        assert len(model.store.shared.weights) == count
    copy = path.with_name("copy.gguf")
    shutil.copy(path, copy)
    with gg.load(path, backends=["numpy"]) as model, gg.load(copy, backends=["numpy"]) as other:
        expected = run(model, model.store)
        assert np.array_equal(run(other, model.store), expected)
    with copy.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\x12\x34\x56\x78")
    with gg.load(path, backends=["numpy"]) as model, gg.load(copy, backends=["numpy"]) as other:
        run(model, model.store)
        with pytest.raises(gg.GraphError, match="with other values"):
            run(other, model.store)


def test_a_file_that_was_written_to_is_another_source(path: Path) -> None:
    with gg.gguf.open(path) as first, gg.gguf.open(path) as second:
        (name, other, *_) = first.tensors
        assert first.source(name) == second.source(name) != first.source(other)
        os.utime(path, ns=(1, 1))
        with gg.gguf.open(path) as third:
            assert third.source(name) != first.source(name)
        with pytest.raises(gg.UnknownNameError):
            first.source("no such tensor")


def test_errors_of_keys_and_tensors_name_the_file(path: Path) -> None:
    with gg.gguf.open(path) as file:
        fields = dict(file.fields)
    for key, problem in (
        ("general.architecture", "key 'general.architecture' is missing"),
        ("llama.block_count", "key 'llama.block_count': is missing"),
        ("", "tensor 'token_embd.weight' of ne="),
    ):
        gg.gguf.write(path, {k: v for k, v in fields.items() if k != key}, [])
        with pytest.raises(gg.GGUFError) as error:
            gg.load(path)
        assert str(error.value).startswith(f"{path}: {problem}")
