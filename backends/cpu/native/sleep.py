"""How threads of the pool sleep, and how others wake them, on each system.

Native code calls C functions of three integers, so a thread sleeps and is woken by one call each:

    Linux         sem_wait and sem_post
    Windows       WaitForSingleObject and ReleaseSemaphore
    other POSIX   read and write of one byte of a pipe: macOS has no semaphores without names

A wait may end without cause; a wake before the wait ends the next one.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

Words = tuple[int, int, int]
Event = Callable[[int], tuple[Words, Words]]


class Sleep(NamedTuple):
    """Functions of the system.

    wait, post, give_way  addresses in C; the last lets other threads run
    event                 from the address of 32 bytes, the arguments of wait and of post for one
                          thread
    """

    wait: int
    post: int
    give_way: int
    event: Event


def semaphores() -> Sleep:
    library = ctypes.CDLL(None)

    def event(at: int) -> tuple[Words, Words]:
        library.sem_init(ctypes.c_void_p(at), 0, 0)
        return (at, 0, 0), (at, 0, 0)

    return _sleep(library.sem_wait, library.sem_post, library.sched_yield, event)


def pipes() -> Sleep:
    library = ctypes.CDLL(None)

    def event(at: int) -> tuple[Words, Words]:
        out, into = os.pipe()
        return (out, at, 1), (into, at, 1)

    return _sleep(library.read, library.write, library.sched_yield, event)


def windows() -> Sleep:
    kernel: Any = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
    kernel.CreateSemaphoreW.restype = ctypes.c_void_p

    def event(at: int) -> tuple[Words, Words]:
        handle: int = kernel.CreateSemaphoreW(None, 0, 1 << 30, None)
        return (handle, 0xFFFFFFFF, 0), (handle, 1, 0)

    give_way = kernel.SwitchToThread
    return _sleep(kernel.WaitForSingleObject, kernel.ReleaseSemaphore, give_way, event)


def sleep() -> Sleep:
    """That of this system."""
    if sys.platform == "linux":
        return semaphores()
    return windows() if sys.platform == "win32" else pipes()


def _sleep(wait: Any, post: Any, give_way: Any, event: Event) -> Sleep:
    addresses = [ctypes.cast(each, ctypes.c_void_p).value or 0 for each in (wait, post, give_way)]
    return Sleep(addresses[0], addresses[1], addresses[2], event)
