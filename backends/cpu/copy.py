"""Rows by id: get_rows from tiles and plain tensors, set_rows into caches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from pyggml import ops
from pyggml.backends.cpu.convert import convert, refuses_types
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import READABLE, adjacent
from pyggml.backends.cpu.table import Call, Operand, kernel
from pyggml.backends.cpu.weights.decode import decode_row
from pyggml.backends.cpu.weights.tiles import may_be_tiled
from pyggml.backends.host_tiles import FORMS, LAYOUT, tiles_of
from pyggml.dtypes import TYPES
from pyggml.node import Node


@cache
def _check(ids_type: str) -> Native:
    """Report the largest id if it is not below `count`. Ids [n2, n1, n0] with byte strides."""

    def make() -> Callable[..., None]:
        from pyggml.backends.cpu.native import memory

        id_at, put_i64 = getattr(memory, f"{ids_type}_at"), memory.put_i64

        def run(
            ids: int, nb0: int, nb1: int, nb2: int, n0: int, n1: int, n2: int, count: int,
            own: int, thread: int, threads: int,
        ) -> None:  # fmt: skip
            largest = -1
            for i in range(n0 * n1 * n2):
                i0, i1, i2 = i % n0, i // n0 % n1, i // n0 // n1
                largest = max(largest, id_at(ids + i0 * nb0 + i1 * nb1 + i2 * nb2))
            if largest >= count:
                put_i64(own, -1 - largest)

        return run

    return Native(f"check_ids_{ids_type.replace('i', 'int')}", "i" * 8, make)


def check_ids(call: Call, ids: Operand, count: int) -> None:
    """Stop the program with an IdError if an id is not below `count`, before the op's kernel."""
    call.add(_check(ids.type), ids.ptr, *ids.nb[:3], *ids.ne[:3], count, work=0)


@cache
def _get(type_: str, *, tiled: bool) -> Native:
    """out[:, i] = x[:, ids[i]] for every matrix; zeros for a negative id.

    x, x1, x2, x3   address and strides; of a weight in tiles: address, bytes of a tile, tiles,
                    groups of a row
    """

    def make() -> Callable[..., None]:
        from pyggml.backends.cpu.native.memory import i32_at, inner
        from pyggml.backends.cpu.row_loops import clear

        decode = decode_row(type_) if tiled else convert(type_, "i32" if type_ == "i32" else "f32")

        @inner
        def from_tiles(
            y: int, x: int, x1: int, x2: int, x3: int, id_: int, b: int, c: int, n2: int, n: int
        ) -> None:
            decode(x + ((b + c * n2) * x2 + id_ // 16) * x1, id_ % 16, x3, y)

        @inner
        def from_rows(
            y: int, x: int, x1: int, x2: int, x3: int, id_: int, b: int, c: int, n2: int, n: int
        ) -> None:
            decode(y, x + id_ * x1 + b * x2 + c * x3, n)

        read = from_tiles if tiled else from_rows

        def run(
            out: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int,
            ids: int, i0: int, i1: int, i2: int, n: int, n1: int, n2: int, rows: int,
            own: int, thread: int, threads: int,
        ) -> None:  # fmt: skip
            for row in range(rows * thread // threads, rows * (thread + 1) // threads):
                a, b, c = row % n1, row // n1 % n2, row // n1 // n2
                number = i32_at(ids + a * i0 + b * i1 + c * i2)
                y = out + a * o1 + b * o2 + c * o3
                if number < 0:
                    clear(y, n)
                else:
                    read(y, x, x1, x2, x3, number, b, c, n2, n)

        return run

    return Native(f"get_rows_{'tiled_' * tiled}{type_}", "i" * 16, make)


def _get_refuses(node: Node) -> str | None:
    a = node["a"]
    if a.dtype.name in (*READABLE, "i32"):
        return None if adjacent(a, node) else "get_rows needs rows whose elements are adjacent"
    if a.dtype.name in FORMS and may_be_tiled(node, "a"):
        return None
    return f"get_rows does not read {a.dtype} here"


@kernel(ops.get_rows, types=None, refuses=_get_refuses)
def get_rows(call: Call) -> None:
    a, ids, out = call["a"], call["ids"], call.out
    check_ids(call, ids, a.ne[1])
    n, n1, n2, n3 = out.ne
    tiled, place = a.layout == LAYOUT, a.nb[1:]
    if tiled:
        tiles = tiles_of(TYPES[a.type], a.ne)
        place = tiles.tile, tiles.tiles, tiles.groups
    call.add(
        _get(a.type, tiled=tiled), out.ptr, *out.nb[1:], a.ptr, *place, ids.ptr, *ids.nb[:3],
        n, n1, n2, n1 * n2 * n3, work=out.elements,
    )  # fmt: skip


@cache
def _set(source: str, target: str, ids_type: str) -> Native:
    """out[:, ids[i]] = x[:, i] for every matrix; ids repeat along both outer axes."""

    def make() -> Callable[..., None]:
        from pyggml.backends.cpu.native import memory

        write, id_at = convert(source, target), getattr(memory, f"{ids_type}_at")

        def run(
            out: int, o1: int, o2: int, o3: int, x: int, x1: int, x2: int, x3: int,
            ids: int, i0: int, i1: int, i2: int, n: int, n1: int, n2: int, rows: int,
            c1: int, c2: int, own: int, thread: int, threads: int,
        ) -> None:  # fmt: skip
            # A thread takes whole matrices, so that rows with equal ids are written in order.
            matrices = rows // n1
            for m in range(matrices * thread // threads, matrices * (thread + 1) // threads):
                b, c = m % n2, m // n2
                for a in range(n1):
                    number = id_at(ids + a * i0 + b % c1 * i1 + c % c2 * i2)
                    if number >= 0:
                        write(out + number * o1 + b * o2 + c * o3, x + a * x1 + b * x2 + c * x3, n)

        return run

    return Native(f"set_rows_{source}_{target}_{ids_type}", "i" * 18, make)


def _set_refuses(node: Node) -> str | None:
    if reason := refuses_types(node, node["b"]):
        return reason
    if not adjacent(node["a"], node["b"]):
        return "set_rows needs rows whose elements are adjacent"
    return None


@kernel(ops.set_rows, types=None, refuses=_set_refuses)
def set_rows(call: Call) -> None:
    b, ids, out = call["b"], call["ids"], call.out
    check_ids(call, ids, out.ne[1])
    n, n1, n2, n3 = b.ne
    call.add(
        _set(b.type, out.type, ids.type), out.ptr, *out.nb[1:], b.ptr, *b.nb[1:], ids.ptr,
        *ids.nb[:3], n, n1, n2, n1 * n2 * n3, *ids.ne[1:3], work=b.elements,
    )  # fmt: skip
