"""Find out which kernels a plan uses on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pyggml.backends.cuda.launch import Launch


@contextmanager
def bound(shared: int = 0) -> Iterator[Counter[tuple[str, str]]]:
    """Count how often each kernel (file, name) is bound on cuda:0 inside the context.

    shared  pretend that a block has only so many bytes of shared memory, and that the GPU lacks
            the features of 9.0a
    """
    from pyggml.backends.cuda.device.context import context as context_of

    context: Any = context_of(0)
    about, load = context.about, context.load
    kernels = Counter[tuple[str, str]]()

    def counted(launches: Sequence[Launch]) -> None:
        kernels.update((launch.file, launch.name) for launch in launches)
        load(launches)

    context.load = counted
    if shared:
        context.about = replace(about, arch=about.arch.rstrip("a"), shared=shared)
    try:
        yield kernels
    finally:
        context.about, context.load = about, load
