"""Error bounds of results relative to the float64 oracle, their reasons, and the comparison."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: NMSE by numeric class, for every op without a row in `OPS`.
#:
#: These bounds are for results of many elements. The error of a rounded operand is relative to the
#: sum of the products' magnitudes, not to the result: where products cancel, a single element may
#: be off by any factor (with 16-bit activations by 38 %, if it is 1e-5 of the magnitudes). So a
#: case should have more than a few results; `check` widens the bound of a smaller one.
CLASSES: dict[str, float] = {
    # f32 operands and sums: real ggml stays below 5e-13 in long sums, 1e-10 leaves the order free.
    "f32": 1e-10,
    # 11 bits in one operand or the result: 2^-22 / 3 = 8e-8 for one rounding, 1e-6 for a few.
    "f16": 1e-6,
    # 8 bits: 2^-16 / 3 = 5e-6 for one rounding, 5e-5 for a few.
    "bf16": 5e-5,
    # Activations quantized to 8-bit blocks: 2e-5 to 2e-4 in real ggml; this is ggml's own bound.
    "quantized": 5e-4,
    # Ids, orders and copies of integers must be equal.
    "int": 0.0,
}

#: NMSE by (op, numeric class), for ops that differ from their class.
OPS: dict[tuple[str, str], float] = {
    # A product of two products: their relative errors add.
    ("moe_up_gate", "f16"): 2e-6,
    ("fused_up_gate", "f16"): 2e-6,
    # These move values, f32 to f32: nothing may change.
    **{
        (op, "f32"): 0.0
        for op in ("reshape", "view", "permute", "transpose", "cont", "cast", "cpy", "concat")
        + ("repeat", "get_rows", "set_rows", "causal_mask", "relu", "all_gather", "broadcast")
    },
}

#: The largest NMSE that a backend may declare: that of test-backend-ops for the op. (Its reference
#: is rounded to the result's type, ours is not: these limits do not count that rounding.)
LIMITS: dict[str, float] = {
    **dict.fromkeys(("mul_mat", "mul_mat_id", "flash_attn_ext"), 5e-4),
    # ggml grants fused products 5e-3. Each of the two is a product; together they get no more.
    **dict.fromkeys(("moe_up_gate", "fused_up_gate"), 5e-4),
    **dict.fromkeys(("soft_max", "soft_max_ext"), 1e-6),
    # Rounding q to the type of k is granted, quantizing it is not: it would change what is chosen.
    "lightning_indexer": 5e-5,
}
#: ... and for every other op.
LIMIT = 1e-7

#: NMSE of one conversion to a block type (cast, cpy, set_rows), to which the oracle does not round:
#: twice the loss of real ggml on normally distributed values. To f16 and bf16 the oracle rounds,
#: to nearest even, so those conversions must be exact.
STORAGE: dict[str, float] = {
    "q8_0": 6e-5,
    "q5_1": 3e-3,
    "q5_0": 4e-3,
    "q4_1": 1.3e-2,
    "q4_0": 1.5e-2,
    "iq4_nl": 1.2e-2,
}


def bound(op: str, numeric: str = "f32") -> float:
    """The NMSE allowed for `op` in a numeric class of `CLASSES`."""
    return OPS[op, numeric] if (op, numeric) in OPS else CLASSES[numeric]


def declared(op: str, numeric: str) -> float:
    """The NMSE allowed for `op` if the backend declares this class: at most the op's limit."""
    return min(bound(op, numeric), LIMITS.get(op, LIMIT))


def nmse(a: NDArray[Any], ref: NDArray[Any]) -> float:
    """sum (a - ref)^2 / sum ref^2; 0 if both are zero or empty, inf if only ref is."""
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
    """A result compared with its reference; true if it is within the bound.

    at     NumPy coordinates of the worst element, or of the first NaN or infinity that differs;
           None if the arrays are empty or differ in shape
    error  NMSE over the finite elements; inf if shape, NaN or infinities differ
    got, want  the element at `at` of the result and of the reference
    """

    ok: bool
    error: float
    bound: float
    at: tuple[int, ...] | None = None
    got: float = 0.0
    want: float = 0.0
    why: str = ""

    @property
    def ratio(self) -> float:
        """Error over bound."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.bound if self.bound else float("inf")

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        verdict = "within" if self.ok else "NOT within"
        worst = "" if self.at is None else f"; worst at {self.at}: {self.got!r} for {self.want!r}"
        why = self.why and f" ({self.why})"
        return f"NMSE {self.error:.3g} {verdict} {self.bound:.3g}{why}{worst}"


def within(a: NDArray[Any], ref: NDArray[Any], bound: float) -> Comparison:
    """Compare: same shape, NaN and signed infinities at the same places, NMSE within the bound."""
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
