"""Threads of the NumPy backend, which take parts of a large product of few rows.

NumPy releases the interpreter's lock while it computes a part. A thread that wants the lock back
waits for the others' steps between two parts, so parts must be large (products.LEAST). The thread
that calls takes parts too and never waits for a thread that has not begun: on a busy machine it
computes all of them. Threads sleep in between.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from functools import cache
from operator import length_hint
from typing import NamedTuple, TypeVar

from pyggml.backends.processors import n_threads

Part = TypeVar("Part")


def for_each(function: Callable[[Part], None], parts: Iterable[Part]) -> None:
    """Call the function once for each part, in several threads; return when all are done.

    After an exception, no thread begins another part, and it is raised here. NumPy's error state is
    that of the caller in all threads.
    """
    todo = iter(list(parts))  # the interpreter's lock makes each step of it atomic

    def work() -> None:
        try:
            for part in todo:
                function(part)
        finally:
            stop()

    def stop() -> None:
        """Leave no part to begin."""
        deque(todo, maxlen=0)

    futures: list[Future[None]] = []
    try:
        others = _others()
        n_others = min(others.number, length_hint(todo) - 1)
        futures.extend(others.pool.submit(copy_context().run, work) for _ in range(n_others))
        work()
    finally:
        stop()
        errors = [None if future.cancel() else future.exception() for future in futures]
    for error in errors:
        if error is not None:
            raise error


class _Others(NamedTuple):
    """The threads beside the caller's."""

    number: int
    pool: ThreadPoolExecutor


@cache
def _others() -> _Others:
    number = n_threads() - 1
    return _Others(number, ThreadPoolExecutor(max(1, number), thread_name_prefix="pyggml-numpy"))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_others.cache_clear)  # a child has none of the threads
