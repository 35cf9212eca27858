"""top_k: a bound and a sort of what is above it; a sort of the whole row where that is short or k
is large."""

from __future__ import annotations

from functools import partial

from pyggml import ops
from pyggml.backends.cuda.fusion import Fused, Run
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
#: Packs of a thread in top_k_list.cu, with one block and with a cluster, and its shared memory.
LIST, LIST_SHARED = ((1, 4), (2, 4, 12)), 11_592


def _sorts(node: Node) -> bool:
    return row_length(node) <= SORTED or node.ne[0] > MOST_K


def _scratch(node: Node) -> int:
    return sort_scratch(node) if _sorts(node) else 0


@kernel(ops.top_k, scratch=_scratch)
def top_k(call: Call) -> None:
    if _sorts(call.node):
        sort(call, descending=True)
        return
    _selected(call, listed=False)


def listed_rows(node: Node, run: Run) -> Fused | None:
    """top_k where only lists of attention read the ids, which may be in any order then, as long as
    it is the same in each run."""
    readers = run.readers.get(node, ())
    if _sorts(node) or node in run.keep or not readers:
        return None
    if not all(_as_list(reader, node) for reader in readers):
        return None
    return Fused((node,), {"a": node["a"]}, partial(_selected, listed=True))


def _as_list(reader: Node, ids: Node) -> bool:
    """Whether a node is attention that reads ids only as its list."""
    if reader.op is not ops.flash_attn_ext:
        return False
    listed = reader.get("ids")
    others = (s for name in reader.op.operands if name != "ids" and (s := reader.get(name)))
    return listed is not None and listed.base is ids and all(s.base is not ids for s in others)


def _selected(call: Call, listed: bool) -> None:
    a = call["a"]
    few = rows(a) <= FEW_ROWS
    select(call, few and a.ne[0] >= LONG and call.device.overlaps, few and listed)


def select(call: Call, few: bool, listed: bool = False) -> None:
    """Record the kernel that selects.

    few     a cluster of blocks for each row
    listed  ids may be in any order; some kernels sort them nevertheless
    """
    a = call["a"]
    width = pack_width(a)
    args = [call.out.tensor, a.tensor]
    blocks = CLUSTER if few else 1
    packs = next((n for n in LIST[few] if a.ne[0] <= 4 * 512 * blocks * n), 0)
    if listed and width == 4 and packs:
        name, grid = f"top_k_list{'_cluster' * few}<{packs}>", rows(a) * blocks
        call.launch("top_k_list.cu", name, grid=grid, block=512, args=args, shared=LIST_SHARED)
        return
    packs = 8 if width == 1 else 2 if a.ne[0] <= SHORT else 6
    call.launch(
        FILE,
        f"top_k_cluster<{width}, {packs}>" if few else f"top_k<{width}>",
        grid=rows(a) * (CLUSTER if few else 1),
        block=1024 if few else 512,
        args=args,
        shared=SHARED,
    )
