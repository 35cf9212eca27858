"""Legal graphs that are probably mistakes: which ones warn or raise, and which pass."""

from __future__ import annotations

import gc
import re
import warnings
from collections.abc import Callable
from inspect import currentframe
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from tests.cuda.conftest import Machine, machine  # noqa: F401

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


def line() -> int:
    """The caller's line."""
    frame = currentframe()
    assert frame is not None and frame.f_back is not None
    return frame.f_back.f_lineno


def leaves() -> tuple[gg.Node, gg.Node, gg.Node]:
    return (
        gg.state("cache", ne=(4, 8)),
        gg.input("rows", ne=(4, 2)),
        gg.input("at", "i32", ne=(2,)),
    )


def silent(build: Callable[[], Any]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", gg.StateWarning)
        return build()


# -- the graph ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
def test_a_write_whose_handle_is_dropped(keep: bool) -> None:
    cache, rows, at = leaves()
    written, write = gg.set_rows(cache, rows, at), line()
    if not keep:
        del written
    y, read = gg.mul_mat(gg.view(cache, ne=(4, 4)), rows), line()
    with pytest.warns(gg.StateWarning) as caught:
        gg.compile({"y": y} if not keep else {"y": gg.add_id(y, y, at)})
    (text,) = [str(w.message) for w in caught]
    here = r"test_misuse\.py:"
    message = (
        f"mul_mat at .*{here}{read} reads the state 'cache'.*set_rows at .*{here}{write}.*never"
    )
    assert re.search(message, text)
    assert caught[0].filename == __file__


def test_a_copy_that_is_dropped_after_another_write() -> None:
    cache, rows, at = leaves()
    first = gg.set_rows(cache, rows, at)
    gg.cpy(rows, gg.view(first, ne=(4, 2)))
    with pytest.warns(gg.StateWarning, match="cpy at .* never runs"):
        gg.compile({"y": gg.relu(first)})


def test_an_old_handle_read_beside_updates() -> None:
    cache, rows, at = leaves()
    new, write = gg.set_rows(cache, gg.scale(rows, s=2.0), at), line()
    y, read = gg.mul_mat(gg.view(cache, ne=(4, 4)), rows), line()
    with pytest.warns(gg.StateWarning) as caught:
        gg.compile({"y": y}, updates=[new])
    text = str(caught[0].message)
    assert len(caught) == 1 and "misses the rows of this run" in text
    assert f"mul_mat at {__file__}:{read} reads" in text
    assert f"set_rows at {__file__}:{write} writes" in text


def test_graphs_that_are_meant() -> None:
    cache, rows, at = leaves()
    new = gg.set_rows(cache, rows, at)
    twice = gg.scale(rows, s=2.0)
    later = gg.set_rows(cache, twice, at)
    old, counter = gg.relu(cache), gg.state("n", ne=(4,))
    one_more = gg.cpy(gg.scale(counter, s=1.0, b=1.0), counter)
    for outputs, updates in (
        ({"y": gg.relu(new)}, []),  # the new handle is read
        ({"x": gg.relu(rows)}, [new]),  # a write for the next run
        ({"y": old, "x": gg.relu(twice)}, [later]),  # the rows are used next to the old ones
        ({"y": old}, [gg.set_rows(cache, gg.view(old, ne=(4, 2)), at)]),  # read, then written
        ({"n": gg.relu(counter)}, [one_more]),  # the count before the write
    ):
        silent(lambda o=outputs, u=updates: gg.compile(o, updates=u))
    # Plans that share a leaf: each has a part of the graph, and some are gone.
    gc.collect()
    silent(lambda: gg.compile({"y": old}))


# -- numbers --------------------------------------------------------------------------------------


def masked(n_kv: int, computed: bool = False) -> dict[str, gg.Node]:
    pos = gg.input("pos", "i32", ne=(2,))
    if computed:
        pos = gg.cast(gg.cast(pos, dtype="f32"), dtype="i32")
    return {"mask": gg.cast(gg.causal_mask(pos, n_kv=n_kv), dtype="f32")}


@pytest.mark.parametrize("place", ["numpy", "null:0"])
@pytest.mark.parametrize("computed", [False, True])
def test_a_position_past_the_keys(place: str, computed: bool) -> None:
    plan = gg.compile(masked(4, computed), backends=[place])
    with pytest.raises(gg.IdError, match=r"(?s) 4.*n_kv=4"):
        plan.run(pos=[0, 4])
    mask = plan.run(pos=[3, -1])["mask"]
    np.testing.assert_array_equal(mask, [[0] * 4, [-np.inf] * 4])


def test_a_position_past_the_keys_on_a_gpu(machine: Machine, monkeypatch: Any) -> None:  # noqa: F811
    machine("gpu")
    plan = gg.compile(masked(4), backends=["cuda"])
    with pytest.raises(gg.IdError, match="n_kv=4"):  # before anything is put into its queue
        plan.run(pos=[0, 4])
    s = gg.state("pos", "i32", ne=(2,))
    there = gg.compile({"m": gg.causal_mask(s, n_kv=4)}, backends=["cuda"]).bind()
    there.store.write("pos", [0, 4])
    there.run()
    monkeypatch.setenv("PYGGML_CUDA_DEBUG", "1")
    checked = gg.compile({"m": gg.causal_mask(s, n_kv=4)}, backends=["cuda"], store=there.store)
    with pytest.raises(gg.IdError, match="position 4 is past the keys: there are 4"):
        checked.run()
    assert backends.get("cuda").place == "cuda:0"


def test_rows_written_past_what_is_read() -> None:
    cache, rows, at = leaves()
    new, write = gg.set_rows(cache, rows, at), line()
    seen, read = gg.view(new, ne=(4, 4)), line()
    plan = gg.compile({"y": gg.relu(seen)})
    with pytest.warns(gg.StateWarning, match="'at' contains 4.*only the first 4 rows") as caught:
        plan.run(rows=ROWS, at=[3, 4])
    assert f":{write} writes" in str(caught[0].message) and f":{read} reads" in str(
        caught[0].message
    )
    assert caught[0].filename == __file__
    got = silent(lambda: plan.run(rows=ROWS, at=[3, -1]))["y"]
    np.testing.assert_array_equal(got[3], ROWS[0])


def test_rows_that_something_may_read() -> None:
    cache, rows, at = leaves()
    new = gg.set_rows(cache, rows, at)
    for outputs in (
        {"y": gg.relu(gg.view(new, ne=(4, 4))), "all": gg.relu(new)},
        {"y": gg.relu(gg.view(new, ne=(4, 4))), "all": new},
        {"y": gg.relu(gg.view(new, ne=(4, 4), start=(0, 4)))},
        {"y": gg.relu(gg.transpose(new))},
    ):
        silent(lambda o=outputs: gg.compile(o).run(rows=ROWS, at=[6, 7]))
    silent(lambda: gg.compile({"x": gg.relu(rows)}, updates=[new]).run(rows=ROWS, at=[6, 7]))
