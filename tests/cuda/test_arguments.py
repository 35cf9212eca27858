"""Kernel arguments: the structs in Python have the layout of the structs in the kernels."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cuda import (
    compressor,
    hyper_norm,
    indexer,
    moe_routing,
    moe_token,
    norm,
    normed,
    peers,
    relay,
    rope,
    small,
    softmax,
    token_rows,
)
from pyggml.backends.cuda.argument import Struct, Tensor, pack
from pyggml.backends.cuda.attention import (
    absorb,
    arguments,
    combine_vec,
    joint,
    latent_row,
    parts,
)
from pyggml.backends.cuda.device import tensormap
from pyggml.backends.cuda.device.compiler import KERNELS
from pyggml.backends.cuda.linear import blocks, common, exact, halves, joined, ring
from pyggml.backends.cuda.weights import packing

HERE = Path(__file__).parent
#: Struct, the file that declares it, and its name there. Members come before their struct.
STRUCTS: tuple[tuple[type[Struct], str, str], ...] = (
    (Tensor, "include/common.cuh", "Tensor"),
    (packing.Packed, "include/formats.cuh", "Packed"),
    (rope.Rope, "include/rope.cuh", "Rope"),
    (softmax.Softmax, "softmax.cu", "Softmax"),
    (parts.Rows, "attention_combine.cu", "Rows"),
    (common.Heads, "include/linear_common.cuh", "Heads"),
    (common.Routing, "include/linear_common.cuh", "Routing"),
    (common.Columns, "include/linear_common.cuh", "Columns"),
    (halves.Places, "linear_prepare.cu", "Places"),
    (blocks.TileWeights, "include/formats.cuh", "Weights<InTiles>"),
    (blocks.RowWeights, "include/formats.cuh", "Weights<InRows>"),
    (exact.Exact, "linear_exact.cu", "Exact"),
    (tensormap.TensorMap, "include/mma.cuh", "TensorMap"),
    (arguments.Attention, "include/attention.cuh", "Attention"),
    (indexer.Indexer, "include/indexer.cuh", "Indexer"),
    (indexer.TokenIndexer, "indexer_token.cu", "TokenIndexer"),
    (arguments.HopperArgument, "attention_hopper.cu", "HopperArgument"),
    (arguments.LatentArgument, "attention_latent_hopper.cu", "LatentArgument"),
    (combine_vec.Values, "combine_vec.cu", "Values"),
    (joint.Joint, "attention_joint.cu", "Joint"),
    (joint.Parts, "attention_joint.cu", "Parts"),
    (compressor.Compressor, "include/compressor.cuh", "Compressor"),
    (token_rows.CachedRow, "token_rows.cu", "CachedRow"),
    (token_rows.NormedHeads, "token_rows.cu", "NormedHeads"),
    (token_rows.TurnedHeads, "token_rows.cu", "TurnedHeads"),
    (token_rows.TurnedRow, "token_rows.cu", "TurnedRow"),
    (token_rows.TokenRows, "token_rows.cu", "TokenRows"),
    (hyper_norm.Streams, "hyper_norm.cu", "Streams"),
    (hyper_norm.HyperNorm, "hyper_norm.cu", "HyperNorm"),
    (small.Instruction, "small.cu", "Instruction"),
    (small.Program, "small.cu", "Program"),
    (peers.Peers, "include/peers.cuh", "Peers"),
    (relay.KernelCrossing, "relay.cu", "Crossing"),
    (relay.Crossings, "relay.cu", "Crossings"),
    (joined.Joined, "linear_vec.cu", "Joined<InTiles>"),
    (ring.RingArgument, "linear_ring.cu", "RingArgument"),
    (latent_row.LatentRow, "include/latent_row.cuh", "LatentRow"),
    (absorb.Absorb, "absorb.cu", "Absorb"),
    (moe_routing.Route, "include/route.cuh", "Route"),
    (norm.Normed, "include/rms.cuh", "Normed"),
    (moe_token.Router, "moe_token.cu", "Router"),
    (moe_token.Candidates, "moe_token.cu", "Candidates"),
    (moe_token.Ahead, "moe_token.cu", "Ahead"),
    (moe_token.Gated, "moe_token.cu", "Gated"),
    (moe_token.Sums, "moe_token.cu", "Sums"),
    (normed.NormedRow, "include/normed.cuh", "NormedRow"),
    (peers.Round, "include/rounds.cuh", "Round"),
    (normed.SummedRow, "include/rounds.cuh", "SummedRow"),
    (moe_token.SentSums, "moe_token.cu", "SentSums"),
)
PRELUDE = """
#include <cstddef>
using u8 = unsigned char;
using u64 = unsigned long long;
struct float2 {
    float x, y;
};
constexpr int MOST_JOINED = 8, MOST_INSTRUCTIONS = 64, MOST_GPUS = 8, MOST_CROSSINGS = 8;
static const Dim3 blockIdx = {0, 0, 0};
"""
FORMATS = "struct InTiles { using Source = Packed; }; struct InRows { using Source = Tensor; };"


def declaration(file: str, name: str) -> str:
    """The declaration of a struct in the kernels' source."""
    name = name.partition("<")[0]
    text = (KERNELS / file).read_text()
    match = re.search(rf"^(template <[^>\n]*>\n)?struct {name} {{\n.*?^}};", text, re.M | re.S)
    assert match is not None, f"{file} declares no struct {name}"
    return match[0]


