"""The kernel of flash_attn_ext depends on the shared memory of the GPU. Needs no GPU."""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

import pyggml as gg
from pyggml.backends.cuda.attention import routes
from pyggml.backends.cuda.device import compiler
from pyggml.backends.cuda.gpu import H200, Device
from pyggml.backends.cuda.launch import Call, Launch, Operand
from pyggml.backends.cuda.table import KERNELS
from tools.compile_kernels import instances

FOLDER = Path(routes.__file__).parent.parent / "kernels"
DEVICES = {
    "80": replace(H200, arch="80", shared=166_912),
    "86": replace(H200, arch="86", shared=101_376),
    "89": replace(H200, arch="89", shared=101_376),
    "90a": H200,
    "120a": replace(H200, arch="120a", shared=101_376),
}
#: Names of the instances compiled ahead, by architecture.
AHEAD = {
    arch: {
        instance.name
        for instance in instances(
            [
                FOLDER / f"attention_{name}.cu"
                for name in ("split", "latent", "list_token", "list_hopper")
            ]
        )
        if not instance.archs or arch in instance.archs
    }
    for arch in DEVICES
}


def launches_of(node: gg.Node, device: Device) -> list[Launch]:
    operands, base = {}, 1 << 40
    for name, i in node.op.operands.items():
        if (s := node.get(name)) is not None:
            operands[name] = Operand(base * (i + 2), s.ne, s.nb, s.dtype)
    if node["v"].op.view is not None:
        k, v = operands["k"], operands["v"]
        operands["v"] = replace(v, ptr=k.ptr, nb=k.nb)
    row = KERNELS[node.op]
    assert row.scratch is not None
    out = Operand(base, node.ne, node.nb, node.dtype)
    call = Call(node, out, operands, node.attrs, device, (base, row.scratch(node)))
    row.run(call)
    return [r for r in call.records if isinstance(r, Launch)]


def attention(
    pair: tuple[int, int],
    cache: str,
    n_q: int,
    heads: int,
    heads_kv: int,
    n_kv: int = 4096,
    n_ids: int = 0,
) -> gg.Node:
    d_k, d_v = pair
    q = gg.input("q", "f32", ne=(d_k, n_q, heads))
    k = gg.state("k", cache, ne=(d_k, n_kv, heads_kv))
    inside = pair in routes.LATENT
    v = (
        gg.view(k, ne=(d_v, n_kv, heads_kv))
        if inside
        else gg.state("v", cache, ne=(d_v, *k.ne[1:]))
    )
    ids = gg.input("ids", "i32", ne=(n_ids, n_q)) if n_ids else None
    return gg.flash_attn_ext(q, k, v, ids=ids, scale=0.1)


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize(
    ("pair", "cache"),
    [
        (pair, cache)
        for pair in (*routes.PAIRS, *routes.LATENT)
        for cache in ("f16", "bf16", "q8_0")
        if cache != "q8_0" or pair not in ((80, 80), (96, 96))  # no kernel on the tensor cores
    ],
)
def test_few_queries_split_their_keys_on_every_gpu(
    arch: str, cache: str, pair: tuple[int, int]
) -> None:
    """Their kernel is compiled ahead and fits into the shared memory of the GPU."""
    device, latent = DEVICES[arch], pair in routes.LATENT
    shapes = [(1, 16, 1), (1, 128, 1)] if latent else [(1, 16, 16), (2, 32, 4)]
    for n_q, heads, heads_kv in shapes[: 1 if latent and arch == "90a" else 2]:  # wgmma for 128
        first, last = launches_of(attention(pair, cache, n_q, heads, heads_kv), device)
        assert last.name.startswith("combine<")
        assert first.name.startswith("latent<" if latent else "split<")
        assert first.name in AHEAD[arch]
        assert first.shared <= routes.room_of("latent" if latent else "split", device)
        numbers = [int(n) for n in re.findall(r"\b\d+\b", first.name)]
        rows, threads = _latent(numbers) if latent else (16, 32 * numbers[2])
        assert prod(first.block) == threads
        assert first.grid[1] == -(-n_q * heads // heads_kv // rows) and first.grid[0] > 1


@pytest.mark.parametrize("arch", DEVICES)
@pytest.mark.parametrize("cache", ["f16", "bf16", "q8_0"])
@pytest.mark.parametrize("pair", routes.LATENT)
def test_lists_fit_every_gpu(arch: str, cache: str, pair: tuple[int, int]) -> None:
    """Their kernels are compiled ahead and fit into the shared memory of the GPU."""
    device = DEVICES[arch]
    for n_q, heads in ((1, 16), (1, 128), (300, 16), (300, 128)):
        launches = launches_of(attention(pair, cache, n_q, heads, 1, n_ids=2048), device)
        files = {
            f"attention_{route}.cu": route for route in ("latent", "list_hopper", "list_token")
        }
        (launch,) = (r for r in launches if r.file in files and r.name != "list_combine")
        assert launch.name in AHEAD[arch]
        route = files[launch.file]
        assert launch.shared <= routes.room_of(route, device)
        token = arch == "90a" and cache == "f16" and (n_q, heads) == (1, 128)
        assert (route == "list_token") == token
        assert (route == "list_hopper") == (arch == "90a" and (n_q, heads) == (300, 128))


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("file", "instance"),
    [
        ("latent", "latent<__half, 576, 2, 2, 4, 64, false, true>"),
        ("joint", "joint<__half, 512, 1, 1, 8, 64, false>"),
        ("list_token", "list_token<576>"),
    ],
)
def test_variables_in_shared_memory_fit_beside_the_rest(file: str, instance: str) -> None:
    cubin = compiler.compile_instance(f"attention_{file}.cu", instance, "90a")
    route = file if file == "list_token" else "latent"
    assert cubin.shared <= H200.shared - routes.room_of(route, H200)


def _latent(numbers: list[int]) -> tuple[int, int]:
    """Rows and threads of a block of `latent`."""
    _, mi, wm, wn, _ = numbers
    return 16 * mi * wm, 32 * wm * wn


@pytest.mark.parametrize(
    ("pair", "raw"),
    [*((pair, False) for pair in routes.SPLIT), *((pair, True) for pair in routes.HOPPER)],
)
def test_shared_memory_has_the_layout_of_the_kernel(pair: tuple[int, int], raw: bool) -> None:
    """As in SplitShape of attention_split.cu. At the end, the warps' sums reuse the memory."""
    d_k, d_v = pair
    node = attention(pair, "q8_0" if raw else "f16", 1, 4, 4)
    for warps, stages in routes.SPLIT[pair]:
        tile = 16 * (d_k * 2 + 16 + d_v * 2 + 16)
        stage = -(-16 * (d_k // 32 * 34 + d_v // 32 * 34) // 16) * 16 if raw else tile
        ring = stages * stage + raw * tile
        instance = routes.Shape.of(node)._split(warps, stages)
        assert instance.shared == warps * max(ring, 16 * (d_v + 4) * 4)
        assert instance.shared >= 16 * (d_k * 2 + 16), "the queries are loaded through it"


def test_keys_are_split_alike_on_every_gpu() -> None:
    """The scratch for the parts is planned without a device."""
    for pair in (*routes.PAIRS, *routes.LATENT):
        node = attention(pair, "f16", 1, 16, 1 if pair in routes.LATENT else 16)
        assert len({launches_of(node, device)[0].grid[0] for device in DEVICES.values()}) == 1
