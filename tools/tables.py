"""Write the tables of README.md and docs/ from the records in benchmarks/results/.

python tools/tables.py           write them
python tools/tables.py --check   exit with status 1 if a document differs from its record
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

from benchmarks import report  # noqa: E402
from benchmarks.bars import BARS  # noqa: E402
from benchmarks.record import RESULTS, newest, read  # noqa: E402

MARKS = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def record(name: str) -> dict[str, Any]:
    return read(RESULTS / f"{name}.json")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    lines.insert(1, "|" + "---|" * len(head))
    return "\n".join(lines) + "\n"


def conditions(result: dict[str, Any]) -> str:
    """A line with the command, date, machine and versions of a record."""
    machine, versions = result["machine"], result["versions"]
    return (
        f"`{result['command']}` on {result['date']}, {machine['cpu']}, {machine['cores']} cores, "
        f"Python {versions['python']}, NumPy {versions['numpy']} ({versions['blas']}).\n"
    )


def readme() -> str:
    """The README's table: attention forms with an f16 cache, without a budget and with two."""
    names = {"standard": "standard 192/128", "latent": "latent 576/512", "expanded": "expanded"}
    rows = []
    for row in (row["case"] for row in record("deepseek_attention")["rows"]):
        if row["cache"] != "f16" or row["amb"] == row["peak"]:
            continue  # a budget equal to the peak cuts nothing
        form = f"{names[row['form']]}, {'flash' if row['flash'] else 'softmax'}"
        amb = "none" if row["amb"] is None else f"{row['amb']:.1f}"
        peak = f"{row['peak']:.1f}" if row["peak"] else "-"
        rows.append([form, amb, peak, f"{row['arena']:.1f}", row["cut"], f"{row['error']:.0e}"])
    head = ["attention (f16 cache)", "budget", "score peak", "arena", "cut into", "error"]
    intro = (
        "One DeepSeek-V2-Lite attention layer, a prompt of 512 tokens on the NumPy backend; MiB, "
        "and\nrelative error against float64:\n\n"
    )
    return intro + table(head, rows)


