"""Weights in tiles: read as kernels/include/formats.cuh reads them, they equal the file's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import pyggml as gg
from pyggml import quants
from pyggml.backends.cuda.weights import packing
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.backends.cuda.weights.grids import LEVELS, entries
from pyggml.dtypes import TYPES
from pyggml.quants.common import FP4_LEVELS, IQ4_LEVELS

BIAS = {"q1_0": 1, "q4_0": 8, "q5_0": 16, "q6_K": 32, "q3_K": 4, "tq1_0": 1, "tq2_0": 1}
TABLES = {
    **dict.fromkeys(("iq4_nl", "iq4_xs"), IQ4_LEVELS),
    **dict.fromkeys(("mxfp4", "nvfp4"), FP4_LEVELS),
}


def half(words: NDArray[Any]) -> NDArray[np.float32]:
    return (words & 0xFFFF).astype(np.uint16).view(np.float16).astype(np.float32)


def signed(words: NDArray[Any]) -> NDArray[np.float32]:
    return (words & 255).astype(np.uint8).view(np.int8).astype(np.float32)


class Reader:
    """The index arithmetic of `Row` and the bits of `unpack`, on the host."""

    def __init__(self, name: str, ne: tuple[int, int, int, int], data: NDArray[np.uint8]) -> None:
        self.name, self.form = name, FORMATS[name]
        self.tiles, self.data = packing.tiles_of(TYPES[name], ne), data

    def words(self, plane: int, width: int, index: NDArray[Any]) -> NDArray[Any]:
        """Little-endian numbers of `width` bytes at places of a plane."""
        at = self.tiles.starts[plane] + index[:, None] * width + np.arange(width)
        return (self.data[at].astype(np.int64) << 8 * np.arange(width)).sum(axis=1)

    def row(self, matrix: int, row: int) -> NDArray[np.float32]:
        """The weights of a row, [groups, 32]."""
        groups = np.arange(self.tiles.groups)
        at = matrix * self.tiles.tiles + row // 8
        unit = (at * self.tiles.groups + groups) * 8 + row % 8
        blocks = groups // (TYPES[self.name].block // 32)
        super_ = (at * self.tiles.blocks + blocks) * 8 + row % 8
        if self.name in LEVELS:
            return self.indexed(unit, self.words(3, 2, super_))
        codes = np.stack([self.codes(at, row % 8, unit, i) for i in range(32)], axis=1)
        own = self.words(2, self.form.scale, unit) if self.form.scale else unit
        shared = self.words(3, self.form.super_, super_) if self.form.super_ else own
        return self.scaled(codes.astype(np.float32), own, shared)

    def indexed(self, unit: NDArray[Any], d: NDArray[Any]) -> NDArray[np.float32]:
        """The weights of groups of a type with a grid, as iq.cuh reads them."""
        name, form = self.name, self.form
        low = np.stack([self.words(0, 1, unit * form.codes + i) for i in range(form.codes)], axis=1)
        high = self.words(1, form.high, unit)
        own = self.words(2, form.scale, unit) if form.scale else high
        i = np.arange(form.codes)
        more = {
            "iq1_s": (high[:, None] >> 3 * i & 7) << 8,
            "iq1_m": (high[:, None] >> 4 * i & 7) << 8,
            "iq2_xs": (high[:, None] >> 28 + i & 1) << 8,
            "iq2_s": (own[:, None] >> 2 * i & 3) << 8,
            "iq3_s": (own[:, None] >> i & 1) << 8,
        }.get(name, 0)
        codes = entries("iq1_s" if name == "iq1_m" else name)[low | more].reshape(-1, 4, 8)
        g, k = np.arange(4)[:, None], np.arange(8)
        signs = high[:, None, None] >> 4 * k + g & 1
        if name == "iq1_s":
            signs = (high >> 15)[:, None, None]
        elif name == "iq1_m":
            signs = high[:, None, None] >> 4 * g + 3 & 1
        elif name in ("iq2_xxs", "iq2_xs", "iq3_xxs"):
            signs[..., 7] = signs[..., :7].sum(axis=2) & 1
        levels = np.array(LEVELS[name])[codes | signs << 3].reshape(-1, 32)
        one, two, times = {
            "iq1_s": (own >> 12 & 7, own >> 12 & 7, 1),
            "iq1_m": (own & 7, own >> 3, 1),
            "iq2_xs": (own & 15, own >> 4, 1),
            "iq2_s": (own >> 8 & 15, own >> 12, 1),
            "iq3_s": (own >> 8, own >> 8, 8),
        }.get(name, (own >> 28, own >> 28, 2 if name == "iq3_xxs" else 1))
        scale = half(d) / np.float32(8) * times
        return halves(scale * (2 * one + 1), scale * (2 * two + 1)) * levels.astype(np.float32)

    def codes(self, at: int, row: int, unit: NDArray[Any], i: int) -> NDArray[Any]:
        """The code (or level) of weight i of every group."""
        word, byte = i // 4 % 4, i % 4
        if self.form.codes == 32:
            groups = np.arange(self.tiles.groups)
            run = ((at * self.tiles.groups + groups) * 2 + i // 16) * 8 + row
            return signed(self.words(0, 1, run * 16 + i % 16))
        if self.form.codes == 4:  # bits become 0 and 2
            return (self.words(0, 4, unit) >> (8 * byte + i // 4) & 1) << 1
        if self.form.codes == 8:
            code = self.words(0, 4, unit * 2 + i // 16) >> (8 * byte + 2 * word) & 3
            if self.form.high:
                code |= (self.words(1, 4, unit) >> (8 * byte + i // 4) & 1) << 2
            return code
        q = self.words(0, 4, unit * 4 + word)
        if self.name in TABLES:
            return np.array(TABLES[self.name])[q >> (4 * byte + 16 * (i // 16)) & 15]
        code = q >> (8 * byte + 4 * (i // 16)) & 15
        if self.form.high == 4:
            code |= (self.words(1, 4, unit) >> (8 * byte + i // 4) & 1) << 4
        if self.form.high == 8:
            code |= (self.words(1, 4, unit * 2 + i // 16) >> (8 * byte + 2 * word) & 3) << 4
        return code

    def scaled(self, c: NDArray[Any], own: NDArray[Any], shared: NDArray[Any]) -> NDArray[Any]:
        name, c = self.name, c - BIAS.get(self.name, 0)
        if name in ("q4_1", "q5_1"):
            return half(own)[:, None] * c + half(own >> 16)[:, None]
        if name in ("q4_K", "q5_K"):
            d, m = half(shared) * (own & 255), half(shared >> 16) * (own >> 8)
            return d.astype(np.float32)[:, None] * c - m.astype(np.float32)[:, None]
        if name == "q2_K":
            d, m = half(shared), half(shared >> 16)
            return halves(d * (own & 15), d * (own >> 8 & 15)) * c - halves(
                m * (own >> 4 & 15), m * (own >> 12)
            )
        if name in ("q3_K", "q6_K"):
            return halves(half(shared) * signed(own), half(shared) * signed(own >> 8)) * c
        if name == "nvfp4":
            return halves(*(half((own >> s & 127) << 7) * np.float32(128) for s in (0, 8))) * c
        if name == "iq4_xs":
            return (half(shared) * signed(own))[:, None] * c
        if name == "mxfp4":
            return np.ldexp(np.float32(1), own - 128)[:, None] * c
        return half(own if self.form.scale else shared)[:, None] * c


def halves(first: NDArray[Any], last: NDArray[Any]) -> NDArray[np.float32]:
    """For each group, one number for its first 16 weights and one for its last 16."""
    return np.stack([first, last], axis=1).astype(np.float32).repeat(16, axis=1)


def random_blocks(name: str, ne: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Random bytes with finite scales."""
    t = TYPES[name]
    shape = (ne[1] * ne[2] * ne[3], ne[0] // t.block, t.nbytes)
    raw = np.random.default_rng(3).integers(0, 256, shape, np.uint8)
    if name == "mxfp4":
        raw[..., 0] &= 127  # not past 2^127
    elif name != "nvfp4":
        scales = {"q2_K": (80, 82), "iq1_m": (54,), "q1_0": (0,)}.get(name, (0, 2, t.nbytes - 2))
        for at in scales:
            raw[..., at + 1] &= 0xBF  # not the exponent of infinity
    return raw


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("m", (16, 19))
def test_tiles_have_the_weights_of_the_blocks(name: str, m: int) -> None:
    ne = (3 * max(TYPES[name].block, 64), m, 2, 1)
    raw = random_blocks(name, ne)
    data = packing.to_tiles(TYPES[name], ne, raw)
    reader = Reader(name, ne, data)
    expected = quants.decode(name, raw).reshape(2, m, -1, 32)
    for matrix in range(2):
        for row in range(m):
            np.testing.assert_array_equal(reader.row(matrix, row), expected[matrix, row])
    assert len(data) == reader.tiles.nbytes


@pytest.mark.parametrize("name", FORMATS)
def test_pieces_give_the_same_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ne = (256, 43, 2, 1)
    raw = random_blocks(name, ne)
    whole = packing.to_tiles(TYPES[name], ne, raw)
    monkeypatch.setattr(packing, "PIECE", 256 * 16)
    np.testing.assert_array_equal(packing.to_tiles(TYPES[name], ne, raw), whole)


@pytest.mark.parametrize("name", FORMATS)
def test_tiles_take_hardly_more_than_the_file(name: str) -> None:
    ne = (4096, 14336, 1, 1)
    rows = TYPES[name].row_bytes(ne[0]) * ne[1]
    most = rows * (1.04 if name != "tq1_0" else 1.23)
    assert rows <= packing.tiles_of(TYPES[name], ne).nbytes <= most


def test_most_types_with_grids_take_the_bits_of_the_file() -> None:
    """iq1_m and iq3_s have a byte of scale for half a byte in the file."""
    ne = (4096, 4096, 3, 1)
    more = {
        name: packing.tiles_of(TYPES[name], ne).nbytes / (TYPES[name].row_bytes(4096) * 4096 * 3)
        for name in LEVELS
    }
    expected = dict.fromkeys(LEVELS, 1.0) | {"iq1_m": 7.25 / 7, "iq3_s": 14.25 / 13.75}
    assert more == pytest.approx(expected, rel=1e-6)


def weight(name: str, *ne: int) -> gg.Node:
    t = TYPES[name]
    shape = (*ne[:0:-1], t.row_bytes(ne[0]))
    return gg.constant(np.zeros(shape, np.uint8), dtype=name, name=f"{name}_{ne}")


def test_layout_follows_the_uses() -> None:
    x, ids = gg.input("x", ne=(256, 3)), gg.input("ids", "i32", ne=(3,))
    w = weight("q8_0", 256, 24)
    product, rows = gg.mul_mat(w, x), gg.get_rows(w, ids)
    assert packing.layout_of(w, [product]).name == "tiles8"
    assert packing.layout_of(w, [product, rows]).name == "plain"
    assert packing.layout_of(w, [gg.reshape(w, ne=(256, 6, 4))]).name == "plain"


def test_casts_and_reshapes_of_whole_tiles_read_tiles() -> None:
    """A prompt casts attn_k_b and multiplies the rows of attn_v_b as one matrix."""
    x = gg.input("x", ne=(256, 3))
    w = weight("q8_0", 256, 16, 4)
    assert packing.layout_of(w, [gg.cast(w, dtype="f16")]).name == "tiles8"
    assert packing.layout_of(w, [gg.cast(w, dtype="q4_0")]).name == "plain"
    flat = gg.reshape(w, ne=(256, 64))
    assert packing.layout_of(w, [flat, gg.mul_mat(flat, x)]).name == "tiles8"
    assert packing.layout_of(w, [flat]).name == "plain"  # an output, as in a file
    for ne in ((256, 4, 16), (512, 32), (128, 128)):  # other rows in a tile
        other = gg.reshape(w, ne=ne)
        y = gg.mul_mat(other, gg.input("y", ne=(ne[0], 3, *ne[2:])))
        assert packing.layout_of(w, [other, y]).name == "plain"
    part = gg.view(w, ne=(256, 8, 4))
    y = gg.mul_mat(part, gg.input("y", ne=(256, 3, 4)))
    assert packing.layout_of(w, [part, y]).name == "plain"


@pytest.mark.parametrize("name", FORMATS)
def test_reshapes_of_whole_tiles_are_the_same_bytes(name: str) -> None:
    k = max(TYPES[name].block, 64)
    raw = random_blocks(name, (k, 16, 3, 1))
    three, one = (packing.to_tiles(TYPES[name], ne, raw) for ne in ((k, 16, 3, 1), (k, 48, 1, 1)))
    np.testing.assert_array_equal(three, one)
    assert packing.tiles_of(TYPES[name], (k, 16, 3, 1)).starts == (
        packing.tiles_of(TYPES[name], (k, 48, 1, 1)).starts
    )


def test_an_output_keeps_its_weight_plain() -> None:
    """Outputs are read as they are in a file, also if they show a weight through a view."""
    x = gg.input("x", ne=(256, 3))
    w = weight("q8_0", 256, 16, 4)
    flat = gg.reshape(w, ne=(256, 64))
    shared, shown = (
        gg.compile(outputs, backends=["cuda"])._work.layouts[w].name
        for outputs in (
            {"y": gg.mul_mat(flat, x), "z": gg.relu(gg.cast(w, dtype="f32"))},
            {"y": gg.mul_mat(flat, x), "z": flat},
        )
    )
    assert (shared, shown) == ("tiles8", "plain")


def test_copies_of_a_weight_are_in_tiles_too() -> None:
    """One that a GPU borrows from the host, and one that two GPUs keep."""
    w, x = weight("q8_0", 256, 24), gg.input("x", ne=(256, 64))
    lent = gg.compile({"y": gg.mul_mat(w, x)}, backends=["cuda", "numpy"], pins={"q8_0": "numpy"})
    assert [layout.name for layout in lent._work.layouts.values()] == ["plain", "tiles8"]
    both = {
        d: gg.label(gg.mul_mat(w, gg.scale(x, s=i + 1.0)), f"on_{d}") for i, d in enumerate("ab")
    }
    pins = {"on_a": "cuda:0", "on_b": "cuda:1"}
    kept = gg.compile(both, backends=["cuda:0"], pins=pins)
    assert [layout.name for layout in kept._work.layouts.values()] == ["tiles8", "tiles8"]
