"""lightning_indexer: on tensor cores where rows have 128 elements, else in plain f32."""

from __future__ import annotations

import ctypes

from pyggml import ops
from pyggml.backends.cuda.argument import Struct
from pyggml.backends.cuda.copy import reader
from pyggml.backends.cuda.device.tensormap import EMPTY, TensorMap, tensor_map
from pyggml.backends.cuda.fusion import Fused, Run
from pyggml.backends.cuda.geometry import C_TYPES, blocks_for
from pyggml.backends.cuda.launch import ABSENT, Call, Operand, early_reads
from pyggml.backends.cuda.table import ALIGNMENT, kernel
from pyggml.node import Node

#: Elements of a row that the tensor-core kernel takes, and its types.
ROW = 128
TYPES = ("f16", "bf16", "q8_0")
#: The most elements of a row that the kernel in plain f32 holds in shared memory.
MOST = 512
#: Rows of a tile.
TILE = 64
#: Warpgroups of a block for one token, each with two tiles at a time; and for more tokens.
ONE, MORE = 4, 3
#: Images in flight, and bytes of a row of q8_0; STAGES and RAW in indexer.cu.
STAGES, RAW = 4, 136
#: Number of blocks that fills the GPU once. A constant, so that results do not depend on the GPU.
FULL = 132
#: The most tokens of a chunk, and for the kernel in plain f32.
CHUNK, PLAIN_CHUNK = 64, 8
#: The operand that a node scales to weights.
SCALED = "scaled"