def whole_model() -> str:
    """Speed of a whole model beside llama.cpp's. Each has its better kind of attention in prompts,
    and latent attention over an f16 cache in decoding."""
    result = report.newest()
    lines = (report.prompt_lines(result), report.decode_lines(result))
    names = {
        (0, 512): "prompt of 512 tokens",
        (0, 2048): "prompt of 2,048 tokens",
        (0, 8192): "prompt of 8,192 tokens",
        (1, 128): "decoding, 128 tokens in the cache",
        (1, 4096): "decoding, 4,096 tokens in the cache",
        (1, 16384): "decoding, 16,384 tokens in the cache",
    }
    rows = []
    for (kind, size), what in names.items():
        best = {
            engine: max(
                line[size]
                for name, line in lines[kind].items()
                if name.startswith(engine) and (not kind or "latent f16" in name)
            )
            for engine in ("pyggml", "llama.cpp")
        }
        ours, theirs = best["pyggml"], best["llama.cpp"]
        rows.append([what, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.1f}x"])
    gpu = result["machine"]["gpu"].removeprefix("NVIDIA ").split()[0]
    intro = (
        f"DeepSeek-V2-Lite with random IQ4_NL weights on one {gpu} with 16 processors, in tokens\n"
        "per second, beside llama.cpp on the same file in the same hour, "
        f"{result['date']}. The\nhost reads the logits of each token:\n\n"
    )
    return intro + table(["", "pyggml", "llama.cpp", "ratio"], rows)


def example() -> str:
    """All rows of the attention example, with times."""
    result = record("deepseek_attention")
    rows = []
    for row in (row["case"] for row in result["rows"]):
        flash = "flash" if row["flash"] else "softmax"
        sizes = ["none" if row["amb"] is None else f"{row['amb']:.2f}"]
        sizes += [f"{row[key]:.2f}" for key in ("peak", "arena")]
        times = [f"{row[key]:.0f}" for key in ("prompt", "decode")]
        error = f"{row['error']:.1e}"
        rows.append([row["form"], flash, row["cache"], *sizes, error, *times, row["cut"]])
    head = ["form", "attention", "cache", "amb", "score peak", "arena", "error", "prompt, ms",
            "decode, ms/token", "cut into"]  # fmt: skip
    return conditions(result) + "\n" + table(head, rows)


def sparse() -> str:
    """Rows of the example of sparse attention, with an f16 cache."""
    result = record("sparse_attention")
    rows = []
    for row in (row["case"] for row in result["rows"] if row["case"]["cache"] == "f16"):
        form = f"ratio {row['form']}" if row["form"].isdigit() else row["form"]
        swaps = "-" if row["swaps"] is None else f"{row['swaps']:.1f}"
        sizes = [f"{row[key]:.2f}" if row[key] else "-" for key in ("states", "arena", "peak")]
        times = [
            f"{row[key]:.0f} ({gain:.1f}x)" for key, gain in zip(("prompt", "token"), row["gains"])
        ]
        error = f"{row['error']:.1e}"
        rows.append([row["model"], form, f"{row['depth']:,}", error, swaps, *sizes, *times])
    head = ["model", "form", "depth", "error", "swaps", "cache", "arena", "score peak",
            "prompt, ms", "token, ms"]  # fmt: skip
    about = result["about"]
    intro = f"{conditions(result)}{about['header']}. BLAS threads: {about['threads']}.\n\n"
    return intro + table(head, rows)


def kernels() -> str:
    """Kernels compared with plain NumPy, and decoding."""
    result = record("kernels")
    pairs: dict[str, dict[str, float]] = {}
    single = []
    for row in result["rows"]:
        if row["side"]:
            pairs.setdefault(row["group"], {})[row["side"]] = row["value"]
        else:
            single.append([f"`{row['name']}`", f"{row['value'] * 1e3:.1f}"])
    comparison = [
        [name, f"{t['pyggml'] * 1e3:.2f}", f"{t['plain'] * 1e3:.2f}", ratio(t)]
        for name, t in pairs.items()
    ]
    head = ["kernel", "pyggml, ms", "plain NumPy, ms", "ratio"]
    text = conditions(result) + "\nMedians.\n\n" + table(head, comparison)
    return text + "\n" + table(["benchmark", "ms"], single)


def ratio(times: dict[str, float]) -> str:
    return f"{times['pyggml'] / times['plain']:.2f}"


def gpu(card: str = "h200") -> str:
    """The newest record of a GPU, with the bars and goals of an H200."""
    result = newest(card)
    rows = [gpu_row(row) for row in result["rows"]]
    measured = {row["name"] for row in result["rows"]}
    rows += [[f"`{name}`", "not measured", *[""] * 3] for name in BARS if name not in measured]
    head = ["row", "measured", "unit", "bar", "goal"]
    return gpu_conditions(result) + "\n\n" + table(head, rows)


def gpu_row(row: dict[str, Any]) -> list[str]:
    value, unit = row["value"], row["unit"]
    bar, goal = BARS.get(row["name"], (row["bar"], row["goal"]))
    text = ""
    if bar is not None:
        is_rate = row["better"] == "more"
        text = f"{'at least' if is_rate else 'at most'} {bar:,g}"
        if value < bar if is_rate else value > bar:
            text += ", missed"
    number = f"{value:.0f}" if unit in ("cases", "graphs", "tests") else f"{value:.4g}"
    return [f"`{row['name']}`", number, unit, text, "" if goal is None else f"{goal:,g}"]


def gpu_conditions(result: dict[str, Any]) -> str:
    """The command, date, hardware, versions and sources of a record, and clocks during it."""
    about = result["about"]
    values = [*parts_of(result), f"commit {result['commit']}", f"kernels {result['kernels']}"]
    sentences = [f"`{result['command']}` on {result['date']}, {', '.join(values)}."]
    clocks = [f"{c['clocks']} {c['sm']}, {c['memory']}, {c['power']}" for c in result["clocks"]]
    if clocks:
        sentences.append(f"SM clock, memory clock and power: {'; '.join(clocks)}.")
    sentences.append(f"Parity: {about['grid']} cases of the grid.")
    sentences += other_commits(about)
    sentences += [f"Fault: {fault}." for fault in about["faults"]]
    sentences += [f"Skipped: {skip}." for skip in about.get("skipped", ())]
    return " ".join(sentences)


def other_commits(about: dict[str, Any]) -> list[str]:
    """Which parts of a record were measured at other commits, as a sentence."""
    names: dict[str, list[str]] = {}
    for part, commit in about.get("other commits", {}).items():
        names.setdefault(commit, []).append(part)
    parts = "; ".join(f"{', '.join(each)} of {commit}" for commit, each in names.items())
    return [f"Rows of other commits: {parts}."] if parts else []


def parts_of(result: dict[str, Any]) -> list[str]:
    """The hardware and the versions of a record."""
    return [f"{key} {value}" for key, value in (result["machine"] | result["versions"]).items()]


def memory(preset: str) -> str:
    """What sessions of a model need beside the weights: rows by attention, columns by context."""
    result = record("memory")
    cases = [row["case"] for row in result["rows"] if row["model"] == preset]
    type_ = next(row["type"] for row in result["rows"] if row["model"] == preset)
    rows: dict[tuple[str, str, str], dict[int, str]] = {}
    for row in cases:
        mla = "-" if preset.startswith(("gpt", "deepseek-v4")) else str(row["mla"])
        amb = "none" if row["amb"] is None else str(row["amb"])
        sizes = (gib(row["caches"]), gib(row["compute"] + row["workspace"]))
        rows.setdefault((mla, row["fa"], amb), {})[row["n_ctx"]] = " + ".join(sizes)
    contexts = sorted({row["n_ctx"] for row in cases})
    cells = [[*key, *(sizes.get(n, "as without") for n in contexts)] for key, sizes in rows.items()]
    weights = sorted({row["weights"] for row in cases})
    text = " to ".join(dict.fromkeys(map(gib, (weights[0], weights[-1]))))
    batch = result["about"]["batch"]
    intro = f"Weights ({type_}): {text} GiB. Batches of {batch} tokens.\n\n"
    return intro + table(["mla", "fa", "amb, MiB", *map(str, contexts)], cells)


def memory_measured() -> str:
    """The parts of V4-Flash's memory on a GPU, as planned and as measured."""
    result = newest("h200")
    rows = [row for row in result["rows"] if row["name"].startswith("v4_whole_")]
    sizes = [row for row in rows if row["unit"] == "GiB"]
    if not sizes:
        return "Not measured yet.\n"
    cells = [
        [row["name"].removeprefix("v4_whole_"), f"{row['planned']:.2f}", f"{row['value']:.2f}"]
        for row in sizes
    ]
    times = {row["name"]: row["value"] for row in rows}
    intro = (
        f"{result['machine']['gpu']}, {result['date']}, commit {result['commit']}. "
        f"The weights were loaded in {times['v4_whole_load']:.1f} s.\n\n"
    )
    return intro + table(["", "planned, GiB", "measured, GiB"], cells)


def gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f}"


