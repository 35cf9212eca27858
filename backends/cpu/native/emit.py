"""Vector instructions for kernels: LLVM IR from Python, with Python's loops unrolled.

Numba compiles scalar code. Inner loops that need exact vector instructions are intrinsics: Python
functions that write LLVM IR through an `Emitter`. All vectors are 64 bytes (16 numbers of 32 bits,
or 64 bytes). LLVM splits them where registers are shorter, so only `dot` and `lookup`
depend on the instruction set.

    @emits(None, I64, I64, F32)
    def add_to_row(e, x, n, value): ...     # callable from numba code as add_to_row(x, n, value)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from pyggml.backends.cpu.native.isa import Isa, isa

I64, F32, F64 = types.int64, types.float32, types.float64

i1, i8, i16, i32, i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
f16, f32, f64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
BYTES, INTS = ir.VectorType(i8, 64), ir.VectorType(i32, 16)
FLOATS, HALVES, DOUBLES = (ir.VectorType(t, 16) for t in (f32, f16, f64))
_SUFFIX = {f32: "f32", i32: "i32", f16: "f16", i16: "i16"}

Value = Any  # of llvmlite


def emits(result: Any, *parameters: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: the function as a numba intrinsic with these numba types (None: no result)."""

    def decorate(build: Callable[..., Any]) -> Any:
        signature = (types.void if result is None else result)(*parameters)

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            value = build(Emitter(builder), *values)
            return context.get_dummy_value() if result is None else value

        def typing(context: Any, *arguments: Any) -> Any:
            return signature, generate

        names = list(inspect.signature(build).parameters)[1:]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        typing.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [inspect.Parameter(name, kind) for name in ("context", *names)]
        )
        typing.__name__ = build.__name__
        return intrinsic(typing)

    return decorate


