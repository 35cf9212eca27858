"""How far a result may stand from the float64 oracle: the numbers, reasons and comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: NMSE by numeric class, for every op without a row of its own in `OPS`.
#:
#: These are bounds for results of many numbers. A rounded operand costs a part of the sum of the
#: products' magnitudes, not of the result: where products cancel, a single value may be off by any
#: factor (16-bit activations: by 38 % if the result is 1e-5 of the magnitudes). So a case should
#: have more than a handful of results, or be compared with the magnitudes.
CLASSES: dict[str, float] = {
    # f32 operands and sums: real ggml stays below 5e-13 in long sums, 1e-10 leaves the order free.
    "f32": 1e-10,
    # 11 bits in one operand or the result: 2^-22 / 3 = 8e-8 for one rounding, 1e-6 for a few.
    "f16": 1e-6,
    # 8 bits: 2^-16 / 3 = 5e-6 for one rounding, 5e-5 for a few.
    "bf16": 5e-5,
    # Activations quantized to 8-bit blocks: 2e-5 to 2e-4 in real ggml; this is ggml's own bound.
    "quantized": 5e-4,
    # Ids, orders and copies of integers: equal or wrong.
    "int": 0.0,
}

#: NMSE by (op, numeric class) where the op is another matter than its class.
OPS: dict[tuple[str, str], float] = {
    # A product of two products: their relative errors add.
    ("moe_up_gate", "f16"): 2e-6,
    ("fused_up_gate", "f16"): 2e-6,
    # Moves values, f32 to f32: nothing may change.
    **{
        (op, "f32"): 0.0
        for op in ("reshape", "view", "permute", "transpose", "cont", "cast", "cpy", "concat")
        + ("repeat", "get_rows", "set_rows", "causal_mask", "relu")
    },
}

#: NMSE that no declaration of a backend raises a bound past: test-backend-ops' own for the op. (Its
#: reference has rounded the result to its type, ours has not: that is not counted here.)
LIMITS: dict[str, float] = {
    **dict.fromkeys(("mul_mat", "mul_mat_id", "flash_attn_ext"), 5e-4),
    # ggml grants fused products 5e-3. Each of the two is a product; together they get no more.
    **dict.fromkeys(("moe_up_gate", "fused_up_gate"), 5e-4),
    **dict.fromkeys(("soft_max", "soft_max_ext"), 1e-6),
}
#: ... and for every other op.
LIMIT = 1e-7

#: NMSE of one trip through a block type (cast, cpy, set_rows), which the oracle does not round to:
#: twice what real ggml loses on normally distributed values. To f16 and bf16 it rounds itself, to
#: nearest even, so there nothing is left to chance.
STORAGE: dict[str, float] = {
    "q8_0": 6e-5,
    "q5_1": 3e-3,
    "q5_0": 4e-3,
    "q4_1": 1.3e-2,
    "q4_0": 1.5e-2,
    "iq4_nl": 1.2e-2,
}


def bound(op: str, numeric: str = "f32") -> float:
    """The NMSE that `op` may have in a numeric class of `CLASSES`."""
    return OPS[op, numeric] if (op, numeric) in OPS else CLASSES[numeric]


def declared(op: str, numeric: str) -> float:
    """The NMSE that a backend gets which declares this class for `op`."""
    return min(bound(op, numeric), LIMITS.get(op, LIMIT))


def nmse(a: NDArray[Any], ref: NDArray[Any]) -> float:
    """sum (a - ref)^2 / sum ref^2; 0 where both are all zeros or empty, inf where only ref is."""
    a, ref = np.asarray(a, np.float64), np.asarray(ref, np.float64)
    error, power = float(np.sum((a - ref) ** 2)), float(np.sum(ref**2))
    if error == 0.0:
        return 0.0
    return error / power if power > 0.0 else float("inf")


def relative_error(a: NDArray[Any], ref: NDArray[Any]) -> float:
    """||a - ref||2 / ||ref||2, the root of the NMSE."""
    return float(np.sqrt(nmse(a, ref)))


@dataclass(frozen=True, slots=True)
class Comparison:
    """One result against its reference; true in a boolean context where it is within the bound.

    at     NumPy coordinates of the worst element (of the first that has no business being NaN or
           infinite, or finite), None where the arrays are empty or differ in shape
    error  NMSE over the finite elements; inf where shape, NaN or infinities already differ
    """

    ok: bool
    error: float
    bound: float
    at: tuple[int, ...] | None = None
    got: float = 0.0
    want: float = 0.0
    why: str = ""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        verdict = "within" if self.ok else "NOT within"
        place = "" if self.at is None else f"; worst at {self.at}: {self.got!r} for {self.want!r}"
        why = self.why and f" ({self.why})"
        return f"NMSE {self.error:.3g} {verdict} {self.bound:.3g}{why}{place}"


def within(a: NDArray[Any], ref: NDArray[Any], bound: float) -> Comparison:
    """Same shape, NaN and signed infinities at the same places, and NMSE within the bound."""
    if a.shape != ref.shape:
        why = f"shape {a.shape} for {ref.shape}"
        return Comparison(False, float("inf"), bound, why=why)
    if a.size == 0:
        return Comparison(True, 0.0, bound)
    got, want = np.asarray(a, np.float64), np.asarray(ref, np.float64)

    def result(ok: bool, error: float, badness: NDArray[Any], why: str = "") -> Comparison:
        at = tuple(int(i) for i in np.unravel_index(int(np.argmax(badness)), got.shape))
        return Comparison(ok, error, bound, at, float(got[at]), float(want[at]), why)

    for special, why in ((np.isnan, "NaN"), (np.isposinf, "+inf"), (np.isneginf, "-inf")):
        differ = special(got) != special(want)
        if differ.any():
            return result(False, float("inf"), differ, f"{why} at {int(differ.sum())} wrong places")
    finite = np.isfinite(want)
    distance = np.abs(np.where(finite, got, 0.0) - np.where(finite, want, 0.0))
    error = nmse(got[finite], want[finite])
    return result(error <= bound, error, distance)