def cpu() -> str:
    """The newest record of benchmarks/cpu.py."""
    result = newest("cpu")
    rows = []
    for row in result["rows"]:
        ours = row["samples"].get("pyggml t/s") if isinstance(row["samples"], dict) else None
        speeds = [f"{median(ours):.0f}", f"{row['peer']:.0f}"] if ours else ["", ""]
        value = f"{row['value']:.2f} {row['unit']}"
        rows.append([f"`{row['name']}`", *speeds, value, f"{row['bar']:g}", f"{row['goal']:g}"])
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in ("llama_cpp", "numba"))
    intro = (
        f"{conditions(result)}{result['about']['threads']} threads; {versions}.\n\n"
        "Medians; speeds are tokens a second.\n\n"
    )
    return intro + table(["row", "pyggml", "llama.cpp", "measured", "bar", "goal"], rows)


def speeds(which: str) -> str:
    """A table of the newest record of benchmarks/gpu_speeds.py."""
    result = report.newest()
    tables = {
        "length": lambda: report.by_size(report.prompt_lines(result), "tokens"),
        "depth": lambda: report.by_size(report.decode_lines(result), "depth"),
        "memory": lambda: report.memory(result),
    }
    head, rows = tables[which]()
    return table(head, rows)


def speeds_conditions() -> str:
    """The command, date and machine of that record."""
    result = report.newest()
    values = ", ".join(parts_of(result))
    return f"`{result['command']}` on {result['date']}, {values}, commit {result['commit']}.\n"


