"""Malformed files: each raises a GGUFError that names the field, in little time and memory."""

from __future__ import annotations

import gzip
import os
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyggml import gguf
from pyggml.errors import GGUFError
from pyggml.gguf.header import parse
from tests.gguf.gguf_bytes import (
    ARCH,
    ARRAY,
    STRING,
    U32,
    array,
    build,
    every_kind,
    kv,
    tensor,
    text,
    u32,
    u64,
)  # fmt: skip
from tests.work import work

F32 = tensor("t", (8,))
DATA = bytes(32)
NESTED = u32(ARRAY) + u64(1)


def single(row: bytes, data: bytes = DATA) -> bytes:
    return build(None, [row], data)


def aligned(value: int) -> bytes:
    return build([kv("general.alignment", U32, u32(value))], [F32], DATA)


# name -> the bytes of the file, and a regular expression for the error message
CATALOGUE: dict[str, tuple[bytes, str]] = {
    # A. the file
    "empty": (b"", "the file is empty"),
    "three bytes": (b"GGU", "magic"),
    "magic alone": (b"GGUF", "version"),
    "old ggml": (build(magic=b"lmgg"), "old GGML"),
    "old ggjt": (build(magic=b"tjgg"), "old GGJT"),
    "gzip": (gzip.compress(build()), "gzip"),
    "zip": (b"PK\3\4" + bytes(60), "zip"),
    "html": (b"<!DOCTYPE html><html></html>" + bytes(60), "HTML"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "version 0": (build(version=0), "byte 4, version: 0"),
    "version 1": (build(version=1), "byte 4, version: 1"),
    "version 4": (build(version=4), "byte 4, version: 4"),
    "big-endian": (build(version=3 << 24), "big-endian"),
    # B. counts, keys, values
    "n_keys 2^63": (build(n_keys=1 << 63), "byte 16, key count"),
    "n_keys -1": (build(n_keys=(1 << 64) - 1), "byte 16, key count"),
    "n_keys one more": (build(n_keys=2), "key 1"),
    "n_tensors 2^63": (build(n_tensors=1 << 63), "byte 8, tensor count"),
    "n_tensors -1": (build(n_tensors=(1 << 64) - 1), "byte 8, tensor count"),
    "too many keys": (build(n_keys=65_537) + bytes(65_537 * 14), "count: 65537, must be at most"),
    "too many tensors": (
        build(n_tensors=262_145) + bytes(262_145 * 24), "tensor count: 262145, must be at most"),
    "n_tensors one more": (build(None, [F32], DATA, n_tensors=2), "tensor 1"),
    "key length 0": (build([kv("", U32, u32(1))]), "byte 24, key 0 length: 0"),
    "key length 2^63": (build([text("k", 1 << 63) + bytes(40)]), "byte 24, key 0 length"),
    "key length 2^64-1": (build([text("k", (1 << 64) - 1) + bytes(40)]), "key 0 length"),
    "key of 65,536 bytes": (build([kv("k" * 65_536, U32, u32(1))]), "key 0 length: 65536"),
    "key past the end": (build([text("k", 60_000) + bytes(40)]), "key 0: 60000 bytes needed"),
    "key not UTF-8": (build([kv(b"k\xff", U32, u32(1))]), "byte 33, key 0: not UTF-8"),
    "key twice": (build([ARCH, ARCH]), "occurs twice"),
    "value type 13": (build([kv("k", 13, bytes(40))]), "key 'k' type: 13"),
    "value type 99": (build([kv("k", 99, bytes(40))]), "key 'k' type: 99"),
    "value type -1": (build([kv("k", (1 << 32) - 1, bytes(40))]), "key 'k' type"),
    "string length 2^62": (build([kv("k", STRING, text("v", 1 << 62))]), "key 'k'"),
    "string length 2^63": (build([kv("k", STRING, text("v", 1 << 63))]), "key 'k'"),
    "string length 2^64-1": (build([kv("k", STRING, text("v", (1 << 64) - 1))]), "key 'k'"),
    "string not UTF-8": (build([kv("k", STRING, text(b"\xc3("))]), "key 'k': not UTF-8"),
    "array length 2^62": (build([array("k", U32, 1 << 62, bytes(40))]), "key 'k' length"),
    "array length 2^64-1": (build([array("k", U32, (1 << 64) - 1, bytes(40))]), "key 'k' length"),
    "strings 2^61": (build([array("k", STRING, 1 << 61, bytes(40))]), "key 'k' length"),
    "strings one more": (
        build([array("k", STRING, 3, text("a" * 20) + text("a" * 11))]), "key 'k', string 2"),
    "string in array 2^63": (
        build([array("k", STRING, 2, text("a", 1 << 63) + bytes(40))]), "key 'k', string 1"),
    "last string 2^63": (
        build([array("k", STRING, 1, text("a", 1 << 63) + bytes(40))]), "key 'k': "),
    "array element type 99": (build([array("k", 99, 1, bytes(40))]), "key 'k' type: 99"),
    "array of arrays": (build([kv("k", ARRAY, NESTED * 64 + bytes(40))]), "array of arrays"),
    "arrays 5,000 deep": (build([kv("k", ARRAY, NESTED * 5_000)]), "array of arrays"),
    "bool 2": (build([kv("k", 7, b"\2")]), "key 'k': a bool must be 0 or 1"),
    "bool 255 in an array": (build([array("k", 7, 3, b"\0\xff\0")]), "a bool must be 0 or 1"),
    "alignment 0": (aligned(0), "general.alignment': 0"),
    "alignment 3": (aligned(3), "general.alignment': 3"),
    "alignment 4": (aligned(4), "general.alignment': 4"),
    "alignment 13": (aligned(13), "general.alignment': 13"),
    "alignment 2^31": (aligned(1 << 31), "general.alignment"),
    "alignment a string": (build([kv("general.alignment", STRING, text("32"))]), "must be a u32"),
    "alignment an i32": (build([kv("general.alignment", 5, u32(32))]), "must be a u32"),
    "alignment an array": (build([array("general.alignment", U32, 1, u32(32))]), "must be a u32"),
    # C. tensors
    "name empty": (single(tensor("", (8,))), "tensor 0 name length: 0"),
    "name of 64 bytes": (single(tensor("n" * 64, (8,))), "tensor 0 name length: 64"),
    "name not UTF-8": (single(tensor(b"\xff", (8,))), "tensor 0 name: not UTF-8"),
    "name twice": (build(None, [F32, tensor("t", (8,), offset=32)], DATA * 2), "occurs twice"),
    "5 dimensions": (single(tensor("t", (8, 1, 1, 1, 1))), "'t' dimensions: 5"),
    "2^31 dimensions": (single(tensor("t", (8,), dims=1 << 31)), "'t' dimensions"),
    "ne 0 next to 2^62": (single(tensor("t", (1 << 62, 0))), "2.63 bytes"),
    "ne -1": (single(tensor("t", ((1 << 64) - 1,))), "2.63 bytes"),
    "ne 2^62": (single(tensor("t", (1 << 62,))), "2.63 bytes"),
    "product wraps to 0": (single(tensor("t", (1 << 32, 1 << 32))), "2.63 bytes"),
    "product wraps to 8": (single(tensor("t", ((1 << 63) + 8, 2, 1))), "2.63 bytes"),
    "exabytes": (single(tensor("t", (1 << 30, 1 << 28))), "pass the end of the file"),
    "type 512": (single(tensor("t", (32,), 512)), "'t' type: 512 does not exist"),
    "type -1": (single(tensor("t", (32,), (1 << 32) - 1)), "does not exist"),
    "no dimensions, blocks": (single(tensor("t", (), 8)), r"'t' ne\[0\]"),
    "row not whole blocks": (single(tensor("t", (33,), 8)), r"'t' ne\[0\]"),
    "offset unaligned": (single(tensor("t", (8,), offset=8), DATA * 2), "'t' offset: 8"),
    "offset 2^64-32": (single(tensor("t", (8,), offset=(1 << 64) - 32)), "'t' size"),
    "offset past the end": (single(tensor("t", (8,), offset=64)), "pass the end of the file"),
    "offsets equal": (build(None, [F32, tensor("u", (8,))], DATA * 2), "overlaps 't'"),
    "offsets overlap": (
        build(None, [tensor("t", (16,)), tensor("u", (8,), offset=32)], DATA * 2), "overlaps 't'"),
    "data one byte short": (single(F32, DATA[:-1]), "pass the end of the file"),
    "no data": (single(F32, b""), "pass the end of the file"),
}  # fmt: skip


@pytest.mark.parametrize("name", CATALOGUE)
def test_malformed_file_is_an_error(tmp_path: Path, name: str) -> None:
    data, message = CATALOGUE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)

    def refused() -> None:
        with pytest.raises(GGUFError, match=message) as caught:
            gguf.open(path)
        assert str(caught.value).startswith(str(path))

    tracemalloc.start()
    try:
        refused()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20
    assert work(refused) < 2_000  # at most 700


