"""Which kernels a GPU runs, and how many of them a process was told of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pyggml.backends.cuda.launch import Launch


@contextmanager
def bound(shared: int = 0) -> Iterator[Counter[tuple[str, str]]]:
    """How often each kernel (file, name) is bound on cuda:0 inside.

    shared  a block's bytes of shared memory there, fewer than the GPU has; then the kernels that
            only 9.0a has are not taken either
    """
    from pyggml.backends.cuda.device import driver

    context: Any = driver.context(0)
    about, load = context.about, context.load
    kernels = Counter[tuple[str, str]]()

    def counted(launches: Sequence[Launch]) -> None:
        kernels.update((one.file, one.name) for one in launches)
        load(launches)

    context.load = counted
    if shared:
        context.about = replace(about, arch=about.arch.rstrip("a"), shared=shared)
    try:
        yield kernels
    finally:
        context.about, context.load = about, load
