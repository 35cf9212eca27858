"""An old name or keyword raises an error that gives the new one."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest

import pyggml as gg
from pyggml import errors, renamed
from pyggml.errors import DTypeError
from pyggml.gguf.quantize import quantize
from pyggml.models.presets import preset
from pyggml.models.synth import synth

X = gg.input("x", "f32", ne=(8, 4))


@pytest.mark.parametrize("old", list(renamed.NAMES))
def test_old_names(old: str) -> None:
    with pytest.raises(AttributeError, match=rf"pyggml\.{old} is now {renamed.NAMES[old]}"):
        getattr(gg, old)
    new = renamed.NAMES[old].removeprefix("gg.").removeprefix("pyggml.")
    assert operator.attrgetter(new)(gg)


@pytest.mark.parametrize(
    "call",
    [
        lambda: gg.cast(X, type="f16"),
        lambda: gg.mul_mat(X, X, type="f16"),
        lambda: gg.input("x", type="f16", ne=(4,)),
        lambda: gg.state("x", type="f16", ne=(4,)),
        lambda: gg.constant([1.0], type="f16"),
        lambda: gg.glu(X, kind="swiglu"),
        lambda: synth("m.gguf", preset("tiny"), type="f16"),
        lambda: quantize(None, "m.gguf", type="f16"),
    ],
)
def test_old_keywords(call: Callable[[], object]) -> None:
    with pytest.raises(DTypeError, match=r"(type= is now dtype=|kind= is now act=)"):
        call()


def test_parity_is_no_function() -> None:
    with pytest.raises(TypeError, match=r"now gg\.compare"):
        gg.parity({"y": X}, "numpy", "null", {})


@pytest.mark.parametrize("old", ["UnknownName", "UnsupportedOp"])
def test_old_errors(old: str) -> None:
    with pytest.raises(AttributeError, match=rf"pyggml\.errors\.{old} is now {old}Error"):
        getattr(errors, old)
