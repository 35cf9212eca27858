"""Runs the launches of a plan on the host: kernels as C++, thread by thread, and cuBLAS's products.

For kernels of 8.0, with their tensor cores and asynchronous copies, and attention's for Hopper. A
launch is called with the packed arguments that the driver would get, so these are tested too.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray

import pyggml as gg
from pyggml.backends.cuda import indexer
from pyggml.backends.cuda.attention import flash
from pyggml.backends.cuda.device.compiler import KERNELS
from pyggml.backends.cuda.device.tensormap import TensorMap, steps_of
from pyggml.backends.cuda.gpu import H200, Device
from pyggml.backends.cuda.launch import Gemm, Launch, Memcpy
from pyggml.backends.cuda.linear import ring
from pyggml.backends.cuda.recording import record_step
from pyggml.backends.cuda.weights.packing import repack
from pyggml.backends.host_memory import Packed
from pyggml.backends.step import Address
from pyggml.ops.leaf import constant_op, data_of, state_op
from pyggml.runtime.execution import addresses
from tests.cuda.host import libraries, on_host

Arrays = Mapping[str, NDArray[Any]]


class Memory:
    """A block of the host's memory, at a multiple of 256 and filled with NaN."""

    def __init__(self, nbytes: int) -> None:
        self.block = np.full(nbytes + 256, 0xFF, np.uint8)
        start = -self.block.ctypes.data % 256
        self.data = self.block[start : start + nbytes]
        self.ptr = self.data.ctypes.data


def run(
    outputs: Mapping[str, gg.Node], inputs: Arrays, folder: Path, device: Device = H200
) -> dict[str, NDArray[Any]]:
    """The outputs of a graph, computed by the kernels of the CUDA backend."""
    (results,) = run_all([(outputs, inputs)], folder, device)
    return results


def run_all(
    graphs: Sequence[tuple[Mapping[str, gg.Node], Arrays]],
    folder: Path,
    device: Device = H200,
    amb: float | None = None,
) -> list[dict[str, NDArray[Any]]]:
    """The outputs of several graphs, whose kernels are compiled together."""
    planned = [_Planned(outputs, inputs, device, amb) for outputs, inputs in graphs]
    launches = [r for each in planned for r in each.records if isinstance(r, Launch)]
    start = starter(folder, launches)
    return [each.run(start) for each in planned]


def host_map(
    ptr: int,
    dtype: str,
    ne: Sequence[int],
    nb: Sequence[int],
    box: Sequence[int],
    swizzle: bool = True,
) -> TensorMap:
    """A tensor map as mma.hpp reads it."""
    size = {"f16": 2, "bf16": 2, "u32": 4}[dtype]
    assert all(0 < n <= 256 for n in box) and not box[0] * size % 16
    assert not any(x % 16 for x in (ptr, *steps_of(ne, nb)))
    assert not swizzle or box[0] * size <= 128
    return TensorMap(opaque=(ptr, size, int(swizzle), *ne, *nb[1:], *box, 0, 0))


@contextmanager
def host_maps() -> Iterator[None]:
    """Records launches with tensor maps as mma.hpp reads them."""
    with ExitStack() as maps:
        for module in (flash, indexer, ring):
            maps.enter_context(patch.object(module, "tensor_map", host_map))
        yield


class _Planned:
    """A graph with its memory and its launches."""

    def __init__(
        self,
        outputs: Mapping[str, gg.Node],
        inputs: Arrays,
        device: Device,
        amb: float | None = None,
    ) -> None:
        work = gg.compile(outputs, backends=["cuda:0:24GiB"], amb=amb)._work
        leaves = {}
        for leaf in work.leaves:
            layout = work.layouts.get(leaf)
            memory = Memory(layout.nbytes if layout else leaf.spec.nbytes)
            if leaf.op is constant_op:
                assert layout is not None
                data = data_of(leaf)
                data = repack(leaf, layout, data) if layout.name == "tiles8" else data
            elif leaf.op is state_op:
                data = np.zeros(leaf.spec.nbytes, np.uint8)
            else:
                data = np.ascontiguousarray(inputs[leaf.attrs["name"]], leaf.dtype.numpy)
            memory.data[: data.nbytes] = data.reshape(-1).view(np.uint8)
            leaves[leaf] = Address(memory, 0, leaf.spec.nb, layout.name if layout else "plain")
        self.arena = Memory(work.placed.arenas["cuda:0"].nbytes)
        self.at = addresses(work, leaves, {"cuda:0": self.arena})
        self.outputs = work.graph.outputs
        with host_maps():
            self.records = [
                record
                for step, offset in zip(work.steps, work.placed.scratch_at)
                for record in record_step(
                    step, self.at, (self.arena.ptr + offset, step.scratch), device
                )
            ]

    def run(self, start: Callable[[Launch], None]) -> dict[str, NDArray[Any]]:
        for record in self.records:
            if isinstance(record, Memcpy):
                ctypes.memmove(record.target, record.source, record.nbytes)
            elif isinstance(record, Gemm):
                multiply(record)
            else:
                start(record)
        return {name: _values(self.at[node], node) for name, node in self.outputs.items()}


def _values(at: Address, node: gg.Node) -> NDArray[Any]:
    assert node.contiguous and not isinstance(node, Packed)
    kind = node.dtype.numpy
    assert kind is not None
    offset = at.buffer.ptr + at.offset - at.buffer.data.ctypes.data
    raw = at.buffer.data[offset : offset + node.spec.nbytes]
    return raw.view(kind).reshape(node.shape).copy()


