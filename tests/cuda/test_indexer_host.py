"""The kernels of lightning_indexer, compiled for the host, against the oracle.

They run thread by thread, with the products of 8.0. NaN is in rows that were never written.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cuda import indexer
from pyggml.backends.cuda.device.compiler import KERNELS
from pyggml.backends.cuda.gpu import H200, Device
from pyggml.backends.cuda.launch import Call, Launch, Operand
from pyggml.backends.cuda.table import ALIGNMENT
from pyggml.backends.cuda.table import KERNELS as TABLE
from pyggml.backends.cuda.weights import grids
from pyggml.node import Node
from pyggml.parity import oracle, tolerance
from pyggml.parity.case import Case, build
from pyggml.parity.cases import expand
from tests.cuda.emulated import host_map
from tests.cuda.host import libraries

HERE = Path(__file__).parent
HEADERS = ("common.cuh", "fields.cuh", "iq.cuh", "blocks.cuh", "indexer.cuh")
PRODUCTS = ("attention_q8_0.cuh", "linear_mma.cuh")


def kernel(name: str) -> str:
    """C++ that runs the instance `name` if a launch asks for it."""
    return f'if (name == "{name}") return launch(grid, threads, [=] {{ {name}(a); }}, shared), 0;\n'


def entry(names: list[str], argument: str) -> str:
    return f"""
