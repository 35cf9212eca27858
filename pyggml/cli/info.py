"""Print the keys of a GGUF file and a summary of its tensors, with layers combined (blk.*).

pyggml info FILE
pyggml info FILE --json   every tensor, and arrays of up to 32 elements
"""

from __future__ import annotations

import argparse
import json
import math
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pyggml import gguf
from pyggml.errors import PyggmlError
from pyggml.models.model import Model
from pyggml.words import counted

_JSON_ELEMENTS = 32
_TEXT_ELEMENTS = 6
_TEXT_WIDTH = 72


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a GGUF file or the first part of a split one")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    with gguf.open(args.file, allow_missing_data=True) as file:
        print(json.dumps(_as_json(file), indent=1) if args.json else "\n".join(_as_text(file)))
    return 0


def support(file: gguf.GGUFFile) -> str:
    """Whether pyggml runs the model: "supported", or what is wrong, in one line."""
    if file.missing:
        return "unknown, because parts are missing"
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        try:
            Model(file)
        except PyggmlError as error:
            return "not supported: " + str(error).removeprefix(f"{file.paths[0]}: ")
    return "; ".join(["supported", *(f"note: {note.message}" for note in notes)])


def _as_json(file: gguf.GGUFFile) -> dict[str, Any]:
    tensors = file.tensors.values()
    return {
        "files": file.paths,
        "missing": file.missing,
        "version": file.version,
        "complete": file.complete,
        "support": support(file),
        "parameters": sum(t.n_elements for t in tensors),
        "bytes": sum(t.nbytes for t in tensors),
        "keys": {key: _plain(value, _JSON_ELEMENTS) for key, value in file.fields.items()},
        "tensors": [
            {"name": t.name, "type": t.dtype.name, "ne": t.ne, "offset": t.offset, "part": t.part}
            for t in tensors
        ],
    }


def _plain(value: gguf.Value, longest: int) -> Any:
    """`value` for JSON: NaN and infinity as text, a long array as its length and first elements."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if not isinstance(value, (np.ndarray, gguf.StringArray)):
        return value
    first = [_plain(v.item() if isinstance(v, np.generic) else v, 0) for v in value[:longest]]
    return first if len(value) <= longest else {"length": len(value), "first": first}


def _as_text(file: gguf.GGUFFile) -> Iterator[str]:
    tensors = list(file.tensors.values())
    n_parts = len(file.paths) + len(file.missing)
    parts = f" in {n_parts} parts" if n_parts > 1 else ""
    missing = "" if file.complete else ", weights missing"
    if file.missing:
        missing = f", {len(file.missing)} of them missing"
    yield f"{_safe(file.paths[0])}: GGUF v{file.version}{parts}{missing}"
    yield f"support: {_safe(support(file))}"
    yield f"\nkeys: {len(file.fields)}"
    rows = [(_safe(key), _short(value)) for key, value in file.fields.items()]
    yield from _table(rows)
    yield f"\ntypes: {_total(tensors)}"
    yield from _table((name, _total(group)) for name, group in _grouped(tensors, _type))
    yield f"\ntensors: {len(tensors)}"
    yield from _table(
        (_safe(name), group[0].dtype.name, str(list(group[0].ne)), f"x {len(group)}")
        for (name, *_), group in _grouped(tensors, _kind)
    )


def _type(tensor: gguf.TensorInfo) -> str:
    return tensor.dtype.name


def _kind(tensor: gguf.TensorInfo) -> tuple[Any, ...]:
    return re.sub(r"^blk\.\d+\.", "blk.*.", tensor.name), tensor.dtype.name, tensor.ne


def _grouped(
    tensors: list[gguf.TensorInfo], key: Any
) -> Iterable[tuple[Any, list[gguf.TensorInfo]]]:
    groups: dict[Any, list[gguf.TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault(key(tensor), []).append(tensor)
    return groups.items()


def _total(tensors: list[gguf.TensorInfo]) -> str:
    elements, nbytes = sum(t.n_elements for t in tensors), sum(t.nbytes for t in tensors)
    return f"{counted(len(tensors), 'tensor')}, {elements:,} parameters, {nbytes / 2**20:,.2f} MiB"


def _table(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    cells = list(rows)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        padded = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        yield ("  " + "  ".join(padded)).rstrip()


def _short(value: gguf.Value) -> str:
    if isinstance(value, float):
        return f"{value:.7g}"  # the precision of f32, which most of them are
    plain = _plain(value, _TEXT_ELEMENTS)
    if isinstance(plain, dict):
        return f"{plain['length']} x {_clipped(repr(plain['first'])[:-1] + ', ...]')}"
    return _clipped(repr(plain))


def _clipped(text: str) -> str:
    return text if len(text) <= _TEXT_WIDTH else text[: _TEXT_WIDTH - 3] + "..."


def _safe(text: str) -> str:
    """`text` from a file, with control characters escaped for the terminal."""
    return text if text.isprintable() else repr(text)[1:-1]
