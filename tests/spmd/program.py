"""A process of `mpiexec`: runs the words of a command line, or a graph, with something changed on
one rank.

python -m tests.spmd.program CHANGE WORD..
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import pyggml as gg
from pyggml import backends, cli
from pyggml.generate.session import Session
from pyggml.models import model as models
from pyggml.runtime.mpi import launched

job = launched()
assert job is not None
RANK = job[0]


def version() -> None:
    """Rank 1 has another version."""
    gg.__version__ = f"0.{RANK}"


def memory() -> None:
    """Rank 1 has 1 MB."""
    if RANK:
        backends.get("null", 1).limit = 1_000_000


def error() -> None:
    """Rank 1 fails at its third token."""
    forward = Session.forward
    calls: list[int] = []

    def fails(self: Session, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3 and RANK:
            raise ValueError("not today")
        return forward(self, *args, **kwargs)

    Session.forward = fails  # type: ignore[method-assign]


def plan() -> None:
    """Rank 1 cuts otherwise."""
    if RANK:
        compile = models.compile
        models.compile = lambda *a, **k: compile(*a, **k | {"shard": {"layers": 2}})


def end() -> None:
    """Rank 1 does not take part in the last token."""
    generate = Session.generate

    def shorter(self: Session, tokens: Any, n: int, *args: Any, **kwargs: Any) -> Any:
        return generate(self, tokens, n - 5 * RANK, *args, **kwargs)

    Session.generate = shorter  # type: ignore[method-assign]


def graph(folder: str, place: str) -> None:
    """A model's logits, tokens, memory and caches, by rank, in files."""
    ranks = gg.join()
    with gg.load(f"{folder}/tiny.gguf", backends=[place], ranks=ranks) as model:
        session = model.session(n_ctx=64, n_batch=16)
        logits = session.forward(range(40), "all")
        tokens = list(session.generate([4], 4))
        caches = {name: session.store.read(name, raw=True) for name in session.store.homes}
        arenas = np.array(list(session.store.arenas))
        np.savez(f"{folder}/{ranks.rank}", logits=logits, tokens=tokens, arenas=arenas, **caches)
        session.save(f"{folder}/saved.gguf")
        session.load(f"{folder}/saved.gguf")


def uncaught() -> None:
    """Rank 1 of a script without a `try` fails."""
    ranks = gg.join()
    if RANK:
        raise ValueError("not today")
    ranks.gather("waiting")


if __name__ == "__main__":
    change, *words = sys.argv[1:]
    action = globals()[change]
    if change in ("graph", "uncaught"):
        action(*words)
    else:
        action()
        sys.exit(cli.main(words))