extern "C" int run(const char* kernel, int x, int y, int z, int threads, int shared,
                   const {argument}& argument) {{
    const std::string name(kernel);
    const Dim3 grid = {{x, y, z}};
    const {argument} a = argument;
    {"".join(map(kernel, names))}
    return 1;
}}"""


def source(names: tuple[str, ...], instances: list[str], argument: str = "Indexer") -> str:
    words = ("block.hpp", "host.hpp", "attention_words.hpp", "mma.hpp")
    parts = [(HERE / name).read_text() for name in words]
    parts += ["#include <string>\n", grids.header()]
    for name in names:
        path = KERNELS / "include" / name if name.endswith(".cuh") else KERNELS / name
        parts.append(path.read_text())
    text = re.sub(r'#include ".*|#include <cuda.*|#pragma once', "", "\n".join(parts))
    text = re.sub(r'asm\("max\.NaN.*?\);', "y = x != x ? x : max(x, 0.0f);", text)
    memory = r"\1* \2 = (\1*)block->memory.data();"
    text = re.sub(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];", memory, text)
    return text.replace("alignas(16) static float memory[1 << 16];", "") + entry(
        instances, argument
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """File -> its kernels."""
    types, many = ("__half", "__nv_bfloat16", "q8_0"), ("false", "true")
    products = [f"scores<{k}, {n}, {more}>" for k in types for n in (32, 64) for more in many]
    products += [f"pack_queries<{k}, {n}>" for k in types[:2] for n in (32, 64)]
    tokens = [f"scores_token<{k}, {n}>" for k in types[:2] for n in (32, 64)]
    types = (*(f"Plain<{t}>" for t in ("float", "__half", "__nv_bfloat16")), "q8_0", "q4_1")
    plain = [f"scores_any<{k}, {n}>" for k in types for n in (1, 4)]
    texts = {
        "indexer": source((*HEADERS, *PRODUCTS, "indexer.cu"), products).replace(
            "struct q8_0;\n", "using file::q8_0;\n"
        ),
        "indexer_token": "#define __CUDA_ARCH_FEAT_SM90_ALL\n"
        + source((*HEADERS, "indexer_token.cu"), tokens, "TokenIndexer"),
        "indexer_any": source((*HEADERS, "indexer_any.cu"), plain),
    }
    names = (f"{name}.cu" for name in texts)
    return dict(zip(names, libraries(tmp_path_factory.mktemp("indexer"), texts, "-O1")))


CASES = """
lightning_indexer(f32[128,32,1], {f16|bf16|q8_0}[128,{1|64|150}], f32[32])
lightning_indexer(f32[128,64,1,2], {f16|q8_0}[128,70,1,2]@wide, f32[64,1,1,2], f16[70,1]~mask)
lightning_indexer(f32[128,128,1], f16[128,70]~past18, f32[128,1], -, i32[1]#18)
lightning_indexer(f32[128,32,3], {f16|bf16|q8_0}[128,{130|400}], f32[32,3], f16[$2,3]~causal)
lightning_indexer(f32[128,64,2], q8_0[128,70], f32[64,2], f16[70,2]~mask, i32[1]#50)
lightning_indexer(f32[128,64,5,2]@p0213, f16[128,70,1,2]@wide, f32[64,5,1,2], f16[70,6,1,2]~mask@wide)
lightning_indexer(f32[128,192,3], f16[128,300]~holed, f32[192,3], f16[300,3]~mask)
lightning_indexer(f32[128,32,1], f16[128,1300]~past1290, f32[32], -, i32[1]#1290)
lightning_indexer(f32[40,{1|11},3], {f32|f16|bf16}[40,70], f32[$1,3], f16[70,3]~mask)
lightning_indexer(f32[31,5,9], f32[31,{30|31}]~nan5, f32[5,9]@inner, f16[$1,9]~mask)
lightning_indexer(f32[64,33,3], {q8_0|q4_1}[64,37]~past18, f32[33,3], -, i32[1]#18)
"""  # noqa: E501


#: The same kernels without the copy engine.
A100 = replace(H200, arch="80", shared=166_912)
#: One block has more tiles than buffers.
SMALL = replace(H200, sms=1)


@pytest.mark.parametrize("by", (1, -0.37), ids=("", "scaled"))
@pytest.mark.parametrize("device", (H200, SMALL, A100), ids=("90a", "small", "80"))
@pytest.mark.parametrize("case", [c for c in expand(CASES) if not c.means], ids=str)
def test_scores_are_right(
    case: Case,
    device: Device,
    by: float,
    compiled: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(indexer, "tensor_map", host_map)
    graph = build(case)
    node, leaves = graph.node, {**graph.inputs, **graph.states}
    out = np.full(node.ne[::-1], 7, np.float32)

    def operand(n: Node) -> Operand:
        if n.op.view is None:
            return Operand(leaves[n.attrs["name"]].ctypes.data, n.ne, n.nb, n.dtype)
        assert n.src[0] is not None
        source = operand(n.src[0])
        place = n.op.view(n, source.nb)
        assert place is not None
        return Operand(source.ptr + place[0], n.ne, place[1], n.dtype)

    row = TABLE[node.op]
    assert row.scratch is not None
    need = row.scratch(node)
    scratch = np.full(need + ALIGNMENT, 0xFF, np.uint8)
    ptr = scratch.ctypes.data + -scratch.ctypes.data % ALIGNMENT
    operands = {name: operand(n) for name in node.op.operands if (n := node.get(name))}
    values = list(graph.values)
    if by != 1:  # as `scaled_weights` does
        operands[indexer.SCALED] = operands.pop("weights")
        sources = {name: n for name in node.op.operands if (n := node.get(name))}
        sources["weights"] = gg.scale(sources["weights"], s=by)
        node, values[2] = gg.lightning_indexer(**sources), by * values[2]
    result = Operand(out.ctypes.data, node.ne, node.nb, node.dtype)
    call = Call(node, result, operands, node.attrs, device, scratch=(ptr, need))
    row.run(call)
    for launch in call.records:
        assert isinstance(launch, Launch)
        token = launch.file == "indexer_token.cu"
        kind = indexer.TokenIndexer if token else indexer.Indexer
        argument = kind.from_buffer_copy(launch.args)
        status = compiled[launch.file].run(
            launch.name.encode(),
            *launch.grid,
            launch.block[0],
            launch.shared,
            ctypes.byref(argument),
        )
        assert status == 0, launch.name
    expected = oracle.run(case.op, values, **case.attrs)
    bound = case.bound(node, row.numeric(node))
    comparison = tolerance.within(out.astype(np.float64), expected, bound)
    assert comparison, f"{launch.name}: {comparison}"
