"""Names that changed before 0.2. Using one raises an error that gives the new name.

Version 0.3 removes this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from pyggml.errors import DTypeError

P = ParamSpec("P")
T = TypeVar("T")

#: Old name in `pyggml` -> what to write now.
NAMES = {
    "Cost": "gg.define.Cost",
    "Cut": "gg.define.Cut",
    "Op": "gg.define.Op",
    "Slice": "gg.define.Slice",
    "Spec": "gg.define.Spec",
    "UnknownName": "gg.UnknownNameError",
    "UnsupportedOp": "gg.UnsupportedOpError",
    "lse_finish": "pyggml.ops.lse_finish",
    "lse_sum": "pyggml.ops.lse_sum",
    "make_spec": "gg.define.Spec.of",
    "name": "gg.label",
    "whole": "gg.state_of",
}

#: Old keyword of an op or another function -> new keyword.
KEYWORDS = {"type": "dtype", "kind": "act"}


def refuses_old_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: DTypeError for a keyword in `KEYWORDS`, which gives the new one."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        for old in KEYWORDS.keys() & kwargs.keys():
            raise DTypeError(f"{function.__name__}: {old}= is now {KEYWORDS[old]}=")
        return function(*args, **kwargs)

    return call
