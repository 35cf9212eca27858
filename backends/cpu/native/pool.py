"""Threads that run programs. They sleep in a semaphore between programs and use no time then.

The threads are Python's, but each of them enters native code once and stays there, so neither the
interpreter's lock nor a signal comes between them and a program. The thread that calls `run` is one
of them. They start with the first program that needs them.

Semaphores are those of Linux's C library. On other systems programs run in one thread.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.cpu.native.program import (
    CONTROL_BYTES,
    ERROR,
    START,
    STOPPED,
    TIME,
    TIMED_WALK,
    WALK,
    WORDS,
    WORK,
    Program,
)
from pyggml.backends.host_memory import ALIGNMENT, address_of, allocated
from pyggml.backends.processors import n_threads

_Entry = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


class StoppedError(Exception):
    """A kernel found an id past the end: the id, and the number of the call in the program."""

    def __init__(self, call: int, id_: int) -> None:
        super().__init__(call, id_)
        self.call, self.id = call, id_


class Pool:
    """A number of threads, and what they share."""

    def __init__(self, threads: int) -> None:
        self.threads = threads if sys.platform == "linux" else 1
        self._lock = threading.Lock()  # one program at a time
        self._control = allocated(CONTROL_BYTES)
        self._events = allocated(ALIGNMENT * self.threads)
        self._job = np.zeros(3, np.int64)
        self._started = False

    def run(
        self,
        program: Program,
        first: int = 0,
        count: int | None = None,
        times: NDArray[np.int64] | None = None,
    ) -> None:
        """Run a packed program, or `count` of its calls from `first` on.

        times  receives the time before the threads are woken and after each call, as seconds and
               nanoseconds: (count + 1, 2); only if `can_time()`
        Errors: StoppedError if a kernel reports an id; the calls after it did not run.
        """
        count = len(program) - first if count is None else count
        with self._lock:
            if not self._started:
                self._start_threads()
                self._started = True
            self._job[:] = program.address + 8 * WORDS * first, count, self.threads
            words = self._start_words if times is None else self._timed(times)
            if times is not None:  # not in the walk: another thread may do all work before it
                times[0] = divmod(time.perf_counter_ns(), 10**9)
            self._start(address_of(words), address_of(self._job), 0)
            stopped, error = self._word(STOPPED), self._word(ERROR)
        if stopped >= 0:
            raise StoppedError(first + stopped, error)

    def _word(self, offset: int) -> int:
        return int(self._control[offset : offset + 8].view(np.int64)[0])

    def _start_threads(self) -> None:
        give_way, wait, post = _system()
        for thread in range(1, self.threads):
            event = address_of(self._events) + ALIGNMENT * thread
            ctypes.CDLL(None).sem_init(ctypes.c_void_p(event), 0, 0)
        control, events = address_of(self._control), address_of(self._events)
        walk_words = _words(control, give_way, 0, 0, 0)
        inner = WALK.ready(), address_of(walk_words)
        self._system = control, post, events, give_way
        self._start_words = _words(control, post, events, *inner, give_way)
        work_words = _words(control, wait, events, *inner)
        self._keep = walk_words, work_words
        self._start = _Entry(START.ready())
        work = _Entry(WORK.ready())
        for thread in range(1, self.threads):
            threading.Thread(
                target=work, args=(address_of(work_words), thread, 0), daemon=True,
                name=f"pyggml-cpu-{thread}",
            ).start()  # fmt: skip

    def _timed(self, times: NDArray[np.int64]) -> NDArray[np.int64]:
        """The words of a start whose thread 0 takes the times."""
        assert times.itemsize * times.shape[1] == TIME and times.flags.c_contiguous
        control, post, events, give_way = self._system
        clock, which = _clock()
        self._timed_words = _words(control, give_way, clock, which, address_of(times))
        inner = TIMED_WALK.ready(), address_of(self._timed_words)
        return _words(control, post, events, *inner, give_way)


def can_time() -> bool:
    """Whether this system has the clock of C that `time.perf_counter` reads, too."""
    return sys.platform == "linux"


def _clock() -> tuple[int, int]:
    """The address of clock_gettime, and the clock's number."""
    function = ctypes.CDLL(None).clock_gettime
    return ctypes.cast(function, ctypes.c_void_p).value or 0, time.CLOCK_MONOTONIC


def _words(*values: int) -> NDArray[np.int64]:
    """Arguments of a kernel: its counter and the values."""
    return np.array([0, *values], np.int64)


def _system() -> tuple[int, int, int]:
    """The addresses of sched_yield, sem_wait and sem_post, 0 where there are none."""
    if sys.platform != "linux":
        return 0, 0, 0
    library: Any = ctypes.CDLL(None)
    functions = library.sched_yield, library.sem_wait, library.sem_post
    addresses = [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]
    return addresses[0], addresses[1], addresses[2]


@cache
def pool() -> Pool:
    """The pool of this process, with `n_threads()` threads."""
    return Pool(n_threads())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # a child has none of the threads
