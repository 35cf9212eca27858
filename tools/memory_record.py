"""Plan sessions of published models and write benchmarks/results/memory.json.

python tools/memory_record.py && python tools/tables.py
python tools/memory_record.py glm-5    plan this model only; the record keeps the others

It needs no weights and no GPU, and takes some minutes. tools/tables.py makes the tables of
docs/memory.md from the record.
"""

from __future__ import annotations

import io
import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import Row, new, read, row, write  # noqa: E402
from pyggml.cli import main as pyggml  # noqa: E402

RECORD = ROOT / "benchmarks" / "results" / "memory.json"
_MLA = ((0, "off"), (0, "on"), (1, "off"), (1, "on"), (3, "on"))
_SPARSE = ((3, "on"),)
CONTEXTS = (4096, 16384, 65536, 163840)
_V4 = (4096, 16384, 65536, 1 << 18, 1 << 20)
#: Preset -> type of the weights, contexts, forms of attention (mla, fa).
MODELS: dict[str, tuple[str, tuple[int, ...], tuple[tuple[int, str], ...]]] = {
    "deepseek-v2-lite": ("iq4_nl", CONTEXTS, _MLA),
    "deepseek-v3": ("iq4_nl", CONTEXTS, _MLA),
    "deepseek-v3.2": ("iq4_nl", CONTEXTS, _SPARSE),
    "glm-5": ("iq4_nl", CONTEXTS, _SPARSE),
    "glm-5.2": ("iq4_nl", (*CONTEXTS, 1 << 20), _SPARSE),
    "deepseek-v4-flash": ("iq3_xxs", _V4, _SPARSE),
    "deepseek-v4-pro": ("q2_K", _V4, _SPARSE),
    "gpt-oss-120b": ("mxfp4", (*CONTEXTS[:-1], 131072), ((3, "off"), (3, "on"))),
}
BUDGETS = (None, 2048, 512)
BATCH = 512


def cases(preset: str) -> Iterator[dict[str, Any]]:
    """The cases of a model: mla, fa, amb and n_ctx."""
    _, contexts, forms = MODELS[preset]
    for mla, fa in forms:
        for amb in BUDGETS:
            for n_ctx in contexts:
                yield {"mla": mla, "fa": fa, "amb": amb, "n_ctx": n_ctx}


def measure(path: Path, case: dict[str, Any]) -> dict[str, Any]:
    """The plan of a case: bytes of weights, caches and compute, and the score peak."""
    words = ["plan", "-m", str(path), "--device", "cuda", "-ub", str(BATCH), "--json"]
    words += ["-c", str(case["n_ctx"]), "-mla", str(case["mla"]), "-fa", case["fa"]]
    if case["amb"] is not None:
        words += ["-amb", str(case["amb"])]
    with redirect_stdout(io.StringIO()) as out:
        if pyggml(words):
            raise SystemExit(f"failed: pyggml {' '.join(words)}")
    report = json.loads(out.getvalue())
    (device,) = report["devices"]
    sizes = {key: device[key] for key in ("weights", "caches", "inputs", "compute", "workspace")}
    return sizes | {"score_peak": report["score_peak"]}


def record_row(model: str, type_: str, case: dict[str, Any]) -> Row:
    """A row of the record; its value is the bytes of compute memory, all others are in `case`."""
    words = (f"{key} {case[key]}" for key in ("mla", "fa", "amb", "n_ctx"))
    name = f"{model}, {', '.join(words)}"
    return row(name, "B", case["compute"], model=model, type=type_, case=case)


def header(preset: str, folder: Path) -> Path:
    """A file of the model without weights."""
    path = folder / f"{preset}.gguf"
    type_ = MODELS[preset][0]
    with redirect_stdout(io.StringIO()):
        pyggml(["synth", str(path), "--preset", preset, "--type", type_, "--header-only"])
    return path


def main() -> None:
    chosen = sys.argv[1:] or list(MODELS)
    rows = [row for row in read(RECORD)["rows"] if row["model"] not in chosen]
    record = new("python tools/memory_record.py", about={"batch": BATCH})
    record["machine"] = {"devices": "none: sessions are planned for a GPU that need not exist"}
    with tempfile.TemporaryDirectory() as name:
        for preset in chosen:
            path = header(preset, Path(name))
            uncut: dict[tuple[Any, ...], dict[str, Any]] = {}
            for case in cases(preset):
                key = case["mla"], case["fa"], case["n_ctx"]
                plain = uncut.get(key)
                if plain is not None and plain["score_peak"] <= case["amb"] * 2**20:
                    continue  # the budget changes nothing
                result = measure(path, case)
                uncut.setdefault(key, result)
                rows.append(record_row(preset, MODELS[preset][0], case | result))
                print(preset, case, f"{result['compute'] / 2**20:.2f} MiB", file=sys.stderr)
    record["rows"] = sorted(rows, key=lambda row: list(MODELS).index(row["model"]))
    write(RECORD, record)


if __name__ == "__main__":
    main()
