"""The plain attention kernel, compiled for the host, against the oracle.

It runs thread by thread, with NaN in hidden keys, split keys of any row length, and positions at
the ends of int32.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cuda.device.compiler import KERNELS
from pyggml.backends.cuda.launch import Call, Launch, Operand
from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.backends.cuda.table import KERNELS as TABLE
from pyggml.backends.cuda.weights import grids
from pyggml.node import Node
from pyggml.parity import oracle, tolerance
from pyggml.parity.case import Case, build
from tests.cuda.host import libraries

HERE = Path(__file__).parent


def _path(name: str) -> Path:
    return KERNELS / "include" / name if name.endswith(".cuh") else KERNELS / name


def kernel_source(name: str) -> str:
    """A kernel file as C++ for the host, without its includes."""
    text = re.sub(r"#include.*", "", _path(name).read_text())
    text = re.sub(r"extern __shared__ __align__\(\d+\) (\w+) memory\[\];", r"", text)
    return text.replace("#pragma once", "")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    parts = [(HERE / name).read_text() for name in ("block.hpp", "host.hpp", "attention_words.hpp")]
    blocks = ("common.cuh", "fields.cuh", "iq.cuh", "blocks.cuh")
    files = (*blocks, "attention.cuh", "attention_any.cu", "attention_combine.cu")
    parts += [grids.header().replace("#pragma once", "")]
    parts += [kernel_source(name) for name in files]
    text = "\n".join([*parts, (HERE / "attention.cpp").read_text()])
    (library,) = libraries(tmp_path_factory.mktemp("attention"), {"attention": text}, "-O1")
    return library


def on_host(library: Any, node: Node, arrays: list[Any], out: Any) -> None:
    """Run the launches that the backend records for a node on NumPy arrays."""

    def operand(n: Node, array: Any) -> Operand:
        return Operand(array.ctypes.data, n.ne, n.nb, n.dtype)

    row = TABLE[node.op]
    assert row.scratch is not None
    need = row.scratch(node)
    scratch = np.full(need + ALIGNMENT, 0xFF, np.uint8)
    ptr = scratch.ctypes.data + -scratch.ctypes.data % ALIGNMENT
    operands = {
        name: operand(node[name], array)
        for name, array in zip(node.op.operands, arrays)
        if array is not None
    }
    call = Call(node, operand(node, out), operands, node.attrs, scratch=(ptr, need))
    row.run(call)
    launches = [record for record in call.records if isinstance(record, Launch)]
    grids = {launch.name.partition("<")[0]: launch.grid for launch in launches}
    names = ("any<64, 32, false>", "any<64, 32, true>", "combine<1>", "combine<4>")
    assert launches[-1].name in names
    argument = ctypes.create_string_buffer(launches[0].args)
    assert library.attention_size() == len(launches[0].args)
    triples = [
        (ctypes.c_int * 3)(*grids.get(name, (0, 0, 0))) for name in ("any", "survey", "combine")
    ]
    library.attention(argument, *triples)


@pytest.mark.parametrize(
    "text",
    [
        *(
            f"flash_attn_ext(f32[{d},7,2], {cache}[{d},150,1]~{fill}, {cache}[{d},150,1]~{fill}, "
            f"{mask}, -, {length}, scale=0.2, prec='f32'{more})"
            for d, cache in ((40, "f32"), (24, "f16"), (32, "q8_0"), (64, "bf16"), (32, "q4_1"))
            for fill, mask, length, more in (
                ("holed", "f16[150,7]~holes", "-", ", lse=True"),
                ("holed", "f16[150,7]~holes", "-", ", max_bias=8.0, logit_softcap=4.0"),
                ("ended", "-", "i32[1]#75", ", lse=True"),
                ("ended", "f16[150,7]~mask", "i32[1]#75", ""),
            )
        ),
        *(
            f"flash_attn_ext(f32[32,{n},1], {cache}[32,{keys},1], {cache}[{d_v},{keys},1], -, "
            f"{sinks}, scale=0.2, prec='f32', lse={lse})"
            for cache in ("f32", "f16")
            for d_v in (1, 5)
            for n, keys in ((1, 300), (3, 321))
            for sinks in ("-", "f32[1]")
            for lse in (True, False)
        ),
        "flash_attn_ext(f32[32,3,1], f32[32,9,1], f32[32,9,1], -, -, i32[1]#-2147483648, "
        "scale=0.2, prec='f32', kv0=8)",
        *(  # lists: heads that fill no block, negative ids, NaN in hidden rows
            f"flash_attn_ext(f32[40,3,{heads},2], {cache}[40,150,{heads_kv},2]~{fill}, "
            f"{cache}[24,150,{heads_kv},2]~{fill}, {mask}, {sinks}, {length}, "
            f"i32[{n_ids},3,1,2]!150-, scale=0.2, prec='f32', lse=True{more})"
            for heads, heads_kv, n_ids in ((1, 1, 33), (16, 1, 1), (34, 2, 150))
            for cache, fill, mask, sinks, length, more in (
                ("f16", "holed", "f16[150,5]~holes", "-", "-", ", max_bias=8.0"),
                ("f32", "ended", "-", f"f32[{heads}]", "i32[1]#75", ", logit_softcap=4.0"),
                ("bf16", "ended", "f16[150,3,1,2]~mask", "-", "i32[1]#79", ", kv0=4"),
            )
        ),
    ],
)
def test_the_kernel_is_right(text: str, library: Any) -> None:
    case = Case.parse(text)
    graph = build(case)
    leaves = {**graph.inputs, **graph.states}
    arrays = [None if n is None else leaves[f"s{i}"] for i, n in enumerate(graph.node.src)]
    out = np.zeros(graph.node.ne[::-1], np.float32)
    on_host(library, graph.node, arrays, out)
    expected = oracle.run(case.op, graph.values, **case.attrs)
    result = tolerance.within(out.astype(np.float64), expected, 1e-10)
    assert result, f"{case}: {result}"


def test_positions_at_the_ends(library: Any) -> None:
    """Positions in place of a mask, as in the fused step."""
    from pyggml.backends.cuda.attention.flash import flash_attn_causal

    rng = np.random.default_rng(0)
    n_kv, pos = 100, np.array([-(2**31), -1, 0, 50, 99, 100, 2**31 - 1, 2**31 - 40], "i4")
    q = rng.standard_normal((2, len(pos), 32)).astype("f4")
    k, v = rng.standard_normal((2, 1, n_kv, 32)).astype("f4")
    k[:, 60], v[:, 60:63] = np.inf, np.nan
    windows = ((window, 1) for window in (None, 1, 30, 2**31 - 1, 2**31, 2**40))
    for window, stride in (*windows, (None, 2), (None, 7), (None, 2**24)):
        nodes = [gg.input(name, ne=x.shape[::-1]) for name, x in (("q", q), ("k", k), ("v", v))]
        at = gg.input("pos", "i32", ne=pos.shape)
        mask = gg.causal_mask(at, n_kv=n_kv, window=window, stride=stride)
        node = gg.flash_attn_ext(*nodes, mask, scale=0.2, prec="f32")
        sources = zip(("q", "k", "v", "pos"), (*nodes, at), (q, k, v, pos))
        operands = {name: Operand(x.ctypes.data, n.ne, n.nb, n.dtype) for name, n, x in sources}
        out = np.zeros(node.ne[2::-1], np.float32)
        result = Operand(out.ctypes.data, node.ne, node.nb, node.dtype)
        scratch = np.full(1 << 20, 0xFF, np.uint8)
        call = Call(
            node, result, operands, node.attrs,
            scratch=(scratch.ctypes.data + -scratch.ctypes.data % 16, (1 << 20) - 16),
        )  # fmt: skip
        flash_attn_causal(call, window, stride)
        launches = {launch.name.partition("<")[0]: launch for launch in call.records}
        grids = [
            (ctypes.c_int * 3)(*(launches[name].grid if name in launches else (0, 0, 0)))
            for name in ("any", "survey", "combine")
        ]
        library.attention(ctypes.create_string_buffer(launches["any"].args), *grids)
        hidden = oracle.run(
            "causal_mask",
            [pos[None, None, None].astype("i8")],
            n_kv=n_kv,
            window=window,
            stride=stride,
        )
        expected = oracle.run(
            "flash_attn_ext", [x[None].astype("f8") for x in (q, k, v)] + [hidden], scale=0.2
        )
        assert tolerance.within(out.astype("f8"), expected[0], 1e-10), (window, stride)
