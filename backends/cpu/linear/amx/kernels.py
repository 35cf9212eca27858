"""Products with AMX, bound to their operands."""

from __future__ import annotations

from pyggml.backends.cpu.gate import Gate
from pyggml.backends.cpu.linear.amx import columns
from pyggml.backends.cpu.linear.amx.products import SLOTS, by_expert, dense
from pyggml.backends.cpu.linear.operands import Matrices, matrices
from pyggml.backends.cpu.table import Call
from pyggml.backends.host_tiles import ROWS
from pyggml.backends.processors import n_threads


def _share(weight: Matrices, others: int, gated: bool) -> int:
    """Of 16 rows, how many a thread takes at once: fewer if there are too few for all threads."""
    most = SLOTS // 2 if gated else SLOTS
    each = -(-weight.m // ROWS) * others // (2 * n_threads())
    return max(1 if gated else 2, min(most, each))


def add_dense(call: Call, up: str, gate: str | None, act: Gate) -> None:
    """out = up b, or act(gate b) (up b)."""
    b, out = call["b"], call.out
    k, n, n2, n3 = b.ne
    call.add(columns.dense(b.type), call.scratch, b.ptr, *b.nb, n, n2, n2 * n3, k)
    u, g = matrices(call, up), matrices(call, gate) if gate else None
    w2, w3, r2, r3 = (u.nb2, u.nb3, n2 // call[up].ne[2], n3 // call[up].ne[3])
    if g is not None:
        w2 = w3 = 0  # one matrix each
    call.add(
        dense(u.inner, g and g.inner, act, out.type), u.ptr, u.tile, u.stride,
        *((g.ptr, g.tile, g.stride) if g else (0, 0, 0)), w2, w3, u.m, k, call.scratch, n,
        out.ptr, *out.nb[1:], n2, n2 * n3, max(1, r2), max(1, r3), _share(u, n2 * n3, bool(g)),
    )  # fmt: skip


def add_by_expert(call: Call, up: str, gate: str | None, act: Gate, table: int) -> None:
    """The same, each token with its experts. `table` is that of `experts.py`."""
    b, out, ids = call["b"], call.out, call["ids"]
    n_used, n_tokens, n_experts, k = *ids.ne[:2], call[up].ne[2], b.ne[0]
    call.add(
        columns.by_expert(b.type), call.scratch, b.ptr, *b.nb[:3], b.ne[1], k, table, n_used,
        n_experts,
    )  # fmt: skip
    u, g = matrices(call, up), matrices(call, gate) if gate else None
    call.add(
        by_expert(u.inner, g and g.inner, act), u.ptr, u.tile, u.nb2, u.stride,
        *((g.ptr, g.tile, g.nb2, g.stride) if g else (0, 0, 0, 0)), u.m, k, call.scratch, out.ptr,
        *out.nb[1:3], table, ids.ptr, *ids.nb[:2], n_used, n_tokens, n_experts,
        _share(u, n_experts, bool(g)),
    )  # fmt: skip
