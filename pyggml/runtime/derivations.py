"""Derived constants, computed by threads while the weights before them are uploaded."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from pyggml.backends.processors import n_threads
from pyggml.node import Node
from pyggml.ops.leaf import data_of, derived_from

#: The most threads, and the most arrays that wait for their upload.
MOST = 4


class Derivations:
    """The arrays of constants that are asked for in this order. Leaving the context waits for what
    the threads have begun, and drops the rest."""

    def __init__(self, constants: Iterable[Node]) -> None:
        self._left = deque(dict.fromkeys(each for each in constants if derived_from(each)))
        self._most = min(n_threads(), MOST) if len(self._left) > 1 else 0
        self._pool = ThreadPoolExecutor(max(self._most, 1), "pyggml-derive")
        self._futures: dict[Node, Future[NDArray[Any]]] = {}

    def __enter__(self) -> Derivations:
        return self  # an interrupt in here would not come to `__exit__`, so no thread begins yet

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _begin(self) -> None:
        while self._left and len(self._futures) < self._most:
            constant = self._left.popleft()
            self._futures[constant] = self._pool.submit(data_of, constant)

    def of(self, constant: Node) -> NDArray[Any]:
        """The array. For a second device, it may have to be computed again."""
        self._begin()
        future = self._futures.pop(constant, None)
        if future is None:
            return data_of(constant)
        values = future.result()
        self._begin()  # the next one, beside the upload
        return values
