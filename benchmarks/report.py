"""Tables and plots of benchmarks/gpu_speeds.py: speed by prompt length and by depth, beside
llama.cpp, and memory beside time.

    python benchmarks/report.py     draw docs/speed.svg; needs the extra `plot`

tools/tables.py writes the tables into docs/performance.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks.record import Record, Row  # noqa: E402
from benchmarks.record import newest as newest_of  # noqa: E402

PICTURE = ROOT / "docs" / "speed.svg"
MIB = 1 << 20


def newest() -> Record:
    """The newest record."""
    return newest_of("speeds")


def rows_of(record: Record, test: str, engine: str = "pyggml") -> list[Row]:
    """The fields of an engine's rows in one object each; none if it was not measured."""
    return [
        {**row["setting"], **row["test"], "avg_ts": row["value"]}
        for row in record["rows"]
        if (row["path"], row["engine"]) == (test, engine)
    ]


def speeds(rows: Iterable[Row], size: str, **fields: object) -> dict[int, float]:
    """Tokens a second by `size` (n_prompt or n_depth) of the rows with these fields."""
    return {
        row[size]: row["avg_ts"]
        for row in rows
        if all(row.get(name, False) == value for name, value in fields.items())
    }


def prompt_lines(record: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Line -> tokens a second by length of the prompt."""
    lines = {}
    for engine in ("pyggml", "llama.cpp"):
        for fa, text in ((1, "flash attention"), (0, "softmax")):
            rows = rows_of(record, "prompts", engine)
            lines[f"{engine}, {text}"] = speeds(rows, "n_prompt", flash_attn=fa)
    return {name: line for name, line in lines.items() if line}


def decode_lines(record: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Line -> tokens a second by depth of the cache."""
    rows = rows_of(record, "decoding")
    lines = {
        "pyggml, loop": speeds(rows, "n_depth", loop=True),
        "pyggml, latent f16": speeds(rows, "n_depth", loop=False),
        "pyggml, latent q8_0": speeds(rows_of(record, "q8_0 decoding"), "n_depth"),
        "pyggml, standard f16": speeds(rows_of(record, "standard decoding"), "n_depth"),
        "llama.cpp, latent f16": speeds(rows_of(record, "decoding", "llama.cpp"), "n_depth"),
    }
    return {name: line for name, line in lines.items() if line}


def by_size(lines: dict[str, dict[int, float]], size: str) -> tuple[list[str], list[list[str]]]:
    """A table with a column for each line, and the ratio of the two best lines of the engines."""
    sizes = sorted({n for line in lines.values() for n in line})
    names = list(lines)
    rows = []
    for n in sizes:
        values = [lines[name].get(n) for name in names]
        best = {
            engine: max(lines[name].get(n, 0.0) for name in names if name.startswith(engine))
            for engine in ("pyggml", "llama.cpp")
            if any(name.startswith(engine) for name in names)
        }
        ratio = f"{best['pyggml'] / best['llama.cpp']:.2f}" if best.get("llama.cpp") else ""
        rows.append([f"{n:,}", *("" if v is None else f"{v:,.0f}" for v in values), ratio])
    return [size, *names, "best / best"], rows


def memory(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Memory beside time of a prompt, by form of attention and by budget."""
    head = ["attention", "mla", "amb, MiB", "scores, MiB", "arena, MiB", "cache, MiB", "t/s"]
    rows = []
    for row in [*rows_of(record, "forms"), *rows_of(record, "budgets")]:
        sizes = (row["score_peak_bytes"], row["compute_bytes"], row["cache_bytes"])
        rows.append([
            "flash" if row["flash_attn"] else "softmax", str(row["mla"]),
            f"{row['amb']:g}" if row["amb"] else "none",
            *(f"{size / MIB:,.0f}" for size in sizes), f"{row['avg_ts']:,.0f}",
        ])  # fmt: skip
    return head, list(map(list, dict.fromkeys(map(tuple, rows))))


def main() -> int:
    from pyggml.bench.panels import BY_DEPTH, BY_LENGTH, Line, Panel
    from pyggml.bench.plot import draw

    record = newest()
    panels = [
        Panel(title, axis, tuple(
            Line(name, tuple((n, speed, 0.0) for n, speed in sorted(line.items())),
                 name.startswith("llama"))
            for name, line in lines.items()
        ))
        for title, axis, lines in (
            ("prompt", BY_LENGTH, prompt_lines(record)),
            ("generation", BY_DEPTH, decode_lines(record)),
        )
    ]  # fmt: skip
    draw(panels, PICTURE, f"DeepSeek-V2-Lite, IQ4_NL, on one {record['machine'].get('gpu', '')}")
    print(PICTURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