class Emitter:
    """Writes instructions. Addresses and counts are 64-bit integers."""

    def __init__(self, builder: Any) -> None:
        self.b = builder
        self.isa: Isa = isa()

    # -- constants and scalars ----------------------------------------------------------------

    def integer(self, value: int) -> Value:
        return ir.Constant(i64, value)

    def number(self, value: float) -> Value:
        return ir.Constant(f32, value)

    def zero(self, kind: Any) -> Value:
        return ir.Constant(kind, None)

    def constant(self, kind: Any, values: Sequence[int | float] | int | float) -> Value:
        """A vector of these numbers, or of one number everywhere."""
        numbers = values if isinstance(values, Sequence) else [values] * kind.count
        return ir.Constant(kind, [kind.element(v) for v in numbers])

    def add(self, *terms: Any) -> Value:
        """The sum of integers; Python's are constants."""
        total, constant = None, 0
        for term in terms:
            if isinstance(term, int):
                constant += term
            else:
                total = term if total is None else self.b.add(total, term)
        if total is None or constant:
            total = (
                self.integer(constant)
                if total is None
                else self.b.add(total, self.integer(constant))
            )
        return total

    def mul(self, a: Value, factor: int | Value) -> Value:
        return self.b.mul(a, self.integer(factor) if isinstance(factor, int) else factor)

    # -- memory -------------------------------------------------------------------------------

    def load(self, kind: Any, address: Value, offset: int = 0) -> Value:
        """A value of this LLVM type; the address may have any alignment."""
        pointer = self.b.inttoptr(self.add(address, offset), kind.as_pointer())
        return self.b.load(pointer, align=1)

    def store(self, value: Value, address: Value, offset: int = 0) -> None:
        pointer = self.b.inttoptr(self.add(address, offset), value.type.as_pointer())
        self.b.store(value, pointer, align=1)

    def prefetch(self, address: Value, offset: int) -> None:
        """Ask for the cache line at an address, which may be outside any memory, in the second
        level: it has room for more lines on their way from memory than the first."""
        pointer = self.b.inttoptr(self.add(address, offset), i8.as_pointer())
        function = self.declared("llvm.prefetch.p0", ir.VoidType(), (pointer.type, i32, i32, i32))
        read, level, data = (ir.Constant(i32, n) for n in (0, 2, 1))
        self.b.call(function, [pointer, read, level, data])

    def store_first(self, value: Value, address: Value, count: Value) -> None:
        """Store the first `count` (1 to 16) numbers of a vector."""
        kind = value.type
        pointer = self.b.inttoptr(address, kind.as_pointer())
        name = f"llvm.masked.store.v16{_SUFFIX[kind.element]}.p0"
        mask = self.first(count)
        function = self.declared(name, ir.VoidType(), (kind, pointer.type, i32, mask.type))
        self.b.call(function, [value, pointer, ir.Constant(i32, 1), mask])

    def load_first(self, kind: Any, address: Value, count: Value) -> Value:
        """The first `count` numbers of a vector; the others are 0 and their memory is not read."""
        pointer = self.b.inttoptr(address, kind.as_pointer())
        mask = self.first(count)
        name = f"llvm.masked.load.v16{_SUFFIX[kind.element]}.p0"
        function = self.declared(name, kind, (pointer.type, i32, mask.type, kind))
        return self.b.call(function, [pointer, ir.Constant(i32, 1), mask, self.zero(kind)])

    def first(self, count: Value) -> Value:
        """The mask of the first `count` of 16 lanes."""
        lanes = self.constant(INTS, range(16))
        limit = self.splat(self.b.trunc(count, i32))
        return self.b.icmp_signed("<", lanes, limit)

    # -- vectors ------------------------------------------------------------------------------

    def splat(self, value: Value, count: int = 16) -> Value:
        """A vector with the scalar in every lane."""
        kind = ir.VectorType(value.type, count)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(i32, 0))
        return self.shuffle(one, one, [0] * count)

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        mask = ir.Constant(ir.VectorType(i32, len(lanes)), [i32(lane) for lane in lanes])
        return self.b.shuffle_vector(a, b, mask)

    def floats(self, value: Value) -> Value:
        """Integers or halves as floats."""
        kind = ir.VectorType(f32, value.type.count) if hasattr(value.type, "count") else f32
        element = getattr(value.type, "element", value.type)
        return self.b.fpext(value, kind) if element is f16 else self.b.sitofp(value, kind)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a b + c, rounded once."""
        suffix = f"v{a.type.count}f32" if hasattr(a.type, "count") else "f32"
        function = self.declared(f"llvm.fma.{suffix}", a.type, (a.type,) * 3)
        return self.b.call(function, [a, b, c])

    def absolute(self, a: Value) -> Value:
        return self.b.call(self.declared("llvm.fabs.v16f32", FLOATS, (FLOATS,)), [a])

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger of each lane; b if one is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def nearest(self, a: Value) -> Value:
        """Floats rounded to whole numbers, halves to even ones."""
        return self.b.call(self.declared("llvm.rint.v16f32", FLOATS, (FLOATS,)), [a])

    def root(self, a: Value) -> Value:
        """The square root of a float."""
        return self.b.call(self.declared("llvm.sqrt.f32", f32, (f32,)), [a])

    def total(self, value: Value) -> Value:
        """The sum of the lanes, in pairs of halves."""
        return self.reduced(value, self.b.fadd)

    def total_int(self, value: Value) -> Value:
        return self.reduced(value, self.b.add)

    def largest(self, value: Value) -> Value:
        return self.reduced(value, self.maximum)

    def totals(self, values: Sequence[Value]) -> Value:
        """A vector whose lanes are the sums of the lanes of 16 vectors."""
        while len(values) > 1:
            even, odd = range(0, 32, 2), range(1, 32, 2)
            values = [
                self.b.fadd(self.shuffle(a, b, even), self.shuffle(a, b, odd))
                for a, b in zip(values[::2], values[1::2])
            ]
        return values[0]

    def reduced(self, value: Value, combine: Callable[[Value, Value], Value]) -> Value:
        """All lanes combined, in pairs of halves."""
        lanes = value.type.count
        while lanes > 1:
            lanes //= 2
            low = self.shuffle(value, value, range(lanes))
            high = self.shuffle(value, value, range(lanes, 2 * lanes))
            value = combine(low, high)
        return self.b.extract_element(value, ir.Constant(i32, 0))

    # -- instructions of a processor ----------------------------------------------------------

    def dot(self, total: Value, codes: Value, x: Value, *, wide: bool) -> Value:
        """total[i] += sum over j < 4 of codes[4 i + j] x[4 i + j]: bytes without sign times bytes
        with sign. Codes reach 127, or 255 if `wide`."""
        if self.isa.vnni:
            function = self.declared("llvm.x86.avx512.vpdpbusd.512", INTS, (INTS,) * 3)
            ints = self.b.bitcast(codes, INTS), self.b.bitcast(x, INTS)
            return self.b.call(function, [total, *ints])
        return self._by_parts(lambda a, b, c: self._dot_avx2(a, b, c, wide), total, codes, x)

    def _dot_avx2(self, total: Value, codes: Value, x: Value, wide: bool) -> Value:
        """Sums of two products must fit in 16 bits, so wide codes become |c - 128| <= 128 and x
        takes the sign; the caller subtracts 128 sum x from what `dot` returns, so it is added."""
        b8, b16, b32 = codes.type, ir.VectorType(i16, 16), ir.VectorType(i32, 8)
        pairs = self.declared("llvm.x86.avx2.pmadd.ub.sw", b16, (b8, b8))
        fours = self.declared("llvm.x86.avx2.pmadd.wd", b32, (b16, b16))
        ones = self.constant(b16, 1)
        if wide:
            sign = self.declared("llvm.x86.avx2.psign.b", b8, (b8, b8))
            signed = self.b.xor(codes, self.constant(b8, -128))
            extra = self.b.call(pairs, [self.constant(b8, 64), x])  # 64 (x0 + x1), twice
            extra = self.b.call(fours, [extra, self.constant(b16, 2)])
            total = self.b.add(total, extra)
            codes, x = self.b.call(sign, [signed, signed]), self.b.call(sign, [x, signed])
        return self.b.add(total, self.b.call(fours, [self.b.call(pairs, [codes, x]), ones]))

    def lookup(self, levels: Sequence[int], codes: Value) -> Value:
        """levels[codes] for 4-bit codes in bytes; levels are 0 to 255."""
        table = [level - 256 if level > 127 else level for level in levels]
        if self.isa.avx512:
            function = self.declared("llvm.x86.avx512.pshuf.b.512", BYTES, (BYTES, BYTES))
            return self.b.call(function, [self.constant(BYTES, table * 4), codes])
        half = ir.VectorType(i8, 32)
        function = self.declared("llvm.x86.avx2.pshuf.b", half, (half, half))
        two = self.constant(half, table * 2)
        return self._by_parts(lambda part: self.b.call(function, [two, part]), codes)

    def _by_parts(self, function: Callable[..., Value], *vectors: Value) -> Value:
        """A function of 32-byte vectors, applied to both halves of 64-byte vectors."""
        results = []
        for part in range(2):
            halves = []
            for v in vectors:
                count = v.type.count // 2
                halves.append(self.shuffle(v, v, range(part * count, (part + 1) * count)))
            results.append(function(*halves))
        return self.shuffle(results[0], results[1], range(2 * results[0].type.count))

    # -- control ------------------------------------------------------------------------------

    @contextmanager
    def loop(self, count: Value) -> Iterator[Value]:
        """Repeat the block `count` times; yields the number of the turn."""
        with cgutils.for_range(self.b, count) as turn:
            yield turn.index

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.b.if_then(condition):
            yield

    def row(self, n: Value, body: Callable[[Row, Value], None]) -> None:
        """Call `body(row, offset)` for each vector of a row of `n` f32: once in a loop of whole
        vectors, and once for the rest. `offset` is in bytes."""
        whole, rest = self.b.lshr(n, self.integer(4)), self.b.and_(n, self.integer(15))
        with self.loop(whole) as i:
            body(Row(self, None), self.mul(i, 64))
        with self.when(self.b.icmp_signed(">", rest, self.integer(0))):
            body(Row(self, rest), self.mul(whole, 64))

    def variable(self, value: Value) -> Variable:
        return Variable(self.b, value)

    def declared(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        kind = ir.FunctionType(result, arguments)
        return cgutils.get_or_insert_function(self.b.module, kind, name)


class Row:
    """Access to one vector of a row, or to the `count` numbers that are left at its end."""

    def __init__(self, e: Emitter, count: Value | None) -> None:
        self.e, self.count = e, count

    def load(self, address: Value, offset: Value) -> Value:
        """f32 at this offset; 0 past the end."""
        at = self.e.add(address, offset)
        return (
            self.e.load(FLOATS, at)
            if self.count is None
            else self.e.load_first(FLOATS, at, self.count)
        )

    def only(self, value: Value) -> Value:
        """The vector with 0 past the end of the row."""
        if self.count is None:
            return value
        return self.e.b.select(self.e.first(self.count), value, self.e.zero(FLOATS))

    def store(self, value: Value, address: Value, offset: Value) -> None:
        at = self.e.add(address, offset)
        if self.count is None:
            self.e.store(value, at)
        else:
            self.e.store_first(value, at, self.count)

    def load_half(self, address: Value, offset: Value) -> Value:
        """The same numbers of a row of f16, as floats; `offset` is that in f32."""
        at = self.e.add(address, self.e.b.lshr(offset, self.e.integer(1)))
        if self.count is None:
            return self.e.floats(self.e.load(HALVES, at))
        return self.e.floats(self.e.load_first(HALVES, at, self.count))

    def store_half(self, value: Value, address: Value, offset: Value) -> None:
        at = self.e.add(address, self.e.b.lshr(offset, self.e.integer(1)))
        halves = self.e.b.fptrunc(value, HALVES)
        if self.count is None:
            self.e.store(halves, at)
        else:
            self.e.store_first(halves, at, self.count)


class Variable:
    """A value that changes in a loop; LLVM keeps it in a register."""

    def __init__(self, builder: Any, value: Value) -> None:
        self.b = builder
        self.pointer = cgutils.alloca_once(builder, value.type)
        self.set(value)

    def get(self) -> Value:
        return self.b.load(self.pointer)

    def set(self, value: Value) -> None:
        self.b.store(value, self.pointer)
