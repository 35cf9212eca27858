"""soft_max_ext."""

from __future__ import annotations

import struct

from pyggml import ops
from pyggml.backends.cuda.launch import Call, Operand, Value
from pyggml.backends.cuda.table import kernel


def _whole(x: Operand | None, size: int) -> bool:
    """Whether rows of `x` are runs of elements that begin at whole groups of four."""
    return x is None or (x.nb[0] == size and x.aligned(4 * size))


@kernel(ops.soft_max_ext, types=frozenset({"f32", "f16"}), inplace=("a",))
def soft_max_ext(call: Call) -> None:
    a, out, attrs = call.operand(0), call.out, call.attrs
    _, mask, sinks = call.src
    n, rows, heads, n3 = a.ne
    size = 4 if mask is None else mask.dtype.nbytes
    wide = n % 4 == 0 and _whole(a, 4) and _whole(out, 4) and _whole(mask, size)
    ptrs = [a.ptr, *(0 if x is None else x.ptr for x in (mask, sinks)), out.ptr]
    nb = [*a.nb, *(mask.nb if mask is not None else (0,) * 4), *out.nb[1:]]
    nb.append(sinks.nb[0] if sinks is not None else 0)
    numbers = [n, *(mask.ne[2:] if mask is not None else (1, 1)), attrs["head0"], attrs["n_head"]]
    floats = attrs["scale"], attrs["max_bias"] if mask is not None else 0.0
    argument = struct.pack("<4Q12q5i2f4x", *ptrs, *nb, *numbers, *floats)
    kind = "__half" if mask is not None and mask.dtype.name == "f16" else "float"
    call.launch(
        "softmax.cu",
        f"softmax<{kind}, {4 if wide else 1}>",
        grid=(rows, heads, n3),
        block=256,
        args=[Value(argument)],
    )
