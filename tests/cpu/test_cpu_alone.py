"""Kernels with little work are run by one thread; the order and the errors of a program stay."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.native.pool import Pool, StoppedError
from pyggml.backends.cpu.native.program import Program
from pyggml.backends.host_memory import address_of
from pyggml.models.presets import preset
from pyggml.models.synth import synth


def _append() -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import fetch_add, put_i64

    def run(count: int, place: int, id_: int, own: int, thread: int, threads: int) -> None:
        """Count the threads that came, and write at `place` their number so far and `threads`."""
        if thread == 0:
            put_i64(place + 8, threads)
            if id_ >= 0:
                put_i64(own, -1 - id_)
        put_i64(place, fetch_add(count, 1))

    return run


APPEND = Native("append_for_tests", "iii", _append)
#: Who runs each call.
ALONE = (True, True, False, False, True, False, True, True, True)


@cache
def pool() -> Pool:
    """Its threads never end, and it must not before them."""
    return Pool(3)


def program(memory: np.ndarray, bad: int = -1) -> Program:
    calls = Program()
    for i, alone in enumerate(ALONE):
        id_ = 7 if i == bad else -1
        calls.add(APPEND, address_of(memory), address_of(memory) + 8 + 16 * i, id_, alone=alone)
    calls.pack()
    return calls


def test_calls_run_in_order_alone_or_by_all() -> None:
    for _ in range(100):
        memory = np.zeros(1 + 2 * len(ALONE), np.int64)
        pool().run(program(memory))
        threads = np.array([1 if alone else pool().threads for alone in ALONE])
        assert np.array_equal(memory[2::2], threads)
        assert memory[0] == threads.sum()
        assert np.all(np.diff(memory[1::2]) > 0)  # one after the other


@pytest.mark.parametrize("first", range(len(ALONE)))
def test_any_part_of_a_program_runs(first: int) -> None:
    for count in range(1, len(ALONE) - first + 1):
        memory = np.zeros(1 + 2 * len(ALONE), np.int64)
        pool().run(program(memory), first, count)
        assert np.flatnonzero(memory[2::2]).tolist() == list(range(first, first + count))


@pytest.mark.parametrize("bad", range(len(ALONE)))
def test_the_calls_after_a_bad_id_do_not_run(bad: int) -> None:
    """Also in the middle of several that one thread runs; and the program runs again."""
    for _ in range(20):
        memory = np.zeros(1 + 2 * len(ALONE), np.int64)
        calls = program(memory, bad)
        with pytest.raises(StoppedError) as caught:
            pool().run(calls)
        assert (caught.value.call, caught.value.id) == (bad, 7)
        assert np.count_nonzero(memory[2::2]) == bad + 1
        if bad:
            pool().run(calls, 0, bad)
    assert memory[0] > 0


RUNS = """
import hashlib, sys
import pyggml as gg
from pyggml.backends.cpu.native.pool import pool
results = set()
with gg.load(sys.argv[1], backends=["cpu"]) as model:
    for _ in range(10):
        session = model.session(n_ctx=128, n_batch=64)
        logits = [session.forward(range(3, 50), outputs="all")]
        logits += [session.forward([token]) for token in range(9)]
        results.add(hashlib.sha256(b"".join(x.tobytes() for x in logits)).hexdigest())
print(pool().threads, len(results), *results)
"""


@pytest.mark.parametrize("name", ["tiny", "tiny-gpt-oss"])
def test_runs_with_two_threads_give_the_same_bytes(tmp_path: Path, name: str) -> None:
    synth(tmp_path / "m.gguf", preset(name), dtype="q4_0")
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(tmp_path / "m.gguf")],
        cwd=Path(gg.__file__).parent.parent, env={**os.environ, "PYGGML_THREADS": "2"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    threads, count, *_ = done.stdout.split()
    assert int(count) == 1 and (threads == "2" or sys.platform != "linux")
