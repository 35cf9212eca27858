"""The GPU's record: every row that docs/performance.md shows, measured in one run.

    python benchmarks/gpu.py                       all parts, into benchmarks/results/h200/
    python benchmarks/gpu.py layer linear --out F  some parts

Parts: layer (one V2-Lite MoE layer), linear (products, experts), attention, parity (the small
grid), examples (errors). Each runs in a process of its own. Times are medians of 20; what lies
behind each row says its own file, gpu_*.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
KERNELS = ROOT / "backends" / "cuda" / "kernels"
Row = dict[str, Any]

#: Rows of the other scripts: their name -> ours, unit, and how the value follows from
#: microseconds t (and, for shares, the copy's TB/s c).
FLOPS = {"up": 4 * 6 * 2048 * 1408, "fa": 2 * 16 * (192 + 128) / 2}
LINEAR = {
    "mul_mat iq4_nl n=1": ("mul_mat_vec_iq4_nl", "of copy", lambda t, c: 33.03e6 / t / 1e6 / c),
    "mul_mat q8_0 n=1": ("mul_mat_vec_q8_0", "of copy", lambda t, c: 62.39e6 / t / 1e6 / c),
    "mul_mat iq4_nl n=512": (
        "mul_mat_iq4_nl_n512", "TFLOP/s", lambda t, c: 2 * 4096 * 14336 * 512 / t / 1e6
    ),
    "moe_up_gate t=1 N=None": ("moe_up_gate_iq4_nl_t1", "us", lambda t, c: t),
    "moe_up_gate t=512 N=None": (
        "moe_up_gate_iq4_nl_t512", "TFLOP/s", lambda t, c: 512 * FLOPS["up"] / t / 1e6
    ),
    "moe_up_gate t=2048 N=None": (
        "moe_up_gate_iq4_nl_t2048", "TFLOP/s", lambda t, c: 2048 * FLOPS["up"] / t / 1e6
    ),
}  # fmt: skip
ATTENTION = {
    **{
        f"fa_192_128_h16_n{n}": ("TFLOP/s", lambda t, n=n: n * n * FLOPS["fa"] / t / 1e6)
        for n in (2048, 8192, 16384)
    },
    "fa_192_128_h16_q1_n16384": ("TB/s", lambda t: 16384 * 16 * 320 * 2 / t / 1e6),
    "fa_576_512_h16_q1_n16384": ("us", lambda t: t),
    "fa_576_512_h128_q1_n16384": ("us", lambda t: t),
}


def started(*words: str, seconds: float = 300) -> str:
    """What a script of this folder (or an example) prints."""
    command = [sys.executable, "-W", "ignore", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=ROOT)
    if done.returncode:
        print(f"!! {' '.join(words)}: {done.returncode}: {(done.stdout + done.stderr)[-800:]}")
    return done.stdout


def lines(text: str) -> list[Row]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def layer() -> list[Row]:
    with TemporaryDirectory() as folder:
        started(str(HERE / "gpu_layer.py"), "--json", f"{folder}/rows.json")
        rows: list[Row] = json.loads(Path(f"{folder}/rows.json").read_text())
    return [row for row in rows if " " not in row["name"]]


def linear() -> list[Row]:
    found = {r["row"]: r for r in lines(started(str(HERE / "gpu_linear.py"), "time_dense"))}
    found |= {r["row"]: r for r in lines(started(str(HERE / "gpu_linear.py"), "time_experts"))}
    copy = found["copy"]["rate"]
    rows = [{"name": "copy", "value": copy, "unit": "TB/s", "samples": []}]
    for theirs, (name, unit, value) in LINEAR.items():
        if theirs in found:
            samples = [value(t, copy) for t in found[theirs]["samples"]]
            rows.append(
                {"name": name, "value": value(found[theirs]["us"], copy), "unit": unit,
                 "samples": samples}
            )  # fmt: skip
    return rows


def attention() -> list[Row]:
    script, rows = str(HERE / "gpu_attention.py"), []
    with TemporaryDirectory() as folder:
        started(script, "compile", folder)
        for group in ("fa_192", "fa_576"):
            for row in lines(started(script, "bars", folder, group)):
                if row["row"] in ATTENTION and row.get("samples"):
                    unit, value = ATTENTION[row["row"]]
                    samples = [value(t) for t in row["samples"]]
                    rows.append(
                        {"name": row["row"], "value": value(row["us"]), "unit": unit,
                         "samples": samples}
                    )  # fmt: skip
    return rows


def parity() -> list[Row]:
    jobs = str(max(1, (os.cpu_count() or 2) - 1))
    text = started(str(HERE / "gpu_check.py"), "parity", "-j", jobs)
    ok, failed, unsupported = map(int, text.split("\nall ")[1].split()[:3])
    share = unsupported / (ok + failed + unsupported)
    return [
        {"name": "parity_failed", "value": failed, "unit": "cases", "samples": [ok, failed]},
        {"name": "parity_unsupported_share", "value": share, "unit": "", "samples": []},
    ]


def examples() -> list[Row]:
    worst: dict[str, float] = {}
    with TemporaryDirectory() as folder:
        for prec, tail in (("default", ""), ("f32", "_prec_f32")):
            out = f"{folder}/moe.json"
            words = ("--backend", "cuda", "--prec", prec, "--json", out)
            started("examples/deepseek_moe_layer.py", *words)
            told = json.loads(Path(out).read_text())
            for row in told if isinstance(told, list) else told["rows"]:
                key = f"example_worst_error_{row['cache']}{tail}"
                error = max(row["prompt_error"], row["decode_error"])
                worst[key] = max(error, worst.get(key, 0.0))
    return [{"name": k, "value": v, "unit": "", "samples": []} for k, v in worst.items()]


PARTS = {f.__name__: f for f in (layer, linear, attention, parity, examples)}


def machine() -> dict[str, str]:
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem"
    told = subprocess.run(
        ["nvidia-smi", query, "--format=csv,noheader"], capture_output=True, text=True
    )
    packages = ("numpy", "pycuda", "cupy-cuda13x", "cuda-bindings", "torch")
    return {"gpu": told.stdout.strip(), **{name: metadata.version(name) for name in packages}}


def fingerprint() -> str:
    """What kernels the record was made from."""
    told = hashlib.sha256()
    for path in sorted(KERNELS.iterdir()):
        told.update(path.name.encode() + path.read_bytes())
    return told.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="", help="where git cannot be asked")
    args = parser.parse_args()
    told: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": " ".join(["python benchmarks/gpu.py", *args.parts]),
        "commit": args.commit,
        "kernels": fingerprint(),
        "machine": machine(),
        "rows": [],
    }
    out = args.out or HERE / "results" / "h200" / f"{told['date']}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    for name in args.parts or PARTS:
        try:
            found = PARTS[name]()
        except Exception as error:  # one part that breaks does not take the others along
            print(f"!! {name}: {type(error).__name__}: {error}")
            continue
        for row in found:
            print(f"{row['name']:32} {row['value']:10.4g} {row['unit']}", flush=True)
        told["rows"] += found
        out.write_text(json.dumps(told, indent=1) + "\n")  # what is there if a later part hangs


if __name__ == "__main__":
    main()
