"""Sums of parts on two GPUs, for benchmarks/scale.py: by our graphs, and by calls of NCCL."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import numpy as np

import pyggml as gg
from pyggml import backends

PLACES = ["cuda:0", "cuda:1"]


def reduce_chain(
    nbytes: int, count: int, boxes: bool = True, buffers: list[Any] | None = None
) -> Callable[[], None]:
    """Replays graphs of `count` sums of parts of `nbytes` in place on both GPUs.

    boxes    False: by NCCL also where our own kernel could
    buffers  the parts
    """
    from pyggml.backends.cuda.lowering import step_of
    from pyggml.backends.step import Address
    from pyggml.joint import joint_reduce

    devices: list[Any] = [backends.get("cuda", i) for i in range(2)]
    devices[0].connect(devices, None, None)
    runners = []
    for index, device in enumerate(devices):
        end = device.context.communicators[tuple(PLACES)]
        own = end.box
        end.box = own if boxes else None
        node = gg.input("p", ne=(nbytes // 4,))
        buffer = device.alloc(nbytes) if buffers is None else buffers[index]
        at = {node: Address(buffer, 0, node.spec.nb)}
        steps = []
        for turn in range(count):
            attrs = {"places": tuple(PLACES), "index": index, "turn": turn}
            node = joint_reduce.make((node,), attrs, node.spec, line=False)
            at[node] = Address(buffer, 0, node.spec.nb)
            steps.append(step_of(node))
        runners.append(device.bind(steps, at, buffer, [0] * count))
        end.box = own
    return devices[0].together(runners).run  # type: ignore[no-any-return]


def reduced(parts: list[Any], count: int) -> list[Any]:
    """What both GPUs have after `count` sums in place."""
    from pyggml.backends.step import Address

    devices: list[Any] = [backends.get("cuda", i) for i in range(2)]
    buffers = [device.alloc(part.nbytes) for device, part in zip(devices, parts)]
    spec = gg.input("p", ne=(parts[0].size,)).spec
    places = [Address(buffer, 0, spec.nb) for buffer in buffers]
    for device, at, part in zip(devices, places, parts):
        device.upload(at, spec, part)
        device.synchronize()
    reduce_chain(parts[0].nbytes, count, buffers=buffers)()
    return [device.download(at, spec).reshape(-1) for device, at in zip(devices, places)]


def own_loop(nbytes: int, count: int) -> Callable[[], None]:
    """`count` calls of NCCL on both GPUs, one after another, as NCCL's own test makes them."""
    from pyggml.backends.cuda.device.nccl import Group
    from pyggml.backends.cuda.launch import Collective

    devices: list[Any] = [backends.get("cuda", i) for i in range(2)]
    buffers = [device.alloc(nbytes) for device in devices]
    n = nbytes // 4
    calls = [
        partial(
            device.context.communicators[tuple(PLACES)].call,
            Collective("all_reduce", b.ptr, b.ptr, (n, n), "f32", tuple(PLACES), i),
        )
        for i, (device, b) in enumerate(zip(devices, buffers))
    ]

    def run() -> None:
        assert buffers  # keeps them alive
        for _ in range(count):
            with Group():
                for device, call in zip(devices, calls):
                    with device.context:
                        call()

    return run


def microseconds(run: Callable[[], None], count: int) -> list[float]:
    """Samples of the time of one of `count` calls."""
    devices: list[Any] = [backends.get("cuda", i) for i in range(2)]

    def wait() -> None:
        for device in devices:
            device.synchronize()

    for _ in range(5):
        run()
    wait()
    times = []
    for _ in range(20):
        start = perf_counter()
        run()
        wait()
        times.append((perf_counter() - start) * 1e6 / count)
    return times


def other_bits(nbytes: int) -> int:
    """How many elements of the sum of two random parts differ from NumPy's, on both GPUs, after
    three sums in a row by our own kernel, the last two of parts that are sums already."""
    parts = [np.random.default_rng(i).standard_normal(nbytes // 4, np.float32) for i in range(2)]
    sums = reduced(parts, 3)
    expected = 4 * (parts[0] + parts[1])
    return sum(int((each != expected).sum()) for each in sums)
