"""Counts allocations through pycuda from outside, and makes them fail."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import finalize


class Allocations:
    """Live blocks of GPU memory and pinned memory over all devices; `count` includes freed ones."""

    def __init__(self) -> None:
        self.live: dict[int, int] = {}  # number of the allocation -> bytes
        self.count = 0
        self.failing = 0

    @property
    def blocks(self) -> int:
        return len(self.live)

    @property
    def nbytes(self) -> int:
        return sum(self.live.values())

    def watch(self, driver: Any) -> None:
        """Count the allocations of pycuda's driver module from now on. Idempotent."""
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
            finalize(array, self.live.pop, self._add(array.nbytes), None)
            return array

        driver.mem_alloc, driver.pagelocked_empty = counted_alloc, counted_pagelocked

    def _begin(self, driver: Any) -> None:
        if self.failing:
            self.failing -= 1
            if not self.failing:
                raise driver.MemoryError("a test let this allocation fail: out of memory")

    def _add(self, nbytes: int) -> int:
        self.count += 1
        self.live[self.count] = nbytes
        return self.count


class Block:
    """A block of pycuda that leaves the count when it is freed."""

    def __init__(self, allocations: Allocations, block: Any, number: int) -> None:
        self._block, self._end = block, finalize(self, allocations.live.pop, number, None)

    def __int__(self) -> int:
        return int(self._block)

    def free(self) -> None:
        self._end()
        self._block.free()


ALLOCATIONS = Allocations()


@contextmanager
def fail_allocation(number: int) -> Iterator[None]:
    """Inside, the `number`-th allocation (from 1) fails as if memory were full."""
    ALLOCATIONS.failing = number
    try:
        yield
    finally:
        ALLOCATIONS.failing = 0
