"""top_k: a bound and a sort of what is above it; a sort of the whole row where that is short or k
is large."""

from __future__ import annotations

from pyggml import ops
from pyggml.backends.cuda.geometry import pack_width, rows
from pyggml.backends.cuda.launch import Call
from pyggml.backends.cuda.reduce import sort, sort_scratch
from pyggml.backends.cuda.table import kernel
from pyggml.node import Node
from pyggml.ops.reduce import row_length

FILE = "top_k.cu"
#: Bytes of a block's shared memory; Shared in top_k.cu.
SHARED = 82_400
#: The longest rows that are sorted as a whole, and the largest k of longer ones that are not.
SORTED, MOST_K = 256, 2048
#: Blocks of a cluster (CLUSTER in top_k.cu), the shortest rows for one, and the most rows.
CLUSTER, LONG, FEW_ROWS = 8, 12288, 16
#: The longest row that a cluster keeps in two packs of four a thread.
SHORT = 2 * 4 * CLUSTER * 1024


def _sorts(node: Node) -> bool:
    return row_length(node) <= SORTED or node.ne[0] > MOST_K


def _scratch(node: Node) -> int:
    return sort_scratch(node) if _sorts(node) else 0


@kernel(ops.top_k, scratch=_scratch)
def top_k(call: Call) -> None:
    if _sorts(call.node):
        sort(call, descending=True)
        return
    a = call["a"]
    select(call, rows(a) <= FEW_ROWS and a.ne[0] >= LONG and call.device.overlaps)


def select(call: Call, few: bool) -> None:
    """Record the kernel that selects; few: a cluster of blocks for each row."""
    a = call["a"]
    width = pack_width(a)
    packs = 8 if width == 1 else 2 if a.ne[0] <= SHORT else 6
    call.launch(
        FILE,
        f"top_k_cluster<{width}, {packs}>" if few else f"top_k<{width}>",
        grid=rows(a) * (CLUSTER if few else 1),
        block=1024 if few else 512,
        args=[call.out.tensor, a.tensor],
        shared=SHARED,
    )