def test_truncated_at_every_byte(tmp_path: Path) -> None:
    data = every_kind()
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    gguf.open(path).close()
    for size in reversed(range(len(data))):
        os.truncate(path, size)
        with pytest.raises(GGUFError):
            gguf.open(path)


def test_every_bit_of_the_header_flipped(tmp_path: Path) -> None:
    data = every_kind()
    path = tmp_path / "x.gguf"
    valid = 0
    for at in range(parse(data, len(data), "x").data_start):
        for bit in range(8):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            try:
                with gguf.open(path) as file:
                    read = [file.array(name).sum() for name in file.tensors]
                    valid += len(read) == 3
            except GGUFError:
                pass
    assert valid > 100  # a flipped character or number can leave a valid file


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_after_the_magic(tail: bytes) -> None:
    data = b"GGUF" + u32(3) + tail
    try:
        parse(data, len(data), "x")
    except GGUFError as error:
        assert "byte" in str(error)


def test_a_bad_file_with_a_large_vocabulary_costs_little(tmp_path: Path) -> None:
    tokens = b"".join(text(f"<{i}>") for i in range(102_400))
    data = build([array("tokens", STRING, 102_400, tokens)], [tensor("t", (1,) * 5)])
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(GGUFError, match="dimensions: 5"):
        gguf.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def crafted(items: str, mib: int) -> bytes:
    """A valid header of about `mib` MiB with as many small items of one kind as fit."""
    if items == "strings":
        count = mib << 17
        return build([array("k", STRING, count, bytes(8 * count))])
    if items == "keys":
        return build([kv(f"{i:x}", 0, b"\1") for i in range(65_536)])
    return build([], [tensor(f"{i:x}", (8,), 0, 32 * i) for i in range(mib << 20 >> 5)])


@pytest.mark.parametrize("items", ["strings", "tensors"])
def test_work_is_linear_in_the_size(items: str) -> None:
    small, large = (crafted(items, mib) for mib in (1, 4))
    least, most = (work(lambda x=x: parse(x, 1 << 50, "x")) for x in (small, large))
    assert 3.5 * least < most < 4.5 * least


@pytest.mark.parametrize("items", ["strings", "keys", "tensors"])
def test_memory_is_bounded(items: str) -> None:
    """By a few hundred bytes an item, so the largest header we read takes less than 1 GB."""
    data = crafted(items, 1)
    tracemalloc.start()
    header = parse(data, 1 << 50, "x")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    items = len(header.fields) + len(header.tensors)
    assert peak < 1.1 * len(data) + 1000 * items


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "fifo")
    for name in ("missing", "loop", "fifo", ".", "nul\0byte"):
        with pytest.raises(GGUFError):
            gguf.open(tmp_path / name if "\0" not in name else name)


def test_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf")
    Path(path).write_bytes(every_kind())
    with gguf.open(path) as file:
        assert len(file.tensors) == 3


def test_a_failed_open_leaves_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(build(version=9))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(GGUFError):
            gguf.open(path)
    assert len(os.listdir("/proc/self/fd")) == before
