"""Views against NumPy: view, permute, reshape and state_of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyggml as gg
from pyggml.errors import ShapeError

SIZES = st.tuples(*[st.integers(1, 5)] * 4)


def leaf(ne: tuple[int, ...]) -> gg.Node:
    return gg.input("x", "f32", ne=ne)


def run_view(node: gg.Node, array: np.ndarray) -> np.ndarray:
    return gg.compile({"y": gg.cont(node), "view": node}).run(x=array)["y"]


def numbered(ne: tuple[int, ...]) -> np.ndarray:
    return np.arange(np.prod(ne), dtype=np.float32).reshape(ne[::-1])


@settings(max_examples=80)
@given(SIZES, st.data())
def test_views_are_slices(ne: tuple[int, ...], data: Any) -> None:
    start = [data.draw(st.integers(0, n - 1)) for n in ne]
    step = [data.draw(st.integers(1, 3)) for _ in ne]
    size = [data.draw(st.integers(1, 1 + (n - 1 - a) // b)) for n, a, b in zip(ne, start, step)]
    index = tuple(slice(a, a + n * b, b) for a, n, b in zip(start, size, step))[::-1]
    node = gg.view(leaf(ne), ne=size, start=start, step=step)
    expected = numbered(ne)[index][tuple(slice(n) for n in size[::-1])]
    np.testing.assert_array_equal(run_view(node, numbered(ne)), expected)


@settings(max_examples=60)
@given(SIZES, st.permutations(range(4)), st.permutations(range(4)), st.data())
def test_permutes_and_reshapes(ne: Any, first: Any, second: Any, data: Any) -> None:
    node, array = leaf(ne), numbered(ne)
    for axes in (first, second):
        node = gg.permute(node, axes=axes)
        array = array.transpose([3 - list(axes).index(d) for d in (3, 2, 1, 0)])
        assert node.shape == array.shape
        assert node.contiguous == array.flags.c_contiguous
    count = array.size
    sizes = []
    for _ in range(3):
        divisors = [d for d in range(1, count + 1) if count % d == 0]
        sizes.append(data.draw(st.sampled_from(divisors)))
        count //= sizes[-1]
    sizes.append(count)
    # pyggml reshapes without a copy exactly where NumPy can.
    try:
        reshaped = array.view()
        reshaped.shape = tuple(sizes[::-1])
    except AttributeError:
        with pytest.raises(ShapeError, match="use cont"):
            gg.reshape(node, ne=sizes)
        node, reshaped = gg.cont(node), array.reshape(sizes[::-1])
    np.testing.assert_array_equal(run_view(gg.reshape(node, ne=sizes), numbered(ne)), reshaped)


@settings(max_examples=80)
@given(SIZES, st.data())
def test_views_by_ggml_strides(ne: tuple[int, ...], data: Any) -> None:
    """Strides and offset in bytes, as ggml_view_2d and ggml_view_3d take them."""
    flat = numbered(ne).reshape(-1)
    cuts = [n for n in np.cumprod(ne) if n < flat.size]
    nb = sorted(data.draw(st.lists(st.sampled_from([1, *cuts]), max_size=2, unique=True)))
    size = [data.draw(st.integers(1, b // a)) for a, b in zip([1, *nb], [*nb, flat.size])]
    room = flat.size - 1 - sum((n - 1) * b for n, b in zip(size, [1, *nb]))
    offset = data.draw(st.integers(0, room))
    node = leaf(ne)
    try:
        view = gg.view(node, ne=size, nb=[4 * b for b in nb], offset=4 * offset)
    except ShapeError:
        # The only reason for this error: it is no slice, because a row crosses the end of a
        # larger one.
        edges = [*nb, flat.size]
        ends = [offset % b + (n - 1) * a >= b for n, a, b in zip(size, [1, *nb], edges)]
        assert any(ends) or any(b % a for a, b in zip([1, *nb], edges))
        return
    index = np.full((), offset)
    for n, b in zip(size[::-1], [1, *nb][::-1]):
        index = index[..., None] + b * np.arange(n)
    np.testing.assert_array_equal(run_view(view, numbered(ne)), flat[index])


def test_views_of_block_types() -> None:
    q = gg.input("q", "q8_0", ne=(128, 4))
    view = gg.view(q, ne=(64, 2), start=(32, 1))
    assert view is gg.view(q, ne=(64, 2), nb=(136,), offset=34 + 136)
    for attrs in ({"start": (16,)}, {"step": (2,)}):
        with pytest.raises(ShapeError, match="must start at a multiple of 32"):
            gg.view(q, ne=(32, 2), **attrs)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="past the start of an element or block"):
        gg.view(q, ne=(32, 2), nb=(136,), offset=17)
    with pytest.raises(ShapeError, match="must stay in place"):
        gg.permute(q, axes=(1, 0))


def test_state_of_a_write_is_the_whole_state_after_it() -> None:
    cache = gg.state("cache", "f32", ne=(4, 3, 2))
    part = gg.view(gg.permute(cache, axes=(0, 2, 1)), ne=(2, 2, 1), start=(1, 0, 2))
    state = gg.state_of(gg.cpy(leaf((2, 2, 1)), part))
    assert (state.ne, state.nb) == (cache.ne, cache.nb)
    expected = np.zeros((2, 3, 4), np.float32)
    expected[:, 2, 1:3] = numbered((2, 2))
    result = gg.compile({"y": state}).run(x=numbered((2, 2, 1)))["y"]
    np.testing.assert_array_equal(result, expected)
