"""The kernel table of the CUDA backend: which function records the launches of which op."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pyggml.backends.base import no_kernel, wrong_type
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.node import Node, Op

if TYPE_CHECKING:
    from pyggml.backends.cuda.launch import Call

#: Bytes: every tensor, and every block of scratch, begins at a multiple of it.
ALIGNMENT = 256

#: What most kernels take: float types and whole numbers, no blocks.
PLAIN = frozenset({"f32", "f16", "bf16", "i32", "i64"})


@dataclass(frozen=True, slots=True)
class Kernel:
    """One row of the table: the function and what the planner must know of it.

    record   called once, when a step is bound: it records the step's launches
    types    element types of sources and result that it takes; None for all
    inplace  sources whose memory the result may take over
    scratch  bytes it needs beside its operands, from the node
    refuses  a further reason not to run a node, or None
    numeric  class of its numbers, a key of `parity.tolerance.CLASSES`
    cublas   whether it calls `gemm`
    """

    record: Callable[[Call], None]
    types: frozenset[str] | None
    inplace: tuple[int, ...]
    scratch: Callable[[Node], int] | None
    refuses: Callable[[Node], str | None]
    numeric: Callable[[Node], str]
    cublas: Callable[[Node], bool]


KERNELS: dict[Op[Any], Kernel] = {}


def kernel(
    op: Op[Any],
    *,
    types: frozenset[str] | set[str] | None = PLAIN,
    inplace: tuple[int, ...] = (),
    scratch: Callable[[Node], int] | None = None,
    refuses: Callable[[Node], str | None] = lambda node: None,
    numeric: str | Callable[[Node], str] = "f32",
    cublas: Callable[[Node], bool] = lambda node: False,
) -> Callable[[Callable[[Call], None]], Callable[[Call], None]]:
    """Register the CUDA kernel of `op`.

    The function is called as `fn(call)` when a step is bound, and records what the step launches
    (see `launch.Call`). Addresses do not change afterwards: what it records is replayed as it is.
    The kernels fill `call.out`, which may be strided, and touch nothing else but their scratch.
    """
    allowed = None if types is None else frozenset(types)

    def of_numbers(node: Node) -> str:
        return numeric if isinstance(numeric, str) else numeric(node)

    def register(fn: Callable[[Call], None]) -> Callable[[Call], None]:
        KERNELS[op] = Kernel(fn, allowed, inplace, scratch, refuses, of_numbers, cublas)
        return fn

    return register


def refusal(node: Node) -> str | None:
    """None where a kernel here runs `node`, else the reason why not, as a phrase."""
    found = KERNELS.get(node.op)
    if found is None:
        return no_kernel(node.op, KERNELS)
    return wrong_type(node, found.types) or _unread_blocks(node) or found.refuses(node)


def _unread_blocks(node: Node) -> str | None:
    """A block type that the package decodes and these kernels do not."""
    for tensor in (node, *node.src):
        if tensor is not None and tensor.dtype.block > 1 and tensor.dtype.name not in FORMATS:
            return f"no kernel for blocks of {tensor.dtype}"
    return None
