"""Tiny models of every architecture, converted from transformers, with its logits.

    python -m tests.models.oracles build/oracles    needs torch and transformers

Tests on a GPU, whose machine need not have transformers, read them from that folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).resolve().parents[2] / "build" / "oracles"


class Oracle(NamedTuple):
    """A file, and the logits of transformers for `tokens`."""

    path: Path
    tokens: list[int]
    logits: NDArray[np.float32]


def write(name: str, folder: Path) -> Oracle:
    """Write a model of tests/models/tiny.py and the logits of transformers to a folder."""
    import torch

    from tests.models.convert import convert, random_model
    from tests.models.tiny import MODELS

    tiny = MODELS[name]
    torch.set_num_threads(1)
    model = random_model(tiny.config, tiny.seed)
    path = folder / f"{name}.gguf"
    convert(model, path, tiny.dtype, merged=tiny.merged)
    with torch.no_grad():
        logits = model(torch.tensor([tiny.tokens])).logits[0].numpy()
    np.savez(path.with_suffix(".npz"), tokens=tiny.tokens, logits=logits)
    return Oracle(path, tiny.tokens, logits)


def read(folder: Path = FOLDER) -> Iterator[Oracle]:
    """What `write` wrote to a folder."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as arrays:
            tokens = arrays["tokens"].tolist()
            yield Oracle(path.with_suffix(".gguf"), tokens, arrays["logits"])


if __name__ == "__main__":
    from tests.models.tiny import MODELS

    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        print(write(name, folder).path)
