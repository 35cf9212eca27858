"""Tiles of bf16: AMX's instructions, and weights and activations as its operands.

Tile registers are those of the processor: their numbers are part of the instructions, so a kernel
may not use them in functions that call one another. With `PYGGML_CPU_ISA=amx-emulated` they are 8
KiB of the stack, and vectors do the work: tests run the kernels on any processor.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from pyggml.backends.cpu.linear.columns import DEPTH, TILE
from pyggml.backends.cpu.linear.exact import weights
from pyggml.backends.cpu.linear.inner import Inner
from pyggml.backends.cpu.linear.tile import group_at
from pyggml.backends.cpu.native.emit import (
    FLOATS,
    I64,
    INTS,
    Emitter,
    Value,
    emits,
    i8,
    i16,
    i32,
    i64,
)
from pyggml.backends.cpu.native.vectors import load_floats
from pyggml.backends.host_tiles import FORMS, GROUP, ROWS

WORDS = ir.VectorType(i16, 32)


class _BFloat(ir.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


_ROUNDED = ir.VectorType(_BFloat(), 32)


class Tiles:
    """The eight tile registers, each of 16 lines of 64 bytes."""

    def __init__(self, e: Emitter) -> None:
        self.e, self.memory = e, None
        if e.isa.emulated:
            with e.b.goto_entry_block():
                place = e.b.alloca(ir.ArrayType(i8, 8 * TILE))
            self.memory = e.b.ptrtoint(place, i64)

    def _call(self, name: str, numbers: tuple[int, ...], *address: Value) -> None:
        e = self.e
        values = [ir.Constant(i8, n) for n in numbers]
        if address:
            values += [e.b.inttoptr(address[0], i8.as_pointer()), e.integer(64)]
        kinds = [value.type for value in values]
        e.b.call(e.declared(f"llvm.x86.{name}", ir.VoidType(), kinds), values)

    def _line(self, tile: int, line: int | Value = 0) -> Value:
        assert self.memory is not None
        offset = 64 * line if isinstance(line, int) else self.e.mul(line, 64)
        return self.e.add(self.memory, TILE * tile, offset)

    def _copy(self, source: Value, target: Value) -> None:
        for line in range(ROWS):
            self.e.store(self.e.load(INTS, source, 64 * line), target, 64 * line)

    def zero(self, tile: int) -> None:
        if self.memory is None:
            self._call("tilezero", (tile,))
        else:
            for line in range(ROWS):
                self.e.store(self.e.zero(INTS), self._line(tile, line))

    def load(self, tile: int, address: Value) -> None:
        if self.memory is None:
            self._call("tileloadd64", (tile,), address)
        else:
            self._copy(address, self._line(tile))

    def store(self, tile: int, address: Value) -> None:
        if self.memory is None:
            self._call("tilestored64", (tile,), address)
        else:
            self._copy(self._line(tile), address)

    def multiply(self, sums: int, x: int, w: int) -> None:
        """sums[column][row] += x[column][2 i] w[i][row][0] + x[column][2 i + 1] w[i][row][1]."""
        if self.memory is None:
            self._call("tdpbf16ps", (sums, x, w))
            return
        e, sixteen = self.e, self.e.integer(ROWS)
        with e.loop(sixteen) as column, e.loop(sixteen) as i:
            place = self._line(sums, column)
            pair = e.splat(e.load(i32, e.add(self._line(x, column), e.mul(i, 4))))
            line, total = e.load(INTS, self._line(w, i)), e.load(FLOATS, place)
            for take, number in ((e.b.shl, 16), (e.b.and_, -65536)):
                a, b = (take(v, e.constant(INTS, number)) for v in (pair, line))
                total = e.fma(e.b.bitcast(a, FLOATS), e.b.bitcast(b, FLOATS), total)
            e.store(total, place)


@emits(None)
def begin_tiles(e: Emitter) -> None:
    """Every tile of this thread has 16 lines of 64 bytes."""
    if e.isa.emulated:
        return
    place = cgutils.alloca_once(e.b, ir.ArrayType(i8, 64))
    at = e.b.ptrtoint(place, i64)
    e.store(e.zero(INTS), at)
    e.store(ir.Constant(i8, 1), at)  # the palette
    for tile in range(8):
        e.store(ir.Constant(i16, 64), at, 16 + 2 * tile)
        e.store(ir.Constant(i8, ROWS), at, 48 + tile)
    pointer = e.b.inttoptr(at, i8.as_pointer())
    e.b.call(e.declared("llvm.x86.ldtilecfg", ir.VoidType(), [pointer.type]), [pointer])


@emits(None)
def end_tiles(e: Emitter) -> None:
    """Nothing is left in tiles that the kernel would save for this thread."""
    if not e.isa.emulated:
        e.b.call(e.declared("llvm.x86.tilerelease", ir.VoidType(), ()), [])


def multiply(blocks: int, slots: int) -> Any:
    """multiply(x, w, sums, groups, start): twice 16 rows times 1 or 2 blocks of 16 columns.

    x, w    tiles of a block, followed by those of the next; of 16 rows, `DEPTH` numbers each
    sums    [block][slots] tiles; start = 0: they are not read
    """

    def build(e: Emitter, x: Any, w: Any, sums: Any, groups: Any, start: Any) -> None:
        tiles, step = Tiles(e), e.mul(groups, TILE)
        xs = [e.add(x, step) if block else x for block in range(blocks)]
        places = [
            (2 * block + slot, e.add(sums, (block * slots + slot) * TILE))
            for block in range(blocks)
            for slot in range(2)
        ]
        with e.b.if_else(e.b.icmp_signed("==", start, e.integer(0))) as (then, otherwise):
            with then:
                for tile, _ in places:
                    tiles.zero(tile)
            with otherwise:
                for tile, place in places:
                    tiles.load(tile, place)
        with e.loop(groups) as group:
            offset = e.mul(group, TILE)
            for slot in range(2):
                tiles.load(6 + slot, e.add(w, offset, slot * DEPTH * ROWS * 2))
            for block in range(blocks):
                tiles.load(4 + block, e.add(xs[block], offset))
                for slot in range(2):
                    tiles.multiply(2 * block + slot, 4 + block, 6 + slot)
        for tile, place in places:
            tiles.store(tile, place)

    return emits(None, I64, I64, I64, I64, I64)(build)


# -- operands -------------------------------------------------------------------------------------


def rounded(e: Emitter, low: Value, high: Value) -> Value:
    """Two vectors of floats as 32 bf16, to nearest even."""
    if e.isa.bf16:
        name = "llvm.x86.avx512bf16.cvtne2ps2bf16.512"
        words = e.b.call(e.declared(name, _ROUNDED, (FLOATS, FLOATS)), [high, low])
        return e.b.bitcast(words, WORDS)
    halves = []
    for v in (low, high):
        bits = e.b.bitcast(v, INTS)
        odd = e.b.and_(e.b.lshr(bits, e.constant(INTS, 16)), e.constant(INTS, 1))
        near = e.b.add(bits, e.b.add(odd, e.constant(INTS, 0x7FFF)))
        quiet = e.b.or_(bits, e.constant(INTS, 1 << 22))
        near = e.b.select(e.b.fcmp_unordered("uno", v, v), quiet, near)
        halves.append(e.b.trunc(e.b.lshr(near, e.constant(INTS, 16)), ir.VectorType(i16, 16)))
    return e.shuffle(halves[0], halves[1], range(32))


def decode(inner: Inner) -> Any:
    """decode(at, k, stride, count, before, groups, out): groups of 16 rows after the first
    `before` as tiles. at, k, stride, count: as in `inner.py`, but k counts numbers."""
    return _decode_floats(inner.type) if inner.how == "rows" else _decode_blocks(inner.type)


def _decode_blocks(name: str) -> Any:
    form = FORMS[name]

    def build(
        e: Emitter, at: Any, k: Any, stride: Any, count: Any, before: Any, groups: Any, out: Any
    ) -> None:
        pairs = [half * 16 + i for i in range(16) for half in range(2)]
        with e.loop(groups) as number:
            numbers = weights(e, form, *group_at(e, form, at, e.add(before, number)))
            target = e.add(out, e.mul(number, TILE))
            for i, (low, high) in enumerate(zip(numbers, numbers)):
                words = rounded(e, low, high)
                e.store(e.shuffle(words, words, pairs), target, 64 * i)

    return emits(None, I64, I64, I64, I64, I64, I64, I64)(build)


def _decode_floats(type_: str) -> Any:
    def build(
        e: Emitter, at: Any, k: Any, stride: Any, count: Any, before: Any, groups: Any, out: Any
    ) -> None:
        rows = [at]
        for i in range(1, ROWS):  # the last row again where there are fewer
            there = e.b.icmp_signed(">", count, e.integer(i))
            rows.append(e.b.select(there, e.add(rows[-1], stride), rows[-1]))

        def put(number: Value, left: Value | None) -> None:
            offset = e.mul(e.add(before, number), 2 * GROUP)
            lines = [_group(e, type_, e.add(row, offset), left) for row in rows]
            target = e.add(out, e.mul(number, TILE))
            for i, line in enumerate(_transposed(e, [e.b.bitcast(v, INTS) for v in lines])):
                e.store(line, target, 64 * i)

        _each_group(e, e.b.sub(k, e.mul(before, GROUP)), groups, put)

    return emits(None, I64, I64, I64, I64, I64, I64, I64)(build)


def convert(type_: str) -> Any:
    """convert(x, out, n): n numbers of a column as lines of tiles that follow one another."""
    size = {"f32": 4, "f16": 2, "bf16": 2}[type_]

    def build(e: Emitter, x: Any, out: Any, n: Any) -> None:
        def put(number: Value, left: Value | None) -> None:
            words = _group(e, type_, e.add(x, e.mul(number, size * GROUP)), left)
            e.store(words, e.add(out, e.mul(number, TILE)))

        groups = e.b.lshr(e.add(n, GROUP - 1), e.integer(5))
        _each_group(e, n, groups, put)

    return emits(None, I64, I64, I64)(build)


def _each_group(e: Emitter, n: Value, groups: Value, body: Any) -> None:
    """body(number of a group, None), and body(.., numbers left) for a group that ends after n."""
    most = e.b.lshr(n, e.integer(5))
    fewer = e.b.icmp_signed("<", most, groups)
    with e.loop(e.b.select(fewer, most, groups)) as number:
        body(number, None)
    with e.when(fewer):
        body(most, e.b.and_(n, e.integer(GROUP - 1)))


def _group(e: Emitter, type_: str, x: Value, left: Value | None) -> Value:
    """32 numbers as bf16; the first `left` of them, and zeros."""
    lefts = (None, None) if left is None else (left, e.add(left, -16))
    floats = []
    for i, rest in enumerate(lefts):
        at = e.add(x, (64 if type_ == "f32" else 32) * i)
        floats.append(load_floats(e, type_, at, left=rest))
    return rounded(e, *floats)


def _transposed(e: Emitter, lines: list[Value]) -> list[Value]:
    """16 vectors of 16 integers, lanes for vectors."""
    for bit in (1, 2, 4, 8):
        low = [lane + 16 - bit if lane & bit else lane for lane in range(16)]
        high = [lane + 16 if lane & bit else lane + bit for lane in range(16)]
        result = list(lines)
        for i in range(16):
            if not i & bit:
                a, b = lines[i], lines[i + bit]
                result[i], result[i + bit] = e.shuffle(a, b, low), e.shuffle(a, b, high)
        lines = result
    return lines
