"""Sums through boxes: the kernels of several GPUs at the same time, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyggml.backends.cuda import peer_sum
from pyggml.backends.cuda.launch import Collective, Launch
from pyggml.backends.cuda.peer_sum import CHUNK, ROOM, box_bytes, launch_of, round_of
from pyggml.backends.cuda.peers import Boxes
from tests.cuda.emulated import Meeting, Memory

Floats = NDArray[np.float32]
COUNTS = (2, 3, 4, 8)


class Gpus:
    """The boxes of `count` GPUs, and the words of the host that end waits."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.memory = [Memory(box_bytes(count)) for _ in range(count)]
        for each in self.memory:
            each.data[:] = 0
        self.words = np.zeros((count, 2), np.uint32)
        addresses = tuple(each.ptr for each in self.memory)
        self.boxes = [Boxes(addresses, i, self.words[i].ctypes.data) for i in range(count)]
        self.places = tuple(f"cuda:{i}" for i in range(count))
        self.turn = 0

    def launches(self, parts: Sequence[Floats], outs: Sequence[Floats]) -> list[Launch]:
        """Those of the next sum of a run."""
        n = parts[0].size
        launches = []
        self.turn += 1
        for i, boxes in enumerate(self.boxes):
            ends = outs[i].ctypes.data, parts[i].ctypes.data
            record = Collective("all_reduce", *ends, (n,) * self.count, "f32", self.places, i)
            launches.append(launch_of(record, round_of(boxes, self.turn), False, False))
        return launches


def total(parts: Sequence[Floats]) -> Floats:
    """The sum in the order of the GPUs."""
    result = parts[0].copy()
    for part in parts[1:]:
        result += part
    return result


def odd(rng: Any, shape: tuple[int, ...]) -> Floats:
    """Random numbers, a NaN, an infinity and zeros of both signs."""
    values: Floats = rng.standard_normal(shape, np.float32)
    flat = values.reshape(shape[0], -1)
    flat[0, -1], flat[-1, 0], flat[:, flat.shape[1] // 2] = np.nan, np.inf, -0.0
    return values


def shrunk(launch: Launch, threads: int) -> Launch:
    """The launch with fewer threads: each is a fiber here."""
    return replace(launch, block=(threads, 1, 1))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Meeting:
    return Meeting(tmp_path_factory.mktemp("small"), peer_sum.FILE, ["peer_sum"])


@pytest.mark.parametrize("count", COUNTS)
def test_small_sums(count: int, small: Meeting) -> None:
    """Parts of several sizes, one after another: a word of an earlier round is never taken."""
    rng, gpus = np.random.default_rng(0), Gpus(count)
    for order, n in enumerate((1, 5, CHUNK, CHUNK + 3, 3 * CHUNK, 7, ROOM, 1)):
        parts = odd(rng, (count, n))
        outs = np.zeros_like(parts)
        launches = [shrunk(each, 32) for each in gpus.launches(parts, outs)]
        assert small.run(launches, order=order)
        for out in outs:
            np.testing.assert_array_equal(out.view(np.uint32), total(parts).view(np.uint32))


def test_a_gpu_that_does_not_come(small: Meeting) -> None:
    """The others wait until the host ends that, and then say for whom they waited. Later waits end
    soon."""
    gpus, parts = Gpus(3), np.ones((3, 100), np.float32)
    outs = np.zeros_like(parts)
    launches = [shrunk(each, 32) for each in gpus.launches(parts, outs)]
    here = [launches[0], launches[2]]
    assert not small.run(here, turns=2000)
    gpus.words[[0, 2], 0] = 1
    assert small.run(here)
    assert gpus.words[:, 1].tolist() == [2, 0, 2]
    assert small.run(here, turns=2000)


def test_what_it_takes() -> None:
    record = Collective("all_reduce", 0, 0, (ROOM, ROOM), "f32", ("cuda:0", "cuda:1"), 0)
    larger = replace(record, counts=(ROOM + 1, ROOM + 1))
    many = replace(record, places=tuple(map(str, range(9))))
    assert peer_sum.suits(record) and not peer_sum.suits(larger)
    for other in (replace(record, type="f16"), replace(record, kind="all_gather"), many):
        assert not peer_sum.suits(other)
