"""The kernels of each step, named before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from pyggml.backends.base import NamesKernels
from pyggml.backends.step import Address, PlannedBuffer
from pyggml.passes.work import Work
from pyggml.runtime.execution import addresses
from pyggml.runtime.report import folds

#: Planned blocks of memory are this far apart, so that none overlap; aligned for every device.
_APART = 1 << 44
#: The longest repeated part that is written as one text.
SHORT = 3


def kernels_of(work: Work) -> list[list[str]]:
    """For each step, its kernels in the order of their launches, repeated ones once. Empty for
    copies, and for backends that cannot tell."""
    blocks = (PlannedBuffer(_APART * i) for i in count(1))
    leaves = {}
    for node in work.leaves:
        layout = work.layouts.get(node)
        name = "plain" if layout is None else layout.name
        leaves[node] = Address(next(blocks), 0, node.nb, name)
    arenas = {device: next(blocks) for device in work.placed.arenas}
    at = addresses(work, leaves, arenas)
    names: list[list[str]] = []
    for split in work.splits:
        backend = split.backend
        names += [[] for _ in split.copies]
        for step in split.steps:
            scratch = arenas[backend.device].ptr + work.placed.scratch_at[len(names)]
            if isinstance(backend, NamesKernels):
                names.append(lines_of(backend.kernel_names(step, at, scratch)))
            else:
                names.append([])
    return names


def lines_of(names: Sequence[str]) -> list[str]:
    """`a, b (16 times)` for a, b, a, b, ..."""
    texts: list[str] = []
    for fold in folds(names):
        part = names[fold.start : fold.start + fold.period]
        if fold.times == 1:
            texts += part
        elif fold.period <= SHORT:
            texts.append(f"{', '.join(part)} ({fold.times} times)")
        else:
            texts += [f"{fold.times} times:", *part]
    return texts
