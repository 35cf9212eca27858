"""A device does not overwrite memory that another device still copies."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

import pyggml as gg

PINS = {rf"^on{i}\.": f"null:{i}" for i in range(3)}
X = np.random.default_rng(0).standard_normal((16, 64)).astype("f4")


def outputs() -> dict[str, gg.Node]:
    """null:2 copies `a` from null:0. null:0 waits only for null:1, and then stores what it copies
    from null:1 in the memory of `a`. Nothing that null:0 reads shows that null:2 has its copy."""
    x = gg.input("x", "f32", ne=(64, 16))
    a = gg.label(gg.sqr(x), "on0.a")
    c = gg.label(gg.scale(x, s=3.0), "on0.c")
    r = gg.label(gg.scale(c, s=0.5), "on1.r")
    z = gg.label(gg.scale(a, s=2.0), "on2.z")
    return {"z": z, "y": gg.label(gg.sqr(r), "on0.y")}


def compiled() -> gg.Plan:
    return gg.compile(outputs(), backends=["null:0", "null:1", "null:2"], pins=PINS)


def test_a_device_waits_for_copies_of_memory_that_it_writes_again() -> None:
    want, got = gg.compile(outputs()).run(x=X), compiled().run(x=X)
    assert all(np.array_equal(got[key], want[key]) for key in want)


def test_without_that_wait_the_copy_is_wrong() -> None:
    """The queue of null:2 runs last: this graph and this order need `spares`."""
    plan = compiled().bind()
    last = plan.splits[-1]
    assert last.backend.place == "null:0" and last.spares
    assert not set(last.spares) & set(last.waits), "a split that is done has made its copies"
    execution = plan._execution
    assert execution is not None
    execution.splits = tuple(replace(split, spares=()) for split in plan.splits)
    want, got = gg.compile(outputs()).run(x=X), plan.run(x=X)
    assert not np.array_equal(got["z"], want["z"])


def test_the_host_waits_for_copies_before_another_device_writes_there() -> None:
    """null:0 copies `a` from the host. The host then reads what both devices send, and that of
    null:1, which arrives first, goes where `a` was."""
    x = gg.input("x", "f32", ne=(64, 16))
    a = gg.label(gg.sqr(x), "host.a")
    r = gg.label(gg.scale(x, s=3.0), "on1.r")
    z = gg.label(gg.scale(a, s=2.0), "on0.z")
    y = gg.label(gg.sub(r, z), "host.y")
    pins = {r"^host\.": "numpy", r"^on0\.": "null:0", r"^on1\.": "null:1"}
    plan = gg.compile({"y": y}, backends=["null:0", "null:1", "numpy"], pins=pins)
    last = plan.splits[-1]
    assert last.backend.place == "numpy" and len(last.copies) == 2 and last.spares
    want = gg.compile({"y": y}).run(x=X)["y"]
    assert np.array_equal(plan.run(x=X)["y"], want)
    execution = plan.bind()._execution
    assert execution is not None
    execution.splits = tuple(replace(split, spares=()) for split in plan.splits)
    assert not np.array_equal(plan.run(x=X)["y"], want), "this graph needs `spares`"
