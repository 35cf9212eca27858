"""Rows and points as text: tables in Markdown, CSV, JSON and JSON lines, printed as they come."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from pyggml.bench.depth import Point
from pyggml.bench.runs import Row
from pyggml.runtime.memory import mib


class Record(Protocol):
    """A `Row` or a `Point`."""

    @property
    def setting(self) -> Mapping[str, Any]: ...

    def fields(self) -> dict[str, Any]: ...


class Writer(Protocol):
    """The lines of a text: at its beginning, for each record, and at its end."""

    def begin(self) -> Iterable[str]: ...
    def record(self, record: Any) -> Iterable[str]: ...
    def end(self) -> Iterable[str]: ...


# -- data -------------------------------------------------------------------------------------


class Json:
    """One array of objects, printed at the end."""

    def __init__(self) -> None:
        self._objects: list[dict[str, Any]] = []

    def begin(self) -> Iterator[str]:
        return iter(())

    def record(self, record: Record) -> Iterator[str]:
        self._objects.append(record.fields())
        return iter(())

    def end(self) -> Iterator[str]:
        yield json.dumps(self._objects, indent=2)


class JsonLines:
    """An object in each line."""

    def begin(self) -> Iterator[str]:
        return iter(())

    def record(self, record: Record) -> Iterator[str]:
        yield json.dumps(record.fields())

    def end(self) -> Iterator[str]:
        return iter(())


class Csv:
    """A line of names, then a line for each record, without lists of samples. Texts are quoted."""

    def __init__(self) -> None:
        self._has_head = False

    def begin(self) -> Iterator[str]:
        return iter(())

    def record(self, record: Record) -> Iterator[str]:
        fields = {k: v for k, v in record.fields().items() if not isinstance(v, list)}
        if not self._has_head:
            self._has_head = True
            yield ",".join(fields)
        text = io.StringIO()
        csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="").writerow(
            map(_cell, fields.values())
        )
        yield text.getvalue()

    def end(self) -> Iterator[str]:
        return iter(())


def _cell(value: Any) -> Any:
    return int(value) if isinstance(value, bool) else value


# -- Markdown ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a Markdown table; `left` if its cells are aligned to the left."""

    head: str
    width: int
    left: bool = False

    def cell(self, text: str) -> str:
        return f" {text:{'<' if self.left else '>'}{self.width}} "


def _line(columns: Sequence[Column], cells: Iterable[str]) -> str:
    return "|" + "|".join(column.cell(cell) for column, cell in zip(columns, cells)) + "|"


#: Fields of a setting that can be columns, in their order.
OPTIONS = {
    "n_gpu_layers": Column("ngl", 3), "n_threads": Column("threads", 7),
    "n_batch": Column("n_batch", 7), "n_ubatch": Column("n_ubatch", 8),
    "type_k": Column("type_k", 6), "type_v": Column("type_v", 6),
    "type_i": Column("type_i", 6),
    "flash_attn": Column("fa", 3), "mla": Column("mla", 3), "amb": Column("amb", 6),
    "fmoe": Column("fmoe", 4), "decode_weights": Column("decoded", 7),
    "tensor_buft_overrides": Column("ot", 4, left=True), "shard": Column("shard", 5, left=True),
}  # fmt: skip
_MEMORY = (Column("compute MiB", 11), Column("cache MiB", 9), Column("scores MiB", 10))


class Markdown:
    """llama-bench's table: model, size, params and backend; some of OPTIONS; the memory in MiB; and
    last test and t/s, for scripts that count from there.

    shown  fields that are columns -> the longest text in the column, or ""
    """

    def __init__(self, shown: Mapping[str, str]) -> None:
        self._shown = tuple(name for name in OPTIONS if name in shown)
        options = [
            replace(OPTIONS[name], width=max(OPTIONS[name].width, len(shown[name])))
            for name in self._shown
        ]
        backend = max(10, len(shown.get("backends", "")))
        self._columns = (
            Column("model", 30, left=True), Column("size", 10), Column("params", 10),
            Column("backend", backend, left=True), *options, *_MEMORY,
            Column("test", 15), Column("t/s", 20),
        )  # fmt: skip
        self._build = ""

    def begin(self) -> Iterator[str]:
        yield _line(self._columns, [column.head for column in self._columns])
        rules = ["-" * (c.width - 1) + ("-" if c.left else ":") for c in self._columns]
        yield _line(self._columns, rules)

    def record(self, row: Row) -> Iterator[str]:
        fields = row.setting
        options = [_shown(fields[name]) for name in self._shown]
        self._build = f"build: {fields['build_commit']} ({fields['build_number']})"
        yield _line(
            self._columns,
            [
                fields["model_type"], _bytes(fields["model_size"]),
                _count(fields["model_n_params"]), fields["backends"], *options,
                mib(row.compute), mib(row.cache), mib(row.score_peak),
                str(row.test), f"{row.avg_ts:.2f} ± {row.stddev_ts:.2f}",
            ],
        )  # fmt: skip

    def end(self) -> Iterator[str]:
        if self._build:
            yield f"\n{self._build}"


class SweepMarkdown:
    """sweep-bench's table, with three more columns; no other line, since its scripts read all."""

    columns = (
        Column("PP", 5), Column("TG", 6), Column("N_KV", 6), Column("T_PP s", 8),
        Column("S_PP t/s", 8), Column("T_TG s", 8), Column("S_TG t/s", 8), *_MEMORY,
    )  # fmt: skip

    def begin(self) -> Iterator[str]:
        yield _line(self.columns, [column.head for column in self.columns])
        yield "|" + "|".join("-" * (column.width + 2) for column in self.columns) + "|"

    def record(self, point: Point) -> Iterator[str]:
        yield _line(
            self.columns,
            [
                f"{point.pp}", f"{point.tg}", f"{point.n_kv}",
                f"{point.t_pp:.3f}", f"{point.speed_pp:.2f}",
                f"{point.t_tg:.3f}", f"{point.speed_tg:.2f}",
                mib(point.compute), mib(point.cache), mib(point.score_peak),
            ],
        )  # fmt: skip

    def end(self) -> Iterator[str]:
        return iter(())


DATA: dict[str, type[Json] | type[JsonLines] | type[Csv]] = {
    "json": Json, "jsonl": JsonLines, "csv": Csv
}  # fmt: skip


def _bytes(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(_cell(value))
