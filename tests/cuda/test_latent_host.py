"""The kernels of latent attention for few rows, run on the host against the oracle.

In each of the shapes that shared memory may allow a block, with NaN in hidden rows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cuda.attention import flash
from pyggml.backends.cuda.attention.routes import LATENT_SPLIT, Shape
from pyggml.backends.cuda.gpu import H200, Device
from pyggml.backends.cuda.launch import Call, Launch, Operand
from pyggml.backends.cuda.table import ALIGNMENT, KERNELS
from pyggml.node import Node
from pyggml.parity import oracle, tolerance
from pyggml.parity.case import Built, Case, build
from pyggml.parity.cases import expand
from tests.cuda.emulated import Memory, host_maps, run, starter

#: GPUs by the shared memory of a block.
A100 = replace(H200, arch="80", shared=166_912)
SMALL = replace(H200, arch="89", shared=101_376)

#: Rows that fill no block, tiles that are not full, one tile and many, a list without a seen row.
CASES = """
flash_attn_ext(f32[576,1,16], {f16|q8_0}[576,{1|200}], $1[512,$2]=1+0, scale=0.05, lse=True)
flash_attn_ext(f32[576,1,16], f16[576,9000], f16[512,9000]=1+64, scale=0.05)
flash_attn_ext(f32[512,1,5], {f16|q8_0|bf16}[512,300], $1[512,300]=1+0, scale=0.2, logit_softcap=4.0)
flash_attn_ext(f32[576,3,5], {f16|q8_0}[576,150]~holed, $1[512,150]=1+64, f16[150,3]~holes, f32[5], scale=0.05, lse=True)
flash_attn_ext(f32[576,1,16], bf16[576,150]~ended, bf16[512,150]=1+0, -, -, i32[1]#75, scale=0.05)
flash_attn_ext(f32[576,1,20,2], {f16|q8_0}[576,230,1,2]~ended, $1[512,230,1,2]=1+0, f16[230,1,1,2]~mask, -, i32[1]#115, i32[{1|70|200},1,1,2]!230-, scale=0.05, lse=True)
flash_attn_ext(f32[512,2,32], bf16[512,90]~holed, bf16[512,90]=1+0, f16[90,2]~holes, -, -, i32[80,2]!90-, scale=0.05, max_bias=8.0)
flash_attn_ext(f32[512,67,3], f16[512,200]~holed, f16[512,200]=1+0, f16[200,67]~holes, -, -, i32[190,67]!200-, scale=0.1)
flash_attn_ext(f32[576,1,16], f16[576,150]~past7, f16[512,150]=1+0, -, -, i32[1]#0, i32[70,1]!150, scale=0.05, lse=True)
"""  # noqa: E501
#: One token of many heads on 9.0.
TOKEN = """
flash_attn_ext(f32[{576|512},1,128], f16[$1,300]~holed, f16[512,300]=1+0, f16[300,1]~holes, {-|f32[128]}, -, i32[{1|130|290},1]!300-, scale=0.05, lse=True)
flash_attn_ext(f32[576,1,128,2], f16[576,230,1,2]~ended, f16[512,230,1,2]=1+64, f16[230,1,1,2]~mask, -, i32[1]#115, i32[200,1,1,2]!230-, scale=0.05)
flash_attn_ext(f32[576,1,150], f16[576,3500]~holed, f16[512,3500]=1+0, f16[3500,1]~holes, -, -, i32[3400,1]!3500-, scale=0.05)
flash_attn_ext(f32[576,2,128], f16[576,3500]~past7, f16[512,3500]=1+0, -, -, i32[1]#0, i32[70,2]!150, scale=0.05, lse=True)
"""  # noqa: E501
#: Only where tensor cores of 9.0 do not take them.
MORE = """
flash_attn_ext(f32[576,3,16], f16[576,150]~holed, f16[512,150]=1+0, f16[150,3]~holes, -, -, scale=0.05)
"""  # noqa: E501


#: Those that the tensor cores of 9.0 take: whole pairs of tiles or not, one tile, splits without
#: keys, blocks of several queries.
HOPPER = """
flash_attn_ext(f32[576,1,20], f16[576,{1|64|65|200}], f16[512,$1]=1+{0|64}, scale=0.05, lse=True)
flash_attn_ext(f32[512,3,30], {f16|bf16}[512,{130|600}], $1[512,$2]=1+0, scale=0.2, logit_softcap=4.0)
flash_attn_ext(f32[576,2,40], f16[576,450]~holed, f16[512,450]=1+64, f16[450,2]~holes, f32[40], scale=0.05, lse=True)
flash_attn_ext(f32[576,1,70], bf16[576,350]~ended, bf16[512,350]=1+0, -, -, i32[1]#175, scale=0.05)
flash_attn_ext(f32[512,67,3], f16[512,400]~holed, f16[512,400]=1+0, f16[400,67]~holes, scale=0.1, max_bias=8.0)
flash_attn_ext(f32[576,1,128,2], f16[576,170,1,2], f16[512,170,1,2]=1+0, -, -, i32[1]#0, scale=0.05, lse=True)
"""  # noqa: E501


#: Lists of prompts of many heads on 9.0: hidden keys, an odd tile, no keys, blocks with empty rows.
LISTS = """
flash_attn_ext(f32[{576|512},4,128], f16[$1,300]~holed, f16[512,300]=1+0, f16[300,4]~holes, {-|f32[128]}, -, i32[{1|150},4]!300-, scale=0.05, lse=True)
flash_attn_ext(f32[576,8,20], bf16[576,350]~ended, bf16[512,350]=1+64, f16[350,8]~mask, -, i32[1]#175, i32[290,8]!350-, scale=0.05, max_bias=8.0)
flash_attn_ext(f32[512,8,40], f16[512,150]~past7, f16[512,150]=1+0, -, -, i32[1]#0, i32[70,8]!150, scale=0.05, logit_softcap=4.0, lse=True)
"""  # noqa: E501


class Recorded:
    """A case with its launches and its result."""

    def __init__(self, case: Case, device: Device) -> None:
        self.case, self.graph = case, build(case)
        self.node = node = self.graph.node
        row = KERNELS[node.op]
        assert row.scratch is not None
        need = row.scratch(node)
        self.scratch = Memory(need + ALIGNMENT)
        self.out = Memory(node.spec.nbytes)
        operands = {
            name: operand(self.graph, n) for name in node.op.operands if (n := node.get(name))
        }
        result = Operand(self.out.ptr, node.ne, node.nb, node.dtype)
        self.call = Call(node, result, operands, node.attrs, device, (self.scratch.ptr, need))
        with host_maps():
            row.run(self.call)
        self.launches = [r for r in self.call.records if isinstance(r, Launch)]
        self.bound = case.bound(node, row.numeric(node))

    def check(self, start: Any) -> None:
        for launch in self.launches:
            start(launch)
        values = self.out.data[: self.node.spec.nbytes].view(np.float32)
        values = values.reshape(self.node.ne[::-1])
        expected = oracle.run(self.case.op, self.graph.values, **self.case.attrs)
        comparison = tolerance.within(values.astype(np.float64), expected, self.bound)
        assert comparison, f"{self.launches[0].name} {self.case}: {comparison}"


def operand(graph: Built, n: Node) -> Operand:
    if n.op.view is None:
        values = {**graph.inputs, **graph.states}[n.attrs["name"]]
        return Operand(values.ctypes.data, n.ne, n.nb, n.dtype)
    assert n.src[0] is not None
    source = operand(graph, n.src[0])
    place = n.op.view(n, source.nb)
    assert place is not None
    return Operand(source.ptr + place[0], n.ne, place[1], n.dtype)


@pytest.mark.parametrize("device", (H200, A100, SMALL), ids=("227KB", "163KB", "99KB"))
def test_latent_attention_is_right(device: Device, tmp_path: Path) -> None:
    table = CASES if device is H200 else CASES + MORE
    cases = [case for case in expand(table) if not case.means]
    recorded = list(map(partial(Recorded, device=device), cases))
    launches = [launch for each in recorded for launch in each.launches]
    names = {launch.name for launch in launches}
    assert any(name.startswith("latent<") for name in names)
    others = "any<", "latent_hopper<", "latent_pairs<", "list_hopper<"
    assert not any(name.startswith(others) for name in names)
    start = starter(tmp_path, launches)
    for each in recorded:
        each.check(start)


@pytest.mark.parametrize("early", range(3))
def test_a_token_of_many_heads_is_right(early: int, tmp_path: Path, monkeypatch: Any) -> None:
    """With products of warpgroups, where a block reads nothing, queries or all before the wait."""
    monkeypatch.setattr(flash.Recording, "_early", lambda self: early)
    recorded = [Recorded(case, H200) for case in expand(TOKEN) if not case.means]
    launches = [launch for each in recorded for launch in each.launches]
    names = {launch.name for launch in launches}
    assert names == {"list_token<576>", "list_token<512>", "list_combine"}
    start = starter(tmp_path, launches)
    for each in recorded:
        each.check(start)


def test_lists_of_prompts_are_right(tmp_path: Path) -> None:
    recorded = [Recorded(case, H200) for case in expand(LISTS) if not case.means]
    launches = [launch for each in recorded for launch in each.launches]
    kernels = {launch.name.partition("<")[0] for launch in launches}
    assert {"list_hopper"} <= kernels <= {"list_hopper", "combine"}
    start = starter(tmp_path, launches)
    for each in recorded:
        each.check(start)


def test_every_shape_is_run() -> None:
    """The shapes of blocks that the table has, of those that some GPU may take."""
    names = set()
    for device in (H200, A100, SMALL):
        for case in expand(CASES if device is H200 else CASES + MORE):
            if not case.means:
                names |= {r.name for r in Recorded(case, device).launches if "latent<" in r.name}
    shapes = {tuple(map(int, name.split(", ")[2:6])) for name in names}
    assert shapes >= set(LATENT_SPLIT[16]) and shapes & set(LATENT_SPLIT[64])


@pytest.mark.parametrize("kernel", ("latent_hopper", "latent_pairs"))
def test_tensor_cores_of_9_are_right(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shape, "long", kernel == "latent_pairs")
    recorded = [Recorded(case, H200) for case in expand(HOPPER)]
    launches = [launch for each in recorded for launch in each.launches]
    names = {launch.name for launch in launches} - {"combine<4>"}
    assert {name.partition("<")[0] for name in names} == {kernel, "survey"}
    start = starter(tmp_path, launches)
    for each in recorded:
        each.check(start)


def test_many_tiles_go_in_pairs() -> None:
    def name(n_q: int, n_kv: int, heads: int) -> str:
        q, k = gg.input("q", ne=(576, n_q, heads)), gg.input("k", "f16", ne=(576, n_kv))
        node = gg.flash_attn_ext(q, k, gg.view(k, ne=(512, n_kv)), scale=0.05)
        return Shape.of(node).instance("latent_hopper", H200.shared, False).name.partition("<")[0]

    assert name(1, 16384, 128) == name(4, 4096, 16) == name(64, 2048, 16) == "latent_hopper"
    assert name(1, 65536, 128) == name(2048, 2048, 16) == name(512, 4096, 16) == "latent_pairs"


@pytest.mark.parametrize("kernel", ("latent_hopper", "latent_pairs"))
def test_prompts_see_no_later_keys(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Causal masks, which the kernels compute from positions, with a window or without."""
    monkeypatch.setattr(Shape, "long", kernel == "latent_pairs")
    rng = np.random.default_rng(0)
    inputs = {
        "q": rng.standard_normal((20, 40, 576), np.float32),
        "k": rng.standard_normal((1, 300, 576), np.float32).astype(np.float16),
        "pos": np.arange(150, 190),
    }
    inputs["k"][:, 190:] = np.nan
    q, k = gg.input("q", ne=(576, 40, 20)), gg.input("k", "f16", ne=(576, 300, 1))
    pos = gg.input("pos", "i32", ne=(40,))
    v = gg.view(k, ne=(512, 300, 1))
    outputs = {
        f"window {window}": gg.flash_attn_ext(
            q, k, v, gg.causal_mask(pos, n_kv=300, window=window), scale=0.05
        )
        for window in (None, 70)
    }
    expected = gg.compile(outputs, backends=["numpy"]).run(inputs)
    for name, y in run(outputs, inputs, tmp_path).items():
        assert np.linalg.norm(y - expected[name]) < 2e-3 * np.linalg.norm(expected[name]), name
