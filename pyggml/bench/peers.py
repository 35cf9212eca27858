"""Speeds to compare with: records such as benchmarks/results/peers.json, or llama-bench's JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyggml.bench.runs import Test
from pyggml.bench.setting import SHORT
from pyggml.errors import DTypeError, PyggmlError


@dataclass(frozen=True, slots=True)
class Peer:
    """Speeds of another engine, or of another run: what a plot shows as one line.

    speeds  test -> tokens per second
    """

    label: str
    speeds: dict[Test, float]


def read(path: Path) -> list[Peer]:
    """The peers of a file. DTypeError if it is neither a record of peers nor llama-bench's JSON.

    A record is an object with `rows`. Each has an `engine`, a `path`, a `value` in tokens a second
    and a `test` with llama-bench's `n_prompt`, `n_gen` (null: some number) and `n_depth`; see
    docs/measuring.md. llama-bench's JSON, also in lines, is a list of objects. Rows with the same
    options are one peer.
    """
    text = path.read_text(encoding="utf-8")
    try:
        return _peers(_parsed(text), path)
    except (ValueError, KeyError, TypeError, AttributeError, PyggmlError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DTypeError(
            f"{path} is neither a record of peers nor JSON of llama-bench or pyggml bench: {what}"
        ) from error


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        lines = [line for line in text.splitlines() if line.strip()]
        if len(lines) < 2:
            raise
        return [json.loads(line) for line in lines]


def _peers(data: Any, path: Path) -> list[Peer]:
    groups: dict[str, dict[Test, float]] = {}
    if isinstance(data, list):
        for row in data:
            names = [f"{path.stem} {row.get('backends', '')}".strip(), *_options(row)]
            groups.setdefault(", ".join(names), {})[_test(row)] = float(row["avg_ts"])
    else:
        for row in data["rows"]:
            names = [
                row["engine"],
                row["path"],
                *_options({**row.get("setting", {}), **row["test"]}),
            ]
            label = ", ".join(filter(None, names))
            groups.setdefault(label, {})[_test(row["test"])] = float(row["value"])
    return [Peer(label, speeds) for label, speeds in groups.items()]


def _test(row: Mapping[str, Any]) -> Test:
    loop = bool(row.get("loop", False))
    n_gen = 1 if row["n_gen"] is None else int(row["n_gen"])
    return Test(int(row["n_prompt"]), n_gen, int(row.get("n_depth", 0)), loop)


def _options(row: Mapping[str, Any]) -> list[str]:
    """The options in a row of llama-bench's JSON that a label shows."""
    shown = [name for name in ("flash_attn", "mla", "n_ubatch", "type_k") if name in row]
    options = [f"{SHORT[name]} {_text(row[name])}" for name in shown]
    options += [f"amb {row['amb']:g}"] if row.get("amb") else []
    return options + ["loop"] * bool(row.get("loop"))


def _text(value: object) -> str:
    """llama-bench writes some switches as 0 and 1, others as false and true."""
    return str(int(value) if isinstance(value, bool) else value)