def multiply(gemm: Gemm) -> None:
    """A product as cuBLAS computes it: C = op(A) op(B), column by column, with f32 sums."""
    sizes = (gemm.m, gemm.k), (gemm.k, gemm.n), (gemm.m, gemm.n)
    turned = *gemm.transposed, False
    each = zip(gemm.ptrs, gemm.types, gemm.leading, gemm.strides, sizes, turned)
    a, b, c = (_matrices(gemm.batch, *one) for one in each)
    c[...] = a.astype(np.float32) @ b.astype(np.float32)


def _matrices(
    batch: int, ptr: int, name: str, leading: int, stride: int, size: tuple[int, int], turned: bool
) -> NDArray[Any]:
    """The matrices [batch, rows, columns] of an operand; a column's elements are adjacent."""
    kind = np.dtype({"f32": "f4", "f16": "f2"}[name])
    steps = [stride, leading, 1] if turned else [stride, 1, leading]
    reach = (batch - 1) * stride + sum((n - 1) * step for n, step in zip(size, steps[1:])) + 1
    memory = np.frombuffer((ctypes.c_char * (kind.itemsize * reach)).from_address(ptr), kind)
    nb = [kind.itemsize * step for step in steps]
    return np.lib.stride_tricks.as_strided(memory, (batch, *size), nb)


def starter(folder: Path, launches: list[Launch]) -> Callable[[Launch], None]:
    """A function that runs a launch."""
    names: dict[str, list[str]] = {}
    for launch in launches:
        if launch.name not in names.setdefault(launch.file, []):
            names[launch.file].append(launch.name)
    texts = {Path(file).stem: _text(file, own) for file, own in names.items()}
    loaded = dict(zip(names, libraries(folder, texts, "-O1", "-fno-strict-aliasing")))

    def start(launch: Launch) -> None:
        grid, block = ((ctypes.c_int * 3)(*size) for size in (launch.grid, launch.block))
        args = ctypes.create_string_buffer(launch.args, len(launch.args))
        function = getattr(loaded[launch.file], f"run_{names[launch.file].index(launch.name)}")
        assert function(args, grid, block, launch.shared) == len(launch.args)

    return start


class Meeting:
    """Runs launches of several GPUs at the same time.

    names  the launches of a file of kernels that there may be
    """

    def __init__(self, folder: Path, file: str, names: Sequence[str]) -> None:
        self._names = list(names)
        text = _text(file, self._names) + _together(self._names)
        options = "-O1", "-fno-strict-aliasing", "-DSEVERAL_GPUS"
        (self._library,) = libraries(folder, {Path(file).stem: text}, *options)

    def run(
        self, launches: Sequence[Launch], resident: int = 128, order: int = 1, turns: int = 200_000
    ) -> bool:
        """Whether all have ended; the arguments are those of launch_together in block.hpp."""
        n = len(launches)
        which = [self._names.index(launch.name) for launch in launches]
        args = [ctypes.create_string_buffer(launch.args, len(launch.args)) for launch in launches]
        addresses = [ctypes.addressof(each) for each in args]
        shapes = [x for launch in launches for x in (*launch.grid, *launch.block)]
        ended: int = self._library.run_together(
            n, (ctypes.c_int * n)(*which), (ctypes.c_void_p * n)(*addresses),
            (ctypes.c_int * (6 * n))(*shapes), resident, order, turns,
        )  # fmt: skip
        return bool(ended)


def _together(names: Sequence[str]) -> str:
    cases = "\n".join(f"case {i}: return bound({name}, args);" for i, name in enumerate(names))
    return f"""
static std::function<void()> bound_to(int which, const char* args) {{
    switch (which) {{ {cases} }}
    return {{}};
}}
extern "C" int run_together(int n, const int* which, const char* const* args, const int* shapes,
                            int resident, int order, int turns) {{
    std::vector<Grid> grids;
    for (int i = 0; i < n; ++i, shapes += 6)
        grids.push_back({{bound_to(which[i], args[i]), {{shapes[0], shapes[1], shapes[2]}},
                         {{shapes[3], shapes[4], shapes[5]}}, 0}});
    return launch_together(grids, resident, order, turns);
}}"""


def _blocks(name: str) -> int:
    """Blocks of a cluster of a kernel."""
    cluster = re.match(r"combine_vec<.*, (\d), \d(?:, true)?>", name)
    return int(cluster[1]) if cluster else 1


def _text(file: str, names: list[str]) -> str:
    """A library with a function for each instance of a kernel."""
    source = on_host((KERNELS / file).read_text())
    shared = r"^extern __shared__ (\w+) (\w+)\[\];"
    source = re.sub(
        shared, r"alignas(16) static \1 \2[(1 << 16) / sizeof(\1)];", source, flags=re.M
    )
    runs = "\n".join(
        f'extern "C" int run_{i}(const char* args, const int* grid, const int* block, int shared) '
        f"{{ return start({name}, args, grid, block, shared, {_blocks(name)}); }}"
        for i, name in enumerate(names)
    )
    for_hopper = "_hopper" in file or file in ("attention_list_token.cu", "indexer_token.cu")
    tensor_cores = "#define __CUDA_ARCH_FEAT_SM90_ALL\n" * for_hopper
    return f"""{tensor_cores}#include "block.hpp"
#include "host.hpp"
#include "emulated.hpp"
{source}
{runs}"""
