"""What is allocated through pycuda, counted from outside, and allocations that fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import finalize


class Allocations:
    """Blocks of GPUs and of pinned memory that are held now, over all devices; `made` ever."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}  # number of the allocation -> bytes
        self.made = 0
        self.failing = 0

    @property
    def blocks(self) -> int:
        return len(self.held)

    @property
    def nbytes(self) -> int:
        return sum(self.held.values())

    def watch(self, driver: Any) -> None:
        """Count what pycuda's driver module gives from now on; once for a module."""
        if getattr(driver, "allocations", None) is self:
            return
        driver.allocations = self
        mem_alloc, pagelocked = driver.mem_alloc, driver.pagelocked_empty

        def counted_alloc(nbytes: int) -> Block:
            self._begin(driver)
            return Block(self, mem_alloc(nbytes), self._add(nbytes))

        def counted_pagelocked(shape: int, dtype: Any) -> Any:
            self._begin(driver)
            array = pagelocked(shape, dtype)
            finalize(array, self.held.pop, self._add(array.nbytes), None)
            return array

        driver.mem_alloc, driver.pagelocked_empty = counted_alloc, counted_pagelocked

    def _begin(self, driver: Any) -> None:
        if self.failing:
            self.failing -= 1
            if not self.failing:
                raise driver.MemoryError("a test let this allocation fail: out of memory")

    def _add(self, nbytes: int) -> int:
        self.made += 1
        self.held[self.made] = nbytes
        return self.made


class Block:
    """A block of pycuda's, whose end is counted."""

    def __init__(self, allocations: Allocations, block: Any, number: int) -> None:
        self._block, self._end = block, finalize(self, allocations.held.pop, number, None)

    def __int__(self) -> int:
        return int(self._block)

    def free(self) -> None:
        self._end()
        self._block.free()


ALLOCATIONS = Allocations()


@contextmanager
def fail_allocation(number: int) -> Iterator[None]:
    """Let the allocation of that number, from 1 and from now on, fail as if memory were full."""
    ALLOCATIONS.failing = number
    try:
        yield
    finally:
        ALLOCATIONS.failing = 0
