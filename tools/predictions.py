"""Write the table of predicted times in docs/scaling.md: plans of `pyggml plan`, without a GPU.

    python tools/predictions.py [--check]

It takes some minutes: each row compiles all layers of a model.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pyggml import gguf  # noqa: E402
from pyggml.models.model import Model  # noqa: E402
from pyggml.models.presets import V2_LITE, V3  # noqa: E402
from pyggml.models.synth import synth  # noqa: E402

MARKS = re.compile(r"(<!-- predictions -->\n).*?(<!-- end -->)", re.DOTALL)
TWO = "layers=2,heads=4,experts=4,rows=4"
CUTS = (
    (1, "-"), (2, "auto"), (2, "heads=2"), (2, "layers=2"), (2, "sequence=2"), (4, "auto"),
    (8, "auto"), (8, TWO),
)  # fmt: skip
N_CTX, N_PROMPT = 16384, 512


def row(name: str, file: gguf.GGUFFile, devices: int, cut: str) -> str:
    """A line: memory of the device that has most, and times of a prompt and of a token."""
    options: dict[str, Any] = {"backends": [f"cuda:{i}:999GiB" for i in range(devices)]}
    if cut != "-":
        pairs = (part.split("=") for part in cut.split(","))
        options["shard"] = cut if cut == "auto" else {what: int(n) for what, n in pairs}
    model = Model(file, **options)
    session = model.session(n_ctx=N_CTX, n_batch=N_PROMPT)
    prompt, token = (session.plan(n, N_CTX, 1) for n in (N_PROMPT, 1))
    memory = session.memory()
    most = max(line.weights + line.states for line in memory.devices) / 2**20
    times = [1e3 * plan.predict().total for plan in (prompt, token)]
    shard = cut if cut == "-" else f"`{cut}`"
    return f"| {name} | {devices} | {shard} | {most:,.0f} | {times[0]:.3g} | {times[1]:.3g} |\n"


def table() -> str:
    lines = [
        "| model | devices | `--shard` | MiB a device | prompt, ms | token, ms |\n",
        "|---|---|---|---|---|---|\n",
    ]
    with TemporaryDirectory() as folder:
        for name, arch in (("DeepSeek-V2-Lite", V2_LITE), ("DeepSeek-V3", V3)):
            path = Path(folder) / f"{name}.gguf"
            synth(path, arch, dtype="iq4_nl", header_only=True)
            with gguf.open(path, allow_missing_data=True) as file:
                for devices, cut in CUTS:
                    lines.append(row(name, file, devices, cut))
                    print(lines[-1], end="", flush=True)
    return "".join(lines)


def main() -> int:
    path = ROOT / "docs" / "scaling.md"
    rows, text = table(), path.read_text()
    new = MARKS.sub(lambda match: match[1] + rows + match[2], text)
    if "--check" in sys.argv[1:]:
        return int(new != text)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
