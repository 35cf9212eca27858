"""Sums through boxes: the kernel on the host, each half of a round by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pyggml.backends.cuda.launch import Collective, Launch
from pyggml.backends.cuda.peer_sum import CHUNK, ROOM, box_bytes, launch_of, suits
from tests.cuda.emulated import Memory, starter

SIZES = (1, 5, CHUNK, CHUNK + 3, 3 * CHUNK, 7)


@pytest.mark.parametrize("count", [2, 3])
def test_sums(count: int, tmp_path: Path) -> None:
    """Parts of several sizes, one after another: a word of an earlier round is never taken."""
    rng = np.random.default_rng(0)
    boxes = [Memory(box_bytes(count)) for _ in range(count)]
    for box in boxes:
        box.data[:] = 0
    addresses = tuple(box.ptr for box in boxes)
    places = tuple(f"cuda:{i}" for i in range(count))
    names = [f"peer_sum<{halves}>" for halves in ("true, false", "false, true")]
    blank = Launch("peer_sum.cu", names[0], (1, 1, 1), (1, 1, 1), b"")
    start = starter(tmp_path, [blank, replace(blank, name=names[1])])
    for n in SIZES:
        parts = rng.standard_normal((count, n), np.float32)
        outs = np.zeros_like(parts)
        launches = [
            launch_of(
                Collective(
                    "all_reduce", outs[i].ctypes.data, parts[i].ctypes.data, (n,) * count, "f32",
                    places, i,
                ),
                addresses, False,
            )
            for i in range(count)
        ]  # fmt: skip
        for name in names:
            for launch in launches:
                start(replace(launch, name=name))
        wanted = parts[0].copy()
        for part in parts[1:]:
            wanted += part
        for out in outs:
            np.testing.assert_array_equal(out, wanted)


def test_what_it_takes() -> None:
    record = Collective("all_reduce", 0, 0, (ROOM, ROOM), "f32", ("cuda:0", "cuda:1"), 0)
    assert suits(record)
    assert not suits(replace(record, counts=(ROOM + 1, ROOM + 1)))
    assert not suits(replace(record, type="f16"))
    assert not suits(replace(record, kind="all_gather"))
    assert not suits(replace(record, places=tuple(map(str, range(9)))))
