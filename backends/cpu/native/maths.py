"""Functions of vectors of floats: exp, activations, sine and cosine."""

from __future__ import annotations

import math

from pyggml.backends.cpu.native.emit import FLOATS, INTS, Emitter, Value

#: exp(r) for |r| <= ln 2 / 2, from r^6 down; the error is 1e-7 of the value.
_EXP = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0)
#: sin(r) / r and cos(r) for |r| <= pi / 4, in powers of r^2, highest first.
_SIN = (1 / 362880, -1 / 5040, 1 / 120, -1 / 6, 1.0)
_COS = (-1 / 3628800, 1 / 40320, -1 / 720, 1 / 24, -0.5, 1.0)

#: tanh(x) / x for |x| < 0.45, in powers of x^2, highest first.
_TANH = (21844 / 6081075, -1382 / 155925, 62 / 2835, -17 / 315, 2 / 15, -1 / 3, 1.0)

#: atanh(s) / s for 0 <= s <= 1/3, in powers of s^2, highest first; the error is 1e-8.
_ATANH = tuple(1 / n for n in range(15, 0, -2))


def _polynomial(e: Emitter, x: Value, coefficients: tuple[float, ...]) -> Value:
    value = e.constant(x.type, coefficients[0])
    for c in coefficients[1:]:
        value = e.fma(value, x, e.constant(x.type, c))
    return value


def exp(e: Emitter, x: Value) -> Value:
    """e^x: 0 below -104, infinity above 89, NaN for NaN."""
    for sign, bound in (("<", -104.0), (">", 89.0)):
        limit = e.constant(FLOATS, bound)
        x = e.b.select(e.b.fcmp_ordered(sign, x, limit), limit, x)
    turns = e.nearest(e.b.fmul(x, e.constant(FLOATS, 1 / math.log(2))))
    high, low = 0.693359375, math.log(2) - 0.693359375  # the product with `high` is exact
    r = e.fma(turns, e.constant(FLOATS, -high), x)
    r = e.fma(turns, e.constant(FLOATS, -low), r)
    value, power = _polynomial(e, r, _EXP), e.b.fptosi(turns, INTS)
    half = e.b.ashr(power, e.constant(INTS, 1))  # 2^power itself may not be a number
    for part in (half, e.b.sub(power, half)):
        value = e.b.fmul(value, _power_of_two(e, part))
    return value


def _power_of_two(e: Emitter, n: Value) -> Value:
    bits = e.b.shl(e.b.add(n, e.constant(INTS, 127)), e.constant(INTS, 23))
    return e.b.bitcast(bits, FLOATS)


def silu(e: Emitter, x: Value) -> Value:
    return e.b.fdiv(x, e.b.fadd(e.constant(FLOATS, 1.0), exp(e, e.b.fneg(x))))


def sigmoid(e: Emitter, x: Value) -> Value:
    one = e.constant(FLOATS, 1.0)
    return e.b.fdiv(one, e.b.fadd(one, exp(e, e.b.fneg(x))))


def gelu(e: Emitter, x: Value) -> Value:
    """x / 2 (1 + tanh y) = x / (1 + exp(-2 y)),  y = sqrt(2 / pi) (x + 0.044715 x^3)"""
    cubic = e.fma(e.b.fmul(x, x), e.constant(FLOATS, 0.044715), e.constant(FLOATS, 1.0))
    twice = e.b.fmul(e.b.fmul(x, cubic), e.constant(FLOATS, -2 * math.sqrt(2 / math.pi)))
    return e.b.fdiv(x, e.b.fadd(e.constant(FLOATS, 1.0), exp(e, twice)))


def relu(e: Emitter, x: Value) -> Value:
    zero = e.zero(FLOATS)
    return e.b.select(e.b.fcmp_ordered("<", x, zero), zero, x)


def sqr(e: Emitter, x: Value) -> Value:
    return e.b.fmul(x, x)


def sqrt(e: Emitter, x: Value) -> Value:
    return e.b.call(e.declared("llvm.sqrt.v16f32", FLOATS, (FLOATS,)), [x])


def log(e: Emitter, x: Value) -> Value:
    """LLVM calls the C library for each lane."""
    return e.b.call(e.declared("llvm.log.v16f32", FLOATS, (FLOATS,)), [x])


def tanh(e: Emitter, x: Value) -> Value:
    """1 - 2 / (e^2x + 1); where that cancels, |x| < 0.45, x times a polynomial in x^2."""
    one, limit = e.constant(FLOATS, 1.0), e.constant(FLOATS, 0.45)
    twice = exp(e, e.b.fadd(x, x))
    far = e.b.fsub(one, e.b.fdiv(e.constant(FLOATS, 2.0), e.b.fadd(twice, one)))
    near = e.b.fmul(x, _polynomial(e, e.b.fmul(x, x), _TANH))
    return e.b.select(e.b.fcmp_ordered("<", e.absolute(x), limit), near, far)


def softplus(e: Emitter, x: Value) -> Value:
    """max(x, 0) + ln(1 + u),  u = e^-|x|;  ln(1 + u) = 2 atanh(u / (2 + u))"""
    zero, two = e.zero(FLOATS), e.constant(FLOATS, 2.0)
    u = exp(e, e.b.fneg(e.absolute(x)))
    s = e.b.fdiv(u, e.b.fadd(u, two))
    small = e.b.fmul(e.b.fmul(s, two), _polynomial(e, e.b.fmul(s, s), _ATANH))
    return e.b.fadd(e.maximum(x, zero), small)


ACTIVATIONS = {"silu": silu, "gelu": gelu, "relu": relu}


def sin_cos(e: Emitter, angle: Value) -> tuple[Value, Value]:
    """Sine and cosine as floats of 16 angles in f64, which are reduced to a quarter turn first."""
    doubles = angle.type
    nearest = e.declared("llvm.rint.v16f64", doubles, (doubles,))
    quarters = e.b.call(nearest, [e.b.fmul(angle, e.constant(doubles, 2 / math.pi))])
    r = e.b.fsub(angle, e.b.fmul(quarters, e.constant(doubles, math.pi / 2)))
    x = e.b.fptrunc(r, FLOATS)
    # The number of quarter turns, up to whole turns, fits an integer of 32 bits.
    turns = e.b.call(nearest, [e.b.fmul(quarters, e.constant(doubles, 0.25))])
    rest = e.b.fsub(quarters, e.b.fmul(turns, e.constant(doubles, 4.0)))
    k = e.b.fptosi(rest, INTS)
    square = e.b.fmul(x, x)
    sine = e.b.fmul(x, _polynomial(e, square, _SIN))
    cosine = _polynomial(e, square, _COS)
    odd = e.b.icmp_signed("!=", e.b.and_(k, e.constant(INTS, 1)), e.zero(INTS))
    first, second = e.b.select(odd, cosine, sine), e.b.select(odd, sine, cosine)
    return _signed(e, first, k), _signed(e, second, e.b.add(k, e.constant(INTS, 1)))


def _signed(e: Emitter, x: Value, k: Value) -> Value:
    """-x where bit 1 of k is set."""
    sign = e.b.shl(e.b.and_(k, e.constant(INTS, 2)), e.constant(INTS, 30))
    return e.b.bitcast(e.b.xor(e.b.bitcast(x, INTS), sign), FLOATS)
