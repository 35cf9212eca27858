"""Codecs: bit equality with the gguf package, hand-written blocks, strides, memory, errors."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from pyggml import quants
from pyggml.dtypes import TYPES, dtype
from pyggml.errors import DTypeError, ShapeError
from pyggml.quants.common import pieces
from tests.fixtures.make_iq4_nl import PATH

PLAIN = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}
BLOCKS = sorted(quants.DECODABLE - set(PLAIN))
BY_GGUF = sorted(quants.ENCODABLE - {"f32", "iq4_nl"})
SCALES = [1.0, 0.02, 1e4, 1e30, 1e-5, 1e-30, 1e-41]


def random_bytes(name: str, *shape: int, seed: int = 0) -> NDArray[Any]:
    """Random bits everywhere, scales included, so some are negative, subnormal, inf or NaN."""
    rng = np.random.default_rng(seed)
    if name in PLAIN:
        size = TYPES[name].nbytes
        raw = rng.integers(0, 256, (*shape[:-1], shape[-1] * size), np.uint8)
        return raw.view(PLAIN[name])
    return rng.integers(0, 256, (*shape, TYPES[name].nbytes), np.uint8)


def gguf_decode(name: str, raw: NDArray[Any]) -> NDArray[np.float32]:
    qtype = gguf.GGMLQuantizationType(TYPES[name].ggml_id)
    rows = raw.view(np.uint8).reshape(len(raw), -1)
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(rows, qtype)


def gguf_encode(name: str, x: NDArray[np.float32]) -> NDArray[Any]:
    qtype = gguf.GGMLQuantizationType(TYPES[name].ggml_id)
    with np.errstate(all="ignore"):
        rows = gguf.quants.quantize(x, qtype).view(PLAIN.get(name, np.uint8))
    return rows if name in PLAIN else rows.reshape(len(x), -1, TYPES[name].nbytes)


def gguf_encodes(name: str) -> bool:
    try:
        return gguf_encode(name, np.zeros((1, 256), np.float32)).size > 0
    except NotImplementedError:
        return False


def assert_same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    """Equal bit for bit, including -0; any NaN equals any NaN."""
    assert a.shape == b.shape and a.dtype == b.dtype
    nan = np.isnan(b)
    np.testing.assert_array_equal(np.isnan(a), nan)
    np.testing.assert_array_equal(a.view(np.uint32)[~nan], b.view(np.uint32)[~nan])


#: The types that the gguf package decodes; some versions know only the size of q1_0.
GGUF_DECODES = sorted(
    name for name in quants.DECODABLE
    if TYPES[name].ggml_id in gguf.quants._type_traits or name in ("f32", "f16")
)  # fmt: skip


def test_gguf_decodes_all_but_one() -> None:
    assert quants.DECODABLE - set(GGUF_DECODES) <= {"q1_0"}


@pytest.mark.parametrize("name", GGUF_DECODES)
def test_decode_random_bytes_like_gguf(name: str) -> None:
    raw = random_bytes(name, 3, 700)
    expected = gguf_decode(name, raw)
    assert np.isfinite(expected).mean() > 0.5
    assert_same_bits(quants.decode(name, raw), expected)


@pytest.mark.parametrize("name", [n for n in GGUF_DECODES if n != "f32" and gguf_encodes(n)])
@pytest.mark.parametrize("scale", SCALES)
def test_decode_random_data_like_gguf(name: str, scale: float) -> None:
    x = (np.random.default_rng(1).standard_normal((4, 2048)) * scale).astype(np.float32)
    raw = gguf_encode(name, x)
    assert_same_bits(quants.decode(name, raw), gguf_decode(name, raw))


@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_decode_every_16_bit_pattern(name: str) -> None:
    raw = np.arange(65536, dtype=np.uint16).view(PLAIN[name])[None]
    assert_same_bits(quants.decode(name, raw), gguf_decode(name, raw))


@pytest.mark.parametrize("special", [np.inf, -np.inf, np.nan])
def test_decode_f16_with_one_special(special: float) -> None:
    raw = np.array([1.5, special, 6e-8, -65504], np.float16)
    assert_same_bits(quants.decode("f16", raw), raw.astype(np.float32))


@pytest.mark.parametrize("name", BY_GGUF)
@pytest.mark.parametrize("scale", SCALES)
def test_encode_like_gguf(name: str, scale: float) -> None:
    x = (np.random.default_rng(2).standard_normal((4, 2048)) * scale).astype(np.float32)
    x[0, :64] = 0
    x[1, :32] = x[1, 0]
    x[2, 1:32:2] = -x[2, 0:32:2]  # equal magnitudes: the first decides the sign of the scale
    x[3, :32] = np.arange(32) * scale / 2  # ties
    np.testing.assert_array_equal(quants.encode(name, x), gguf_encode(name, x))


@pytest.mark.parametrize("name", BY_GGUF)
def test_encode_random_bits_like_gguf(name: str) -> None:
    """f32 of any bit pattern, so NaN, inf and subnormals are among ordinary numbers."""
    x = random_bytes("f32", 64, 2048, seed=3)
    np.testing.assert_array_equal(quants.encode(name, x), gguf_encode(name, x))


def test_encode_iq4_nl_like_ggml() -> None:
    stored = np.load(PATH)
    x, theirs = stored["x"], stored["raw"]
    ours = quants.encode("iq4_nl", x)
    assert (ours == theirs).all(axis=-1).mean() >= 0.999
    for row, a, b in zip(x, theirs, ours, strict=True):
        error_a, error_b = (np.linalg.norm(quants.decode("iq4_nl", raw) - row) for raw in (a, b))
        assert error_b <= 1.001 * error_a


@pytest.mark.parametrize("name", sorted(quants.ENCODABLE - set(PLAIN)))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_encode_of_values_that_are_not_finite(name: str, bad: float) -> None:
    """That block, and no other, decodes to values that are not finite."""
    x = np.random.default_rng(4).standard_normal((1, 96)).astype(np.float32)
    clean = quants.encode(name, x)
    x[0, 40] = bad
    raw = quants.encode(name, x)
    assert not np.isfinite(quants.decode(name, raw)[0, 32:64]).any()
    np.testing.assert_array_equal(raw[:, [0, 2]], clean[:, [0, 2]])


def f16_bytes(*values: float) -> list[int]:
    return list(np.array(values, "<f2").tobytes())


def test_decode_a_known_q8_0_block() -> None:
    raw = np.array([[f16_bytes(0.5) + list(range(16)) + list(range(240, 256))]], np.uint8)
    expected = [*np.arange(16) / 2, *np.arange(-16, 0) / 2]
    np.testing.assert_array_equal(quants.decode("q8_0", raw), [expected])


def test_decode_a_known_iq4_nl_block() -> None:
    raw = np.array([[f16_bytes(2.0) + [0xF0] * 15 + [0x87]]], np.uint8)
    expected = [-254] * 15 + [-20] + [226] * 15 + [2]
    np.testing.assert_array_equal(quants.decode("iq4_nl", raw), [expected])


def test_decode_a_known_q1_0_block() -> None:
    raw = np.array([[f16_bytes(-1.5) + [0b0000_0101] + [0] * 14 + [0x80]]], np.uint8)
    expected = np.full(128, 1.5)
    expected[[0, 2, 127]] = -1.5
    np.testing.assert_array_equal(quants.decode("q1_0", raw), [[*expected]])


@pytest.mark.parametrize("byte", range(256))
def test_decode_every_scale_of_nvfp4_like_gguf(byte: int) -> None:
    raw = random_bytes("nvfp4", 2, 3)
    raw[..., :4] = byte
    assert_same_bits(quants.decode("nvfp4", raw), gguf_decode("nvfp4", raw))


def test_decode_a_known_q4_k_block() -> None:
    """Group 0: sc 1, m 2. Group 4: sc 16 + 3, m 32 + 5, each assembled from two bytes."""
    scales = [0b01_000001, 0, 0, 0, 0b10_000010, 0, 0, 0, 0x53, 0, 0, 0]
    raw = np.array([[f16_bytes(2.0, 0.5) + scales + [0x21] * 128]], np.uint8)
    expected = np.zeros((8, 32))
    expected[0] = 2 * 1 * 1 - 0.5 * 2
    expected[4] = 2 * 19 * 1 - 0.5 * 37
    np.testing.assert_array_equal(quants.decode("q4_K", raw), expected.reshape(1, 256))


def test_encode_known_blocks() -> None:
    x = np.zeros((1, 32), np.float32)
    x[0, :3] = -8, 7, 4
    q4_0 = quants.encode("q4_0", x)[0, 0].tolist()
    assert q4_0 == f16_bytes(1.0) + [0x80, 0x8F, 0x8C] + [0x88] * 13
    x[0, :3] = 127, -1.5, 0.5
    q8_0 = quants.encode("q8_0", x)[0, 0].tolist()
    assert q8_0 == f16_bytes(1.0) + [127, 254, 1] + [0] * 29


@pytest.mark.parametrize(
    ("name", "bound"),
    [("f32", 0), ("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 6e-3), ("q5_0", 0.05), ("q5_1", 0.05),
     ("q4_0", 0.1), ("q4_1", 0.1), ("iq4_nl", 0.08)],
)  # fmt: skip
def test_round_trip(name: str, bound: float) -> None:
    x = np.random.default_rng(5).standard_normal((2, 3, 4096)).astype(np.float32)
    y = quants.decode(name, quants.encode(name, x))
    assert np.linalg.norm(y - x) <= bound * np.linalg.norm(x)


@pytest.mark.parametrize("name", sorted(quants.ENCODABLE))
def test_zeros_stay_zero(name: str) -> None:
    x = np.zeros((2, 64), np.float32)
    np.testing.assert_array_equal(quants.decode(name, quants.encode(name, x)), x)


@pytest.mark.parametrize("name", sorted(quants.DECODABLE))
@pytest.mark.parametrize("limit", [256, 1024, 65536])
def test_strides_and_pieces_do_not_matter(
    name: str, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is a permuted view into wider rows, `out` every second row of a larger array."""
    monkeypatch.setattr(quants, "DECODE_PIECE", limit)
    t = TYPES[name]
    raw = random_bytes(name, 3, 2, 5, 4 if t.kind == "block" else 4 * 256)
    view = raw.swapaxes(0, 2)[:, ::-1, 1:, : raw.shape[3] // 2]
    expected = quants.decode(name, np.ascontiguousarray(view))
    out = np.zeros((5, 2, 4, expected.shape[-1] + 1), np.float32)
    target = out[:, :, ::2, 1:]
    assert quants.decode(name, view, target) is target
    assert_same_bits(np.ascontiguousarray(target), expected)
    assert not out[..., 0].any() and not out[:, :, 1::2].any()


@pytest.mark.parametrize("name", sorted(quants.ENCODABLE))
def test_encode_strided(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(6).standard_normal((3, 4, 2 * 96)).astype(np.float32)
    view = x.swapaxes(0, 1)[::-1, :, ::2]
    before, expected = x.copy(), quants.encode(name, np.ascontiguousarray(view))
    monkeypatch.setattr(quants, "ENCODE_PIECE", 64)
    wide = np.zeros((expected.shape[0], 2, *expected.shape[1:]), expected.dtype)
    assert quants.encode(name, view, wide[:, 1]).base is wide
    np.testing.assert_array_equal(wide[:, 1], expected)
    assert not wide[:, 0].any()
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("name", sorted(quants.DECODABLE))
def test_empty(name: str) -> None:
    block = TYPES[name].block
    assert quants.decode(name, random_bytes(name, 0, 2)).shape == (0, 2 * block)
    assert quants.decode(name, random_bytes(name, 2, 0)).shape == (2, 0)
    if name in quants.ENCODABLE:
        assert quants.encode(name, np.empty((0, 64), np.float32)).shape[0] == 0
        assert quants.encode(name, np.empty((3, 0), np.float32)).size == 0


@given(
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
    st.integers(1, 40),
)
def test_pieces_cover_once(shape: tuple[int, ...], limit: int) -> None:
    counts = np.zeros(shape, int)
    for index in pieces(shape, limit):
        assert 0 < counts[index].size <= limit
        counts[index] += 1
    assert (counts == 1).all()


def peak_of(function: Any, *args: Any, **keywords: Any) -> int:
    function(*args, **keywords)  # the first call makes the tables
    tracemalloc.start()
    try:
        function(*args, **keywords)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", sorted(quants.DECODABLE))
@pytest.mark.parametrize("strided", [False, True])
def test_decode_makes_no_large_temporary(name: str, strided: bool) -> None:
    t = TYPES[name]
    blocks = quants.DECODE_PIECE // t.block
    raw = random_bytes(name, 2, 4, blocks)
    out = np.empty((2, 4, blocks * t.block), np.float32)
    if strided:
        raw, out = raw.swapaxes(0, 1), np.empty((4, 3, blocks * t.block), np.float32)[:, :2]
    work = np.empty(quants.WORK_BYTES, np.uint8)
    assert peak_of(quants.decode, name, raw, out, work=work) < 64 * 1024


@pytest.mark.parametrize("name", sorted(quants.ENCODABLE))
@pytest.mark.parametrize("strided", [False, True])
def test_encode_makes_no_large_temporary(name: str, strided: bool) -> None:
    x = np.random.default_rng(7).standard_normal((2, 4, quants.ENCODE_PIECE)).astype(np.float32)
    x = x.swapaxes(0, 1) if strided else x
    out = quants.encode(name, x)
    work = np.empty(quants.WORK_BYTES + 1, np.uint8)[1:]
    out = np.stack([out, out], axis=1)[:, 0] if strided else out
    assert peak_of(quants.encode, name, x, out, work=work) < 64 * 1024


def test_import_leaves_gguf_alone() -> None:
    code = "import sys, pyggml.quants; sys.exit('gguf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


ROW = np.zeros((2, 64), np.float32)
FROZEN = np.broadcast_to(ROW, ROW.shape)
RAW = np.zeros((2, 2, 34), np.uint8)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: quants.decode("q9_9", RAW), DTypeError, "unknown type"),
        (lambda: quants.decode("q8_K", RAW), DTypeError, "cannot decode q8_K.*iq4_nl.*q8_0"),
        (lambda: quants.encode("q4_K", ROW), DTypeError, "cannot encode q4_K.*iq4_nl.*q8_0"),
        (lambda: quants.decode("q8_0", RAW.view(np.int8)), DTypeError, "uint8, not int8"),
        (lambda: quants.decode("bf16", ROW), DTypeError, "uint16, not float32"),
        (lambda: quants.decode("q8_0", [1]), DTypeError, "not list"),
        (lambda: quants.decode("q4_0", RAW), ShapeError, r"\[..., blocks, 18\], not \[2, 2, 34\]"),
        (lambda: quants.decode("q8_0", RAW[0, 0]), ShapeError, "reshape rows of bytes"),
        (lambda: quants.encode("q8_0", ROW.astype(float)), DTypeError, "float32, not float64"),
        (lambda: quants.encode("q8_0", ROW[:, :48]), ShapeError, "multiple of 32"),
        (lambda: quants.encode("f16", np.zeros((), np.float32)), ShapeError, "no axis"),
        (lambda: quants.decode("f16", np.zeros((), np.float16)), ShapeError, "no axis"),
        (lambda: quants.decode("q8_0", RAW, ROW[:, :32]), ShapeError, r"\[2, 64\].*\[2, 32\]"),
        (lambda: quants.decode("q8_0", RAW, ROW.astype(float)), DTypeError, "out must be"),
        (lambda: quants.decode("q8_0", RAW, FROZEN), ShapeError, "read-only"),
        (lambda: quants.encode("q8_0", ROW, RAW[:1]), ShapeError, "of shape"),
        (lambda: quants.decode("q8_0", RAW, work=RAW), ShapeError, "work must be contiguous"),
        (lambda: quants.decode("q8_0", RAW, work=[]), DTypeError, "work must be"),
    ],
)  # fmt: skip
def test_errors(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_type_objects_and_any_letter_case() -> None:
    np.testing.assert_array_equal(quants.decode(dtype("q8_0"), RAW), quants.decode("Q8_0", RAW))


def test_error_if_gguf_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf.quants, "_type_traits", {})
    with pytest.raises(DTypeError, match="installed gguf package cannot decode iq2_s"):
        quants.decode("iq2_s", random_bytes("iq2_s", 1, 1))


def test_gguf_is_not_imported_until_it_is_needed(tmp_path: Path) -> None:
    """Importing it takes as long as everything else, and most files have no type that needs it."""
    code = f"""
import sys
import numpy as np
import pyggml as gg
from pyggml import gguf, quants
from pyggml.models.model import Model
from pyggml.models.presets import TINY
from pyggml.models.synth import synth
import pyggml.backends.cuda.table
path = {str(tmp_path)!r} + "/t.gguf"
synth(path, TINY, dtype="q4_K")
with gguf.open(path) as file:
    Model(file, backends=["numpy"]).session(8).forward([1, 2])
for name in quants.DECODABLE - set(quants.decoders.BY_GGUF):
    t = gg.dtypes.TYPES[name]
    if t.kind == "block":
        quants.decode(name, np.zeros((1, 1, t.nbytes), np.uint8))
assert "gguf" not in sys.modules
quants.decode("iq2_s", np.zeros((1, 1, 82), np.uint8))
assert "gguf" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
