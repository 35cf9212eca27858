"""Simulate V2-Lite and V3 on 1 to 64 devices from the cost rules: a table and docs/scaling.svg.

    python tools/curves.py [--most N]

It takes a minute and no GPU: a few layers of each kind are planned and stand for the others. The
picture needs the extra `plot`. Only the rates are measured (`Rates` of pyggml/runtime/predict.py).
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.record import newest  # noqa: E402
from pyggml import gguf  # noqa: E402
from pyggml.bench.panels import Line, Panel  # noqa: E402
from pyggml.bench.plot import draw  # noqa: E402
from pyggml.generate.fit import Planner, Setup  # noqa: E402
from pyggml.generate.plans import padded_rows  # noqa: E402
from pyggml.generate.sampled import Sampled  # noqa: E402
from pyggml.models.model import Model  # noqa: E402
from pyggml.models.presets import V2_LITE, V3  # noqa: E402
from pyggml.models.synth import synth  # noqa: E402
from pyggml.runtime.places import parse  # noqa: E402

PAGE, PICTURE = ROOT / "docs" / "scaling.md", ROOT / "docs" / "scaling.svg"
N_BATCH, DEPTH = 2048, 8192
SIZES = (1, 2, 4, 8, 16, 32, 64)
#: Model -> the most devices of a stage: what its heads allow, and those of a host.
MODELS = {"DeepSeek-V2-Lite": (V2_LITE, (16, 8)), "DeepSeek-V3": (V3, (64, 8))}
#: The shape of V3 that was measured: layers with experts, and a small head.
SHAPE = replace(V3, n_layer_dense=0, n_vocab=1024)


class Row(NamedTuple):
    """MiB of weights and caches of the device that has most; tokens a second."""

    model: str
    group: int
    devices: int
    mib: float
    prompt: float
    decode: float


def cut(devices: int, group: int) -> Any:
    """`auto` over all devices, or over `group` of them in each stage."""
    if devices == 1:
        return None
    if devices <= group:
        return "auto"
    return {"layers": devices // group, "heads": group, "experts": group, "rows": group}


def simulate(name: str, path: Path, devices: int, group: int) -> Row:
    places = [parse(f"cuda:{i}:999GiB") for i in range(devices)]
    cuts = cut(devices, group)
    with gguf.open(path, allow_missing_data=True) as file:
        model = Model(file, backends=[str(place) for place in places])
        planner = Planner(model, places, {})
        if cuts is not None:
            planner = Sampled(model, places, {}, (), cuts)
        setup = Setup(n_ctx=DEPTH, n_batch=N_BATCH)
        memory = max(line.weights + line.states for line in planner.memory(setup).devices)
        prompt, token = (each.total for each in planner.times(setup))
    return Row(name, group, devices, memory / 2**20, N_BATCH / prompt, 1 / token)


def rows(folder: Path, most: int) -> list[Row]:
    result = []
    for name, (arch, groups) in MODELS.items():
        path = folder / f"{name}.gguf"
        synth(path, arch, dtype="iq4_nl", header_only=True)
        for group in groups:
            for devices in SIZES:
                if devices <= most and (group == groups[0] or devices > group):
                    result.append(simulate(name, path, devices, group))
                    print(result[-1], flush=True)
    return result


def table(found: list[Row]) -> str:
    lines = [
        "| model | devices | stages | MiB a device | prompt, t/s | ratio | decode, t/s | ratio |\n",
        "|---|---|---|---|---|---|---|---|\n",
    ]
    one = {row.model: row for row in found if row.devices == 1}
    for row in found:
        base, stages = one[row.model], max(1, row.devices // row.group)
        lines.append(
            f"| {row.model} | {row.devices} | {stages} | {row.mib:,.0f} | {row.prompt:,.0f} "
            f"| {row.prompt / base.prompt:.2f} | {row.decode:,.0f} "
            f"| {row.decode / base.decode:.2f} |\n"
        )
    return "".join(lines)


def plot(found: list[Row]) -> None:
    """The ratios to one device. Stages are dashed, and begin where one stage ends."""
    one = {row.model: row for row in found if row.devices == 1}

    def line(name: str, group: int, field: str) -> Line:
        first = MODELS[name][1][0]
        mine = [r for r in found if r.model == name and r.group in (first, group)]
        mine = [r for r in mine if r.group == group or r.devices == group]
        points = tuple(
            (r.devices, getattr(r, field) / getattr(one[name], field), 0.0) for r in mine
        )
        return Line(f"{name}, stages of up to {group}", points, peer=group != first)

    lines = [(name, group) for name, (_, groups) in MODELS.items() for group in groups]
    panels = [
        Panel(title, "devices", tuple(line(*key, field) for key in lines))
        for title, field in (
            (f"{N_BATCH} tokens of a prompt, the last of {DEPTH}", "prompt"),
            (f"decoding at depth {DEPTH}", "decode"),
        )
    ]
    title = "Simulated, not measured: from cost rules, at the rates of H100 and NVLink"
    draw(panels, PICTURE, title, y_label="speed, of one device = 1")


#: Row of the record -> the model, tokens of a prompt, and depth of decoding.
MEASURED = {
    "lite_prompt_8192": (V2_LITE, 8192, 0),
    "lite_decode_d4096": (V2_LITE, 0, 4096),
    "v3_prompt_2048": (SHAPE, 2048, 0),
    "v3_decode_d8192": (SHAPE, 0, 8192),
}


def compared(folder: Path) -> str:
    """What the rules say today of what the newest record has measured, in milliseconds."""
    values = {row["name"]: row["value"] for row in newest("scale")["rows"]}
    lines = [
        "| | one GPU, ms | predicted | two GPUs, ms | predicted | ratio | predicted |\n",
        "|---|---|---|---|---|---|---|\n",
    ]
    for name, (arch, n_prompt, depth) in MEASURED.items():
        if arch is SHAPE:
            arch = replace(arch, n_block=int(values["depth_1"]))
        path = folder / f"{name}.gguf"
        synth(path, arch, dtype="iq4_nl", header_only=True)
        cells, times = [], []
        for devices in (1, 2):
            places = [f"cuda:{i}:999GiB" for i in range(devices)]
            with gguf.open(path, allow_missing_data=True) as file:
                model = Model(file, backends=places, shard=cut(devices, 2))
                n_ctx = (n_prompt or depth + 64) + 64
                session = model.session(n_ctx=n_ctx, n_batch=N_BATCH)
                ends = range(N_BATCH, n_prompt + 1, N_BATCH) or [depth + 1]
                size = N_BATCH if n_prompt else 1
                plans = [session.plan(size, padded_rows(end, n_ctx), 1) for end in ends]
                times.append(1e3 * sum(plan.predict().total for plan in plans))
            cells += [f"{1e3 * (n_prompt or 1) / values[f'{name}_{devices}']:.3g}"]
            cells += [f"{times[-1]:.3g}"]
        ratio = values[f"{name}_2"] / values[f"{name}_1"]
        cells += [f"{ratio:.2f}", f"{times[0] / times[1]:.2f}"]
        lines.append(f"| `{name}` | {' | '.join(cells)} |\n")
    return "".join(lines)


def put(page: str, name: str, text: str) -> str:
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    return marks.sub(lambda match: match[1] + text + match[2], page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=64, help="the most devices")
    most = parser.parse_args().most
    with TemporaryDirectory() as folder:
        both, found = compared(Path(folder)), rows(Path(folder), most)
    page = put(PAGE.read_text(), "compared", both)
    PAGE.write_text(put(page, "curves", table(found)))
    plot(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
