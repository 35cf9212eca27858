"""Texts of a page, each stored once. Names that differ by their layer only are one text."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyggml.runtime.report import folds

#: Stands for the layer's number in a text: a character that no label should have.
LAYER = "\ue000"
#: The longest attributes that a page shows.
LONGEST = 200
#: The longest repeated part of a list that is written in one line.
SHORT = 3
_PACKAGE = Path(__file__).resolve().parent.parent


class Texts:
    """A table of texts. `add` returns the number of a text."""

    def __init__(self) -> None:
        self.all: list[str] = [""]
        self._numbers: dict[str, int] = {"": 0}

    def add(self, text: str) -> int:
        number = self._numbers.setdefault(text, len(self.all))
        if number == len(self.all):
            self.all.append(text)
        return number

    def add_name(self, label: str, layer: int | None) -> int:
        """Labels of tensors of this layer: `Qcur-3` and `Qcur-4` are one text."""
        if layer is not None and LAYER not in label:
            label = re.sub(rf"(?<=[-.l]){layer}(?!\d)", LAYER, label)
        return self.add(label)


def place_of_line(line: str) -> str:
    """`file:line` with a short path: below the current folder, or below the library's."""
    path, _, number = line.rpartition(":")
    if not path:
        return line
    for top, prefix in ((_PACKAGE, "pyggml/"), (Path(os.getcwd()), "")):
        try:
            inside = Path(path).resolve().relative_to(top)
        except (OSError, ValueError):
            continue
        return f"{prefix}{inside.as_posix()}:{number}"
    return line


def text_of_attributes(attrs: Mapping[str, Any]) -> str:
    """`eps=1e-06, n_dims=64`, without those that are None."""
    text = ", ".join(f"{key}={value}" for key, value in attrs.items() if value is not None)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def lines_of(names: Sequence[str]) -> list[str]:
    """`a, b (16 times)` for a, b, a, b, ..."""
    texts: list[str] = []
    for fold in folds(names):
        part = names[fold.start : fold.start + fold.period]
        if fold.times == 1:
            texts += part
        elif fold.period <= SHORT:
            texts.append(f"{', '.join(part)} ({fold.times} times)")
        else:
            texts += [f"{fold.times} times:", *part]
    return texts
