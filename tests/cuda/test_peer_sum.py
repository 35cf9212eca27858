"""Sums through boxes: the kernels of several GPUs at the same time, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pyggml.backends.cuda import peer_sum, peer_sum_large
from pyggml.backends.cuda.launch import Collective, Launch
from pyggml.backends.cuda.peer_box import box_bytes, launch_of
from pyggml.backends.cuda.peer_sum import CHUNK, ROOM
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

    def launches(self, parts: Sequence[Floats], outs: Sequence[Floats]) -> list[Launch]:
        n = parts[0].size
        launches = []
        for i, boxes in enumerate(self.boxes):
            ends = outs[i].ctypes.data, parts[i].ctypes.data
            record = Collective("all_reduce", *ends, (n,) * self.count, "f32", self.places, i)
            launch = launch_of(record, boxes, False)
            assert launch is not None
            launches.append(launch)
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


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Meeting:
    return Meeting(tmp_path_factory.mktemp("large"), peer_sum_large.FILE, ["peer_sum_large"])


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


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("count", COUNTS)
def test_large_sums(count: int, inplace: bool, large: Meeting) -> None:
    """Parts of one tile, of more tiles than slots, and of sizes that no vector divides; what lies
    around them stays."""
    rng, gpus = np.random.default_rng(1), Gpus(count)
    sizes = (ROOM + 1, ROOM + 4, 70_001, 2 * ROOM + 3)
    for order, n in enumerate(sizes):
        rows = odd(rng, (count, n + 8))
        shift = order % 2  # of addresses: no vectors
        parts = [row[shift : shift + n] for row in rows]
        wanted, margin = total(parts), rows[:, shift + n :].copy()
        spare = np.zeros((count, n + 8), np.float32)
        outs = parts if inplace else [row[shift : shift + n] for row in spare]
        launches = [_of_blocks(each) for each in gpus.launches(parts, outs)]
        assert large.run(launches, resident=2, order=order)
        for out in outs:
            np.testing.assert_array_equal(out.view(np.uint32), wanted.view(np.uint32))
        np.testing.assert_array_equal(rows[:, shift + n :], margin)


def _of_blocks(launch: Launch) -> Launch:
    """Few blocks and threads, and so more tiles for each than there are slots."""
    return replace(launch, grid=(min(3, launch.grid[0]), 1, 1), block=(32, 1, 1))


@pytest.mark.parametrize("resident", [1, 2])
def test_blocks_that_do_not_fit_at_once(resident: int, large: Meeting) -> None:
    """Blocks wait only for those of the same number, so none has to run beside another one."""
    gpus, rng = Gpus(3), np.random.default_rng(2)
    parts = odd(rng, (3, 60_000))
    outs = np.zeros_like(parts)
    launches = [replace(e, grid=(9, 1, 1), block=(32, 1, 1)) for e in gpus.launches(parts, outs)]
    assert large.run(launches, resident=resident)
    for out in outs:
        np.testing.assert_array_equal(out, total(parts))


@pytest.mark.parametrize("n", [100, ROOM + 100])
def test_a_gpu_that_does_not_come(n: int, small: Meeting, large: Meeting) -> None:
    """The others wait until the host ends that, and then say for whom they waited."""
    meeting, gpus = (small if n <= ROOM else large), Gpus(3)
    parts = np.ones((3, n), np.float32)
    outs = np.zeros_like(parts)
    launches = [shrunk(e, 32) for e in gpus.launches(parts, outs)]
    launches = [replace(e, grid=(2 if n > ROOM else 1, 1, 1)) for e in launches]
    here = [launches[0], launches[2]]
    assert not meeting.run(here, turns=2000)
    gpus.words[[0, 2], 0] = 1
    assert meeting.run(here)
    assert gpus.words[:, 1].tolist() == [2, 0, 2]


def test_what_it_takes() -> None:
    record = Collective("all_reduce", 0, 0, (ROOM, ROOM), "f32", ("cuda:0", "cuda:1"), 0)
    larger = replace(record, counts=(ROOM + 1, ROOM + 1))
    many = replace(record, places=tuple(map(str, range(9))))
    assert peer_sum.suits(record) and not peer_sum.suits(larger) and peer_sum_large.suits(larger)
    for other in (replace(record, type="f16"), replace(record, kind="all_gather"), many):
        assert not peer_sum.suits(other) and not peer_sum_large.suits(other)


@pytest.mark.parametrize("count", COUNTS)
def test_tiles(count: int) -> None:
    """Every element is in a tile, tiles fit the slots, and blocks have as many as others."""
    boxes = Boxes(tuple(range(count)), 0, 0)
    for n in (ROOM + 1, 10**6, 2048 * 2048, 2048 * 7168 + 5, 10**9 + 1):
        record = Collective("all_reduce", 0, 0, (n,) * count, "f32", ("",) * count, 0)
        launch = peer_sum_large.launch_of(record, boxes, 0, False)
        piece = int.from_bytes(launch.args[24:28], "little")
        blocks, tiles = launch.grid[0], -(-n // (piece * count))
        assert piece % 4 == 0 and 0 < piece <= peer_sum_large.TILE // count
        assert blocks == min(peer_sum_large.BLOCKS, tiles)
        assert tiles % blocks == 0 or -(-tiles // blocks) * piece * count * blocks < 1.1 * n + 9000
