"""The causal mask."""

from __future__ import annotations

from collections.abc import Callable

from pyggml import ops
from pyggml.backends.cpu.native.compiler import Native
from pyggml.backends.cpu.rows import adjacent
from pyggml.backends.cpu.table import Call, kernel
from pyggml.node import Node
from pyggml.ops.attention import first_past

HIDDEN = 0xFC00  # -inf as f16


def _check() -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import i32_at, put_i64

    def run(pos: int, step: int, n: int, past: int, own: int, thread: int, threads: int) -> None:
        """Report the last position if it is past the keys."""
        last = -1
        for i in range(n):
            last = max(last, i32_at(pos + i * step))
        if last >= past:
            put_i64(own, -1 - last)

    return run


def _mask() -> Callable[..., None]:
    from pyggml.backends.cpu.native.memory import i32_at, put_i16

    def run(
        out: int, o1: int, pos: int, step: int, kv_end: int, n_kv: int, n: int, window: int,
        stride: int, own: int, thread: int, threads: int,
    ) -> None:  # fmt: skip
        for i in range(n * thread // threads, n * (thread + 1) // threads):
            position = max(i32_at(pos + i * step), -1)
            for j in range(n_kv):
                key = (j + 1) * stride - 1
                if kv_end != 0:
                    key = i32_at(kv_end + 4 * j) - 1
                seen = 0 <= key <= position and position - key < window
                put_i16(out + i * o1 + 2 * j, 0 if seen else HIDDEN)

    return run


CHECK = Native("check_positions", "iiii", _check)
MASK = Native("causal_mask", "i" * 9, _mask)


def _refuses(node: Node) -> str | None:
    if adjacent(node.get("kv_end")):
        return None
    return "causal_mask needs adjacent elements of kv_end"


@kernel(ops.causal_mask, types=None, refuses=_refuses)
def causal_mask(call: Call) -> None:
    pos, kv_end, out = call["pos"], call.get("kv_end"), call.out
    n_kv, n = out.ne[:2]
    if kv_end is None:
        call.add(CHECK, pos.ptr, pos.nb[0], n, first_past(call.node), work=0)
    window = call.attrs["window"]
    call.add(
        MASK, out.ptr, out.nb[1], pos.ptr, pos.nb[0], kv_end.ptr if kv_end else 0, n_kv, n,
        1 << 62 if window is None else window, call.attrs["stride"], work=n_kv * n,
    )  # fmt: skip
