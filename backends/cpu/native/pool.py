"""Threads that run programs. They sleep between programs (`sleep.py`) and use no time then.

The threads are Python's, but each of them enters native code once and stays there, so neither the
interpreter's lock nor a signal comes between them and a program. The thread that calls `run` is one
of them. They start with the first program that needs them.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pyggml.backends.cpu.native.program import (
    BETWEEN,
    CONTROL_BYTES,
    ERROR,
    EVENT_BYTES,
    POST,
    START,
    STOPPED,
    TIME,
    TIMED_WALK,
    WAIT,
    WALK,
    WORDS,
    WORK,
    Program,
)
from pyggml.backends.cpu.native.sleep import sleep
from pyggml.backends.host_memory import address_of, allocated
from pyggml.backends.processors import n_threads

#: The name of each thread.
THREAD = "pyggml-cpu"

_Entry = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)


class StoppedError(Exception):
    """A kernel found an id past the end: the id, and the number of the call in the program."""

    def __init__(self, call: int, id_: int) -> None:
        super().__init__(call, id_)
        self.call, self.id = call, id_


class Pool:
    """A number of threads, and what they share."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._lock = threading.Lock()  # one program at a time
        self._control = allocated(CONTROL_BYTES)
        self._events = allocated(EVENT_BYTES * self.threads)
        control = address_of(self._control)
        self._stopped = ctypes.c_int64.from_address(control + STOPPED)
        self._error = ctypes.c_int64.from_address(control + ERROR)
        self._job = (ctypes.c_int64 * 4)()
        self._job_at = ctypes.addressof(self._job)
        self._numbers = iter(range(1, self.threads))  # of threads; the caller's is 0
        self._work: Callable[[int], None] | None = None
        self._started = False

    def run(
        self,
        program: Program,
        first: int = 0,
        count: int | None = None,
        times: NDArray[np.int64] | None = None,
        *,
        more: bool = False,
    ) -> None:
        """Run a packed program, or `count` of its calls from `first` on.

        more   whether another one follows soon, so that the threads wait for it awake for a while
        times  receives the time before the threads are woken and after each call, as seconds and
               nanoseconds: (count + 1, 2); only if `can_time()`
        Errors: StoppedError if a kernel reports an id; the calls after it did not run.
        """
        count = len(program) - first if count is None else count
        with self._lock:
            if not self._started:
                self._start_threads()
                self._started = True
            job = self._job
            start = program.address + 8 * WORDS * first
            job[:] = [start, count, self.threads, BETWEEN * more]
            words = self._start_at
            if times is not None:
                timed = self._timed(times)
                words = address_of(timed)
                # not in the walk: another thread may do all work before it
                times[0] = divmod(time.perf_counter_ns(), 10**9)
            self._start(words, self._job_at, 0)
            stopped, error = self._stopped.value, self._error.value
        if stopped >= 0:
            raise StoppedError(first + stopped, error)

    def _start_threads(self) -> None:
        """Start the threads. After an interrupt at any line, the next run calls this again."""
        work = self._work or self._prepared()
        for _ in range(1, self.threads):
            threading.Thread(target=self._live, args=(work,), daemon=True, name=THREAD).start()

    def _live(self, work: Callable[[int], None]) -> None:
        """A thread takes the next number. After an interrupt some are too many, and end."""
        number = next(self._numbers, None)
        if number is not None:
            work(number)

    def _prepared(self) -> Callable[[int], None]:
        """Prepare what the threads share; the life of the thread with a number."""
        wait, post, give_way, event = sleep()
        words = self._events.view(np.int64).reshape(self.threads, -1)
        for own in words[1:]:
            arguments = event(address_of(own))
            own[WAIT // 8 : WAIT // 8 + 3], own[POST // 8 : POST // 8 + 3] = arguments
        control, events = address_of(self._control), address_of(self._events)
        walk_words = _words(control, give_way, 0, 0, 0)
        inner = WALK.ready(), address_of(walk_words)
        self._system = control, post, events, give_way
        start_words = _words(control, post, events, *inner, give_way)
        self._start_at = address_of(start_words)
        work_words = _words(control, wait, events, *inner, give_way)
        self._keep = walk_words, start_words, work_words
        self._start = _Entry(START.ready())
        work, at = _Entry(WORK.ready()), address_of(work_words)
        self._work = lambda number: work(at, number, 0)
        return self._work

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


@cache
def pool() -> Pool:
    """The pool of this process, with `n_threads()` threads."""
    return Pool(n_threads())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.cache_clear)  # a child has none of the threads
