"""GGUF files built byte by byte, so that a test can falsify any number in them."""

from __future__ import annotations

import struct
from typing import Any

STRING, ARRAY, U32 = 8, 9, 4


def u32(number: int) -> bytes:
    return struct.pack("<I", number)


def u64(number: int) -> bytes:
    return struct.pack("<Q", number)


def text(value: str | bytes, length: int | None = None) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw) if length is None else length) + raw


def kv(key: str | bytes, type: int, raw: bytes) -> bytes:
    return text(key) + u32(type) + raw


def array(key: str, type: int, length: int, raw: bytes) -> bytes:
    return kv(key, ARRAY, u32(type) + u64(length) + raw)


def tensor(
    name: str | bytes, ne: tuple[int, ...], type: int = 0, offset: int = 0, dims: int | None = None
) -> bytes:
    n_dims = len(ne) if dims is None else dims
    return text(name) + u32(n_dims) + b"".join(map(u64, ne)) + u32(type) + u64(offset)


ARCH = kv("general.architecture", STRING, text("test"))


def build(
    keys: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_keys: int | None = None,
    n_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    keys = [ARCH] if keys is None else keys
    tensors = tensors or []
    out = magic + u32(version)
    out += u64(len(tensors) if n_tensors is None else n_tensors)
    out += u64(len(keys) if n_keys is None else n_keys)
    out += b"".join(keys) + b"".join(tensors)
    return out + bytes(-len(out) % alignment) + data


def every_kind(**options: Any) -> bytes:
    """A valid file with a key of every type, arrays, and three tensors, and no unused byte."""
    scalars = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
               12: "d"}  # fmt: skip
    keys = [ARCH]
    keys += [kv(f"k.{id_}", id_, struct.pack("<" + c, 1)) for id_, c in scalars.items()]
    keys += [array(f"a.{id_}", id_, 2, struct.pack("<2" + c, 0, 1)) for id_, c in scalars.items()]
    keys += [array("tokens", STRING, 3, text("a") + text("") + text("é")), array("none", 4, 0, b"")]
    tensors = [
        tensor("plain", (4, 2), 0, 0),
        tensor("block", (32, 2), 8, 32),
        tensor("half", (8, 2, 2), 30, 128),
    ]
    return build(keys, tensors, bytes(range(192)), **options)