def scale() -> str:
    """The newest record of benchmarks/scale.py: one GPU, two or four, and their ratio."""
    if not any((RESULTS / "scale").glob("*.json")):
        return "Not measured yet.\n"
    result = newest("scale")
    values = {row["name"]: row for row in result["rows"]}
    rows = []
    for name, row in values.items():
        if not name.endswith("_ratio"):
            continue
        name = name.removesuffix("_ratio")
        speeds = [values[each] for n in (1, 2, 4) if (each := f"{name}_{n}") in values]
        cells = [f"{speed['value']:,.4g} {speed['unit']}" for speed in speeds] or ["", ""]
        guess = values.get(f"{name}_ratio_predicted")
        text = "" if guess is None else f"{guess['value']:.2f}"
        missed = ", missed" if row["value"] < row["bar"] else ""
        limits = [f"{row['bar']:g}{missed}", f"{row['goal']:g}"]
        rows.append([f"`{name}`", *cells, f"{row['value']:.2f}", text, *limits])
    head = ["", "one GPU", "two GPUs, or four", "ratio", "predicted", "bar", "goal"]
    machine = ", ".join(parts_of(result))
    about = result["about"]
    sentences = [
        f"`{result['command']}` on {result['date']}, {machine}, NCCL "
        f"{about.get('nccl', 'not recorded')}, commit {result['commit']}.",
        *other_commits(about),
    ]
    return " ".join(sentences) + "\n\n" + table(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "speed_conditions": speeds_conditions,
    "speed_length": lambda: speeds("length"),
    "speed_depth": lambda: speeds("depth"),
    "speed_memory": lambda: speeds("memory"),
    "cpu": cpu,
    "readme": readme,
    "whole_model": whole_model,
    "example": example,
    "sparse": sparse,
    "kernels": kernels,
    "scale": scale,
    "gpu": gpu,
    "gpu_h100": lambda: gpu("h100"),
    "memory_v2_lite": lambda: memory("deepseek-v2-lite"),
    "memory_v3": lambda: memory("deepseek-v3"),
    "memory_v32": lambda: memory("deepseek-v3.2"),
    "memory_glm_5": lambda: memory("glm-5"),
    "memory_glm_52": lambda: memory("glm-5.2"),
    "memory_v4_flash": lambda: memory("deepseek-v4-flash"),
    "memory_v4_measured": memory_measured,
    "memory_v4_pro": lambda: memory("deepseek-v4-pro"),
    "memory_gpt_oss": lambda: memory("gpt-oss-120b"),
}


def main() -> int:
    stale = []
    docs = ROOT / "docs"
    for path in (
        ROOT / "README.md",
        docs / "performance.md",
        docs / "memory.md",
        docs / "scaling.md",
    ):
        old = path.read_text()
        new = MARKS.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], old)
        if new != old and "--check" in sys.argv:
            stale.append(path.name)
        elif new != old:
            path.write_text(new)
    if stale:
        print(f"out of date: {', '.join(stale)}; run python tools/tables.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