def numbers(struct: type[Struct], name: str) -> list[str]:
    """Size and alignment of a struct, offset and size of each field, as C++ expressions."""
    fields = [field for field, *_ in struct._fields_]
    each = [(f"offsetof({name}, {f})", f"sizeof((({name}*)0)->{f})") for f in fields]
    return [f"sizeof({name})", f"alignof({name})", *(x for pair in each for x in pair)]


def layout(struct: type[Struct]) -> list[int]:
    """The same numbers from ctypes."""
    fields = [getattr(struct, field) for field, *_ in struct._fields_]
    size, align = ctypes.sizeof(struct), ctypes.alignment(struct)
    return [size, align, *(x for field in fields for x in (field.offset, field.size))]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    compiler = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler here")
    declared = dict.fromkeys(declaration(file, name) for _, file, name in STRUCTS)
    body = "\n".join(declared) + f"\n{FORMATS}\n"
    for i, (struct, _, name) in enumerate(STRUCTS):
        body += (
            f'extern "C" const long long layout{i}[] = {{{", ".join(numbers(struct, name))}}};\n'
        )
    folder = tmp_path_factory.mktemp("arguments")
    source = folder / "arguments.cpp"
    source.write_text((HERE / "host.hpp").read_text() + PRELUDE + body)
    out = folder / "arguments.so"
    options = ["-std=c++17", "-w", "-shared", "-fPIC", source, "-o", out]
    result = subprocess.run([compiler, *options], capture_output=True, text=True)
    if "_Float16" in result.stderr:
        pytest.skip(f"{compiler} does not support _Float16")
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(out))


@pytest.mark.parametrize("number", range(len(STRUCTS)), ids=[name for *_, name in STRUCTS])
def test_a_struct_has_the_layout_of_the_kernels(number: int, library: Any) -> None:
    struct = STRUCTS[number][0]
    expected = layout(struct)
    assert list((ctypes.c_longlong * len(expected)).in_dll(library, f"layout{number}")) == expected


@pytest.mark.parametrize(("struct", "file", "name"), STRUCTS, ids=[name for *_, name in STRUCTS])
def test_a_struct_has_the_same_fields_in_order(struct: type[Struct], file: str, name: str) -> None:
    """Two swapped fields of equal size have the same layout, so names are compared."""
    members = declaration(file, name).partition("{")[2].removesuffix("};")
    members = re.sub(r"//.*", "", members)
    members = members.partition("__device__")[0].rpartition(";")[0]
    declared = [
        re.findall(r"\w+", re.sub(r"\[\w+\]", "", part))[-1] for part in re.split(r"[;,]", members)
    ]
    assert declared == [field for field, *_ in struct._fields_]


def every_struct() -> set[type[Struct]]:
    """All structs of the backend."""
    return {s for s in Struct.__subclasses__() if s.__module__.startswith("pyggml.")}


def test_no_struct_is_left_out() -> None:
    assert every_struct() == {struct for struct, *_ in STRUCTS}


def test_a_number_that_does_not_fit_is_an_error() -> None:
    """ctypes alone would truncate it."""
    for ne, nb in (((2**31, 1, 1, 1), (4, 4, 4, 4)), ((1, 1, 1, 1), (4, 4, 2**63, 4))):
        with pytest.raises(gg.PyggmlError, match=r"Tensor\.n[eb].* does not fit"):
            Tensor(data=1 << 40, nb=nb, ne=ne)
    with pytest.raises(gg.PyggmlError, match=r"Heads\.columns"):
        common.Heads(a2=1, r3=1, columns=-(2**31) - 1)


@pytest.mark.parametrize("fields", ({"a2": 1, "r3": 1}, {"a2": 1, "r3": 1, "column": 1}))
def test_every_field_is_required(fields: dict[str, int]) -> None:
    with pytest.raises(gg.PyggmlError, match="Heads takes a2, columns, r3; got"):
        common.Heads(**fields)


def test_arguments_are_aligned() -> None:
    heads = common.Heads(a2=1, r3=2, columns=3)
    packed = pack([np.int32(7), np.uint64(8), heads, np.int32(4), np.uint64(9)])
    words = np.frombuffer(packed, np.int32).tolist()
    assert words == [7, 0, 8, 0, 1, 2, 3, 4, 9, 0]


def test_an_argument_of_unknown_size_is_an_error() -> None:
    for value in (3, 2.0, b"12345678"):
        with pytest.raises(gg.PyggmlError, match="a kernel argument must be a NumPy scalar"):
            pack([value])  # type: ignore[list-item]