class Indexer(Struct):
    """The struct `Indexer` of indexer.cuh: addresses (0: absent), byte strides, sizes."""

    _fields_ = (
        ("q", ctypes.c_uint64),
        ("k", ctypes.c_uint64),
        ("w", ctypes.c_uint64),
        ("mask", ctypes.c_uint64),
        ("kv_len", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("images", ctypes.c_uint64),
        ("nb_q", ctypes.c_int64 * 3),
        ("nb_k", ctypes.c_int64 * 2),
        ("nb_w", ctypes.c_int64 * 3),
        ("nb_mask", ctypes.c_int64 * 2),
        ("nb_out", ctypes.c_int64 * 2),
        ("d", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("n_tokens", ctypes.c_int32),
        ("n_kv", ctypes.c_int32),
        ("mask_batch", ctypes.c_int32),
        ("chunk", ctypes.c_int32),
        ("early", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class TokenIndexer(Struct):
    """The struct `TokenIndexer` of indexer_token.cu, padded like `HopperArgument`."""

    _fields_ = (("pad", ctypes.c_uint64 * 6), ("map", TensorMap), ("a", Indexer))


def why_plain(node: Node) -> str:
    """Why no tensor-core kernel takes a node; "" if one does, alignment permitting."""
    d, heads = node["q"].ne[:2]
    if node["k"].dtype.name not in TYPES:
        return f"an indexer's rows of {node['k'].dtype} have no tensor-core kernel"
    if d != ROW:
        return f"an indexer's rows of {d} elements have no tensor-core kernel; {ROW} have one"
    if heads % 32:
        return f"{heads} heads of an indexer are not a multiple of 32, so no tensor cores"
    return ""


def _heads(n_head: int) -> int:
    """Heads of a product."""
    return 64 if n_head % 64 == 0 else 32


def _image(heads: int) -> int:
    """Bytes of the packed queries of so many heads and their weights; IMAGE in indexer.cu."""
    return heads * (2 * ROW + 4)


def _stage(heads: int) -> int:
    """Bytes of an image in shared memory; STAGE in indexer.cu."""
    return heads * 2 * ROW + 1024


def _scratch(node: Node) -> int:
    _, n_head, n_tokens, n3 = node["q"].ne
    if n_tokens == 1 or why_plain(node):
        return 0
    heads = _heads(n_head)
    return n3 * n_tokens * (n_head // heads) * _image(heads)


def _numeric(node: Node) -> str:
    if why_plain(node):
        return "f32"
    return "bf16" if node["k"].dtype.name == "bf16" else "f16"


def _refuses(node: Node) -> str | None:
    d = node["q"].ne[0]
    return None if d <= MOST else f"an indexer's rows of {d} elements are longer than {MOST}"


@kernel(ops.lightning_indexer, types=None, scratch=_scratch, refuses=_refuses, numeric=_numeric)
def lightning_indexer(call: Call) -> None:
    q, k = call["q"], call["k"]
    if why_plain(call.node) or not (q.aligned(16) and k.aligned(4 if k.dtype.block > 1 else 16)):
        return plain(call)
    if q.ne[2] > 1:
        return many_tokens(call)
    shared = q.ne[1] // _heads(q.ne[1]) * _stage(_heads(q.ne[1])) + ONE * 2 * TILE * 2 * ROW + 1024
    if call.device.arch == "90a" and k.dtype.block == 1 and shared <= call.device.shared - 1024:
        return mapped_token(call, shared)
    one_token(call)


def scaled_weights(node: Node, run: Run) -> Fused | None:
    """An indexer whose weights are `scale` of something."""
    weights = node["weights"]
    if weights.op is not ops.scale or weights.attrs["b"] != 0 or not run.only(weights, node):
        return None
    others = ("q", "k", "mask", "kv_len")
    reads = {name: s for name in others if (s := node.get(name)) is not None}
    reads[SCALED] = weights["a"]
    return Fused((weights, node), reads, lightning_indexer, scratch=_scratch(node))


def one_token(call: Call) -> None:
    """One launch, in which every block packs the queries itself."""
    q, k = call["q"], call["k"]
    heads, tiles = _heads(q.ne[1]), blocks_for(k.ne[1], TILE)
    shared = q.ne[1] // heads * _stage(heads)
    if k.dtype.block > 1:
        shared += ONE * 2 * TILE * RAW
    if shared > call.device.shared:
        return plain(call)
    argument = _argument(call)
    call.launch(
        "indexer.cu",
        f"scores<{_type(k)}, {heads}, false>",
        grid=(min(tiles, call.device.sms), 1, q.ne[3]),
        block=128 * ONE,
        args=[argument],
        shared=shared,
        early=argument.early > 0,
    )


def mapped_token(call: Call, shared: int) -> None:
    """The same where the copy engine brings the rows. As few blocks as take no longer: on some
    multiprocessors blocks of the launch before leave no room for one."""
    q, k = call["q"], call["k"]
    tiles = blocks_for(k.ne[1], TILE)
    kind, size = k.dtype.name, (ROW, k.ne[1], 1, k.ne[3])
    rows = EMPTY if call.names_only else tensor_map(k.ptr, kind, size, k.nb, (64, TILE, 1, 1))
    argument = _argument(call)
    call.launch(
        "indexer_token.cu",
        f"scores_token<{_type(k)}, {_heads(q.ne[1])}>",
        grid=(blocks_for(tiles, blocks_for(tiles, call.device.sms)), 1, q.ne[3]),
        block=128 * ONE,
        args=[TokenIndexer(pad=(0,) * 6, map=rows, a=argument)],
        shared=shared,
        early=argument.early > 0,
    )


def many_tokens(call: Call) -> None:
    """Queries are packed first; then each block scores its rows for a chunk of tokens."""
    q, k = call["q"], call["k"]
    _, n_head, n_tokens, n3 = q.ne
    heads = _heads(n_head)
    groups, blocks = n_head // heads, blocks_for(k.ne[1], 2 * TILE * MORE)
    shared = STAGES * _stage(heads)
    if k.dtype.block > 1:
        shared = max(shared, MORE * 2 * TILE * RAW)
    if shared + 1024 > call.device.shared:
        return plain(call)
    chunk = max(1, min(CHUNK, n_tokens, n_tokens * blocks * n3 // (6 * FULL)))
    images = call.scratch(n3 * n_tokens * groups * _image(heads), ALIGNMENT)
    argument = _argument(call, images, chunk)
    half = "__nv_bfloat16" if k.dtype.name == "bf16" else "__half"
    call.launch(
        "indexer.cu",
        f"pack_queries<{half}, {heads}>",
        grid=(n_tokens, groups, n3),
        block=256,
        args=[argument],
    )
    call.launch(
        "indexer.cu",
        f"scores<{_type(k)}, {heads}, true>",
        grid=(blocks, blocks_for(n_tokens, chunk), n3),
        block=128 * MORE,
        args=[argument],
        shared=shared,
    )


def plain(call: Call) -> None:
    """Any type and any strides, in f32."""
    q, k = call["q"], call["k"]
    d, _, n_tokens, n3 = q.ne
    chunk = min(PLAIN_CHUNK, n_tokens)
    width = 4 if d % 4 == 0 and q.aligned(16) else 1
    call.launch(
        "indexer_any.cu",
        f"scores_any<{reader(k.dtype)}, {width}>",
        grid=(blocks_for(k.ne[1], 32), blocks_for(n_tokens, chunk), n3),
        block=256,
        args=[_argument(call, 0, chunk)],
        shared=32 * (d | 1) * 4,
    )


def _type(k: Operand) -> str:
    return C_TYPES.get(k.dtype.name, k.dtype.name)


def _argument(call: Call, images: int = 0, chunk: int = 1) -> Indexer:
    scaled = call.get(SCALED)
    q, k, w, out = call["q"], call["k"], scaled or call["weights"], call.out
    mask, kv_len = call.get("mask") or ABSENT, call.get("kv_len") or ABSENT
    return Indexer(
        q=q.ptr,
        k=k.ptr,
        w=w.ptr,
        mask=mask.ptr,
        kv_len=kv_len.ptr,
        out=out.ptr,
        images=images,
        nb_q=q.nb[1:],
        nb_k=(k.nb[1], k.nb[3]),
        nb_w=(*w.nb[:2], w.nb[3]),
        nb_mask=(mask.nb[1], mask.nb[3]),
        nb_out=(out.nb[1], out.nb[3]),
        d=q.ne[0],
        heads=q.ne[1],
        n_tokens=q.ne[2],
        n_kv=k.ne[1],
        mask_batch=mask.ne[3],
        chunk=chunk,
        early=early_reads(call.awaited, {"q", "weights", SCALED}),
        scale=1.0 if scaled is None else call.node["weights"].attrs["s"],
    )
