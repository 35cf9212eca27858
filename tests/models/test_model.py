"""Opening a model from the top level, and closing it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pyggml as gg
from pyggml.generate.session import Session
from pyggml.models.model import Model, load
from pyggml.models.presets import preset
from pyggml.models.synth import synth


@pytest.fixture
def path(tmp_path: Path) -> Path:
    synth(tmp_path / "m.gguf", preset("tiny-llama"), type="f16")
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
    with pytest.raises(gg.GGUFError, match="rwkv7"):
        gg.load(tmp_path / "m.gguf")
