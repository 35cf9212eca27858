"""Many kernels in one call: a table of calls that all threads walk together.

A call is five words: the kernel's entry, its arguments, who runs it, and where the weights of the
next product begin and end. Every thread runs a kernel on its own share, and they meet after each.
So a decode step of 500 kernels is one call from Python, and a meeting of threads costs 0.2 us.

A kernel with little work is run by thread 0 alone. Between such kernels nobody meets, and what they
pass on stays in that thread's cache. In a decode step that is half of all kernels. Meanwhile the
others fetch weights of the next dense product: a token of the `small` model takes 4 % less time,
one of V2-Lite up to 1 %.

The design that lost: one Python call per kernel. ctypes takes 1 us and waking a thread 5 to 50 us,
which is more than most kernels of a small model take.

For the times of kernels, thread 0 takes a second walk, which asks the clock after each kernel. The
other threads, and programs that nobody times, run the same code as ever. A reading takes 25 ns. The
design that lost: the processor's cycle counter. It is 15 ns faster, but some processors forbid it
to programs, and its rate must be measured.

Threads share `CONTROL_BYTES` of words, each in its own cache line:

    ARRIVED  how many threads have finished the current kernel
    TURN     changes when all of them have
    STOPPED  how many kernels ran before the one that reported an error; -1: none did. Only the last
             thread of a kernel writes it, or thread 0 alone; all threads leave at the next meeting
    ERROR    the id that it reported
    JOB      changes with every program
    LEFT     how many of the other threads have left the program. Only when all have, the next one
             may change these words: a thread that was held up may still have to read them
    LINGER   turns of a waiting loop before the threads fall asleep after this program
    TABLE, COUNT, THREADS   the program, and how many threads run it

A kernel's arguments begin with a word that is 0 when it starts. Threads count in it who takes which
share of the work. A kernel reports an id past the end by storing -1 - id there.

Each thread has EVENT_BYTES of its own: the memory that it sleeps in (`sleep.py`), the arguments of
the functions for that at WAIT and POST, and at ASLEEP whether it does, so that a program wakes only
those that do. To wake a thread costs the one that starts a program 2 to 5 us, and the thread itself
is late by 5 to 50.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.host_memory import address_of

_LINE = 64
ARRIVED, TURN, ERROR, STOPPED, JOB, LEFT, LINGER, TABLE, COUNT, THREADS = (
    i * _LINE for i in range(10)
)
CONTROL_BYTES = 10 * _LINE
WAIT, POST, ASLEEP, EVENT_BYTES = _LINE, _LINE + 24, 2 * _LINE, 3 * _LINE

#: Turns of a waiting loop before a thread lets others run: about 50 us. Beside three busy processes
#: on two cores a token takes 29 ms; with 50,000 turns 150 ms, with 5,000,000 52 ms. On a quiet
#: machine the number makes no difference.
SPINS = 2000

#: Turns before threads fall asleep between programs of one run: half a millisecond to one, several
#: times what a GPU needs for its part of a layer.
BETWEEN = 20_000

#: Words of a call.
WORDS = 5

#: Bytes that a waiting thread fetches at most: half of a second-level cache of 1 MiB.
AHEAD = 1 << 19

#: Who runs a call: all threads, or thread 0 alone. After CHAINED it goes on to the next one.
SHARED, ALONE, CHAINED = range(3)


class Program:
    """A list of calls. `add` them, then `pack`.

    address  of the packed table
    """

    address = 0

    def __init__(self) -> None:
        self._entries: list[int] = []
        self._alone: list[bool] = []
        self.names: list[str] = []  # of the kernels
        self._arguments: list[list[int]] = []
        self._reads: list[tuple[int, int]] = []
        self._table = self._words = np.empty(0, np.int64)

    def __len__(self) -> int:
        return len(self._entries)

    def add(
        self,
        kernel: Native,
        *values: int | float,
        alone: bool = False,
        reads: tuple[int, int] = (0, 0),
    ) -> None:
        """Append a call with these values of the kernel's parameters.

        alone  for one thread
        reads  the address and bytes of weights that it reads
        """
        assert len(values) == len(kernel.types), kernel.name
        words = [0]  # the counter
        for value, kind in zip(values, kernel.types):
            words.append(int(value) if kind == "i" else _bits(value))
        self._entries.append(kernel.ready())
        self._alone.append(alone)
        self._reads.append(reads)
        self.names.append(kernel.name)
        self._arguments.append(words)

    def pack(self) -> None:
        """Lay out the tables; the program must not change afterwards."""
        # A counter for each call in a cache line of its own: threads change it.
        sizes = [-(-len(words) // 8) * 8 for words in self._arguments]
        starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        memory = np.zeros(int(starts[-1]) + 8, np.int64)
        skip = -address_of(memory) % _LINE // 8
        self._words = memory[skip:]
        for start, words in zip(starts, self._arguments):
            self._words[start : start + len(words)] = words
        alone = np.array([*self._alone, False])
        self._table = np.empty((len(self), WORDS), np.int64)
        self._table[:, 0] = self._entries
        self._table[:, 1] = address_of(self._words) + 8 * starts[:-1]
        self._table[:, 2] = np.where(alone[:-1], np.where(alone[1:], CHAINED, ALONE), SHARED)
        following = (0, 0)
        for number in reversed(range(len(self))):
            self._table[number, 3:] = following
            start, nbytes = self._reads[number]
            if nbytes:
                following = (start, start + nbytes)
        self.address = address_of(self._table)


def _bits(value: float) -> int:
    return int(np.float64(value).view(np.int64))


def packed(calls: Sequence[tuple[Native, tuple[int | float, ...]]]) -> Program:
    """A program of these calls."""
    program = Program()
    for kernel, values in calls:
        program.add(kernel, *values)
    program.pack()
    return program


# -- the native side ------------------------------------------------------------------------------


#: Bytes of a time: whole seconds and nanoseconds, as in C's timespec.
TIME = 16


def _walk(timed: bool) -> Callable[..., None]:
    """The walk. `timed`: with the time after each kernel, from `times + TIME` on, as `clock` (C's
    clock_gettime) gives it for its first parameter `which`."""
    from pyggml.backends.cpu.native.memory import (
        call,
        fetch_add,
        i64_at,
        load_acquire,
        pause,
        prefetch,
        put_i64,
        store_release,
    )

    def walk(
        control: int, give_way: int, clock: int, which: int, times: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        table, count = i64_at(control + TABLE), i64_at(control + COUNT)
        for number in range(count):
            words = table + 8 * WORDS * number
            kernel, arguments, who = i64_at(words), i64_at(words + 8), i64_at(words + 16)
            if who == SHARED:
                call(kernel, arguments, thread, threads)
            elif thread == 0 and i64_at(control + STOPPED) < 0:
                call(kernel, arguments, 0, 1)
                if i64_at(arguments) < 0:
                    put_i64(control + ERROR, -1 - i64_at(arguments))
                    put_i64(control + STOPPED, number)
                put_i64(arguments, 0)
            if who == CHAINED:
                if timed:
                    call(clock, which, times + TIME * (number + 1), 0)
                continue
            turn = load_acquire(control + TURN)
            if fetch_add(control + ARRIVED, 1) == threads - 1:
                put_i64(control + ARRIVED, 0)
                own_word = i64_at(arguments)
                put_i64(arguments, 0)  # for the next run
                if own_word < 0:
                    put_i64(control + ERROR, -1 - own_word)
                    put_i64(control + STOPPED, number)
                store_release(control + TURN, turn + 1)
            else:
                spins = 0
                ahead = i64_at(words + 24) + _LINE * thread
                end = min(i64_at(words + 32), ahead + AHEAD * threads)
                while load_acquire(control + TURN) == turn:
                    if ahead < end:
                        prefetch(ahead)
                        ahead += _LINE * threads
                        continue
                    pause()
                    spins += 1
                    if spins > SPINS:
                        call(give_way, 0, 0, 0)
            if timed:
                call(clock, which, times + TIME * (number + 1), 0)
            # Thread 0 may be ahead and have stopped at a later call. Then it waits for the others.
            if 0 <= i64_at(control + STOPPED) <= number:
                break

    return walk


def _work() -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import (
        call,
        exchange,
        fetch_add,
        i64_at,
        load_acquire,
        pause,
        store_release,
    )

    def work(
        control: int, wait: int, events: int, walk: int, arguments: int, give_way: int,
        own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        """The life of a thread: wait for a program, walk it, and again. A wait may end without
        cause, for example by a signal."""
        job, linger, event = 0, 0, events + EVENT_BYTES * thread
        while True:
            spins = 0
            while spins < linger and load_acquire(control + JOB) == job:
                pause()
                spins += 1
                if spins % SPINS == 0:
                    call(give_way, 0, 0, 0)
            linger = 0
            if load_acquire(control + JOB) == job:
                exchange(event + ASLEEP, 1)
                # Who starts a program changes JOB and then looks who sleeps: one of both sees the
                # other. If both do, the next wait ends at once, without cause.
                if load_acquire(control + JOB) == job:
                    at = event + WAIT
                    call(wait, i64_at(at), i64_at(at + 8), i64_at(at + 16))
                store_release(event + ASLEEP, 0)
                continue
            job = load_acquire(control + JOB)
            linger = i64_at(control + LINGER)
            call(walk, arguments, thread, i64_at(control + THREADS))
            fetch_add(control + LEFT, 1)

    return work


def _start() -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import (
        call,
        exchange,
        i64_at,
        load_acquire,
        pause,
        put_i64,
        store_release,
    )

    def start(
        control: int, post: int, events: int, walk: int, arguments: int, give_way: int,
        own: int, program: int, unused: int,
    ) -> None:  # fmt: skip
        """Run a program: four words, table, count, threads and the turns of waiting after it.
        Returns when all have finished."""
        threads = i64_at(program + 16)
        put_i64(control + TABLE, i64_at(program))
        put_i64(control + COUNT, i64_at(program + 8))
        put_i64(control + THREADS, threads)
        put_i64(control + LINGER, i64_at(program + 24))
        put_i64(control + STOPPED, -1)
        put_i64(control + LEFT, 0)
        exchange(control + JOB, i64_at(control + JOB) + 1)
        for thread in range(1, threads):
            event = events + EVENT_BYTES * thread
            if load_acquire(event + ASLEEP) != 0:
                store_release(event + ASLEEP, 0)
                at = event + POST
                call(post, i64_at(at), i64_at(at + 8), i64_at(at + 16))
        call(walk, arguments, 0, threads)
        spins = 0
        while load_acquire(control + LEFT) < threads - 1:
            pause()
            spins += 1
            if spins > SPINS:
                call(give_way, 0, 0, 0)

    return start


WALK = Native("walk", "iiiii", partial(_walk, False))
TIMED_WALK = Native("timed_walk", "iiiii", partial(_walk, True))
WORK = Native("work", "iiiiii", _work)
START = Native("start", "iiiiii", _start)
