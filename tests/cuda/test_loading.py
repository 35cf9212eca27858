"""Weights on a GPU: the kernel that packs them, compiled for the host, gives the bytes of the NumPy
packer.

It runs on a fake GPU, whose memory is the host's and whose work runs late, so that a part of the
ring that is reused too early shows.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.cuda.argument import Tensor
from pyggml.backends.cuda.device import pinned
from pyggml.backends.cuda.device.compiler import KERNELS
from pyggml.backends.cuda.device.context import Context
from pyggml.backends.cuda.device.registered import Registry
from pyggml.backends.cuda.launch import Launch
from pyggml.backends.cuda.weights import loading, packing
from pyggml.backends.cuda.weights.borrowing import borrow
from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.backends.host_tiles import FORMS, LAYOUT
from pyggml.backends.host_tiles import tiles_of as host_tiles_of
from pyggml.backends.step import Address, WeightLayout
from pyggml.dtypes import TYPES
from pyggml.ops.leaf import data_of
from pyggml.spec import Ne
from tests.cuda.conftest import Machine
from tests.cuda.host import HERE, libraries
from tests.interrupts import everywhere

Bytes = np.ndarray[Any, np.dtype[np.uint8]]


class Arguments(ctypes.Structure):
    """The arguments of `pack`."""

    _fields_ = (
        ("raw", ctypes.c_uint64), ("to", packing.Packed), ("first", ctypes.c_int32),
        ("n_tiles", ctypes.c_int32), ("ids", Tensor),
    )  # fmt: skip


def arguments(launch: Launch) -> Arguments:
    return Arguments.from_buffer_copy(launch.args.ljust(ctypes.sizeof(Arguments)))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    kernel = (KERNELS / "pack.cu").read_text().replace('#include "tiles16.cuh"', "")
    instances = [("pack", name) for name in FORMATS] + [("pack16", name) for name in FORMS]
    cases = "\n".join(
        f'if (name == std::string("{kernel}<{name}>")) '
        f"return run_{kernel}<{name}>(grid, raw, to, first, n_tiles, ids);"
        for kernel, name in instances
    )
    text = f"""#include "block.hpp"
#include "host.hpp"
#include "tiles16.cuh"
{kernel}
{(HERE / "pack.cpp").read_text()}
#include <string>
extern "C" int pack_rows(const char* name, int grid, const unsigned char* raw, const Packed& to,
                         int first, int n_tiles, const Tensor& ids) {{
    {cases}
    return 1;
}}"""
    (library,) = libraries(tmp_path_factory.mktemp("pack"), {"pack": text}, "-O1")
    return library


@pytest.fixture
def gpu(machine: Machine, library: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A fake GPU that runs the launches of `pack`, and whose ring is soon used again."""

    def start(self: Context, launch: Launch, stream: Any = None) -> None:
        def task() -> None:
            a = arguments(launch)
            raw, to, ids = ctypes.c_void_p(a.raw), ctypes.byref(a.to), ctypes.byref(a.ids)
            name, grid = launch.name.encode(), launch.grid[0]
            assert library.pack_rows(name, grid, raw, to, a.first, a.n_tiles, ids) == 0

        (stream or self.stream).queue.add(task)

    machine("gpu")
    monkeypatch.setattr(Context, "start", start)
    monkeypatch.setattr(loading, "PIECE", 1 << 13)
    monkeypatch.setattr(pinned, "RING", 1 << 17)
    monkeypatch.setattr(pinned, "PART", 1 << 15)
    monkeypatch.setattr(loading, "PART", 1 << 15)
    monkeypatch.setattr(pinned, "GRAIN", 256)
    return backends.get("cuda")


@pytest.fixture
def small_ring(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "PIECE", 1 << 9)
    monkeypatch.setattr(pinned, "RING", 1 << 12)
    monkeypatch.setattr(pinned, "PART", 1 << 10)


def random_rows(name: str, ne: Ne, seed: int = 3) -> Bytes:
    nbytes = TYPES[name].row_bytes(ne[0]) * ne[1] * ne[2] * ne[3]
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def expected(name: str, ne: Ne, rows: Bytes) -> Bytes:
    t = TYPES[name]
    return packing.to_tiles(t, ne, rows.reshape(-1, ne[0] // t.block, t.nbytes))


def loaded(gpu: Any, name: str, ne: Ne, rows: Bytes, layout: str = "plain") -> Bytes:
    """The bytes of the weight after the GPU has packed it; the rows change right after the call."""
    rows, out = rows.copy(), np.full(packing.tiles_of(TYPES[name], ne).nbytes, 0xAA, np.uint8)
    with gpu.context:
        buffer = gpu.alloc(len(out))
        loading.upload_packed(gpu.context, gpu.staging, buffer.ptr, TYPES[name], ne, rows, layout)
        rows[:] = 0x55
        gpu.staging.download(out, buffer.ptr)
    return out


@pytest.mark.parametrize(
    ("blocks", "rows", "matrices"),
    [
        (1, 1, (1, 1)),  # one block
        (1, 8, (3, 1)),  # experts
        (3, 7, (2, 2)),  # matrices of part of a tile
        (7, 19, (2, 1)),  # an odd number of blocks: rows start at odd bytes
        (33, 9, (1, 1)),  # more than one chunk of groups, the last one of one block
        (9, 133, (1, 1)),  # several pieces
    ],
)
@pytest.mark.parametrize("name", FORMATS)
def test_the_kernel_packs_like_numpy(
    name: str, blocks: int, rows: int, matrices: tuple[int, int], gpu: Any
) -> None:
    ne = (blocks * TYPES[name].block, rows, *matrices)
    data = random_rows(name, ne)
    np.testing.assert_array_equal(loaded(gpu, name, ne, data), expected(name, ne, data))


def in_host_tiles(name: str, ne: Ne, rows: Bytes) -> Bytes:
    """The weight as the cpu backend keeps it, in read-only memory."""
    if backends.on_host() != "cpu":
        pytest.skip("needs the extra 'cpu' and AVX2")
    constant = gg.constant(rows.reshape(*ne[:0:-1], -1), dtype=name)
    layout = WeightLayout(host_tiles_of(TYPES[name], ne).nbytes, LAYOUT)
    cpu: Any = backends.get("cpu")
    tiles = cpu.weight(constant, layout, data_of(constant))
    tiles.flags.writeable = False
    return cast(Bytes, tiles)


@pytest.mark.parametrize(
    ("groups", "rows", "matrices"),
    [
        (8, 1, (1, 1)),
        (8, 16, (3, 1)),  # experts
        (8, 8, (2, 1)),  # half a tile of the host
        (24, 27, (2, 2)),  # matrices of a tile and of parts of two
        (40, 33, (1, 1)),  # more than one chunk of groups; several pieces
        (33, 49, (1, 1)),  # the last chunk is one group
    ],
)
@pytest.mark.parametrize("name", FORMS)
def test_the_kernel_packs_the_tiles_of_the_host(
    name: str, groups: int, rows: int, matrices: tuple[int, int], gpu: Any
) -> None:
    """The same bytes as from the file."""
    if TYPES[name].block == 256:
        groups = -(-groups // 8) * 8
    ne = (groups * 32, rows, *matrices)
    data = random_rows(name, ne)
    tiles = in_host_tiles(name, ne, data)
    np.testing.assert_array_equal(loaded(gpu, name, ne, tiles, LAYOUT), expected(name, ne, data))


# -- few blocks, and chosen experts --------------------------------------------------------------


def packed(
    gpu: Any, name: str, ne: Ne, source: loading.Source, data: Bytes, **options: Any
) -> Bytes:
    """The memory of a weight, 0xAA before, after a launch."""
    out = np.empty(packing.tiles_of(TYPES[name], ne).nbytes, np.uint8)
    with gpu.context:
        buffer = gpu.alloc(len(out))
        gpu.context.driver.memset_d8_async(buffer.ptr, 0xAA, len(out), gpu.context.stream)
        target, ptr = packing.tiles_of(TYPES[name], ne).at(buffer.ptr), data.ctypes.data
        launch = loading.launch(TYPES[name], target, source, ptr, 0, source.tiles, **options)
        gpu.context.start(launch)
        gpu.staging.download(out, buffer.ptr)
    return out


def sources(name: str, ne: Ne) -> list[tuple[loading.Source, Bytes]]:
    """The weight as in a file, and as the cpu backend keeps it."""
    rows = random_rows(name, ne)
    pairs = [(loading.source_of(TYPES[name], ne), rows)]
    if name in FORMS and backends.on_host() == "cpu":
        pairs.append((loading.source_of(TYPES[name], ne, LAYOUT), in_host_tiles(name, ne, rows)))
    return pairs


@pytest.mark.parametrize("most", [1, 2, 3])
@pytest.mark.parametrize("name", ["q4_0", "q8_0", "q6_K", "mxfp4", "iq2_xs", "q1_0", "nvfp4"])
def test_few_blocks_pack_one_chunk_after_another(name: str, most: int, gpu: Any) -> None:
    """The last chunk has part of the groups; the last round has work for part of a block."""
    block = TYPES[name].block
    ne = (block * (2560 // block), 32, 4, 1)  # whole planes without padding between
    whole = expected(name, ne, random_rows(name, ne))
    for source, data in sources(name, ne):
        out = packed(gpu, name, ne, source, data, most=most)
        np.testing.assert_array_equal(out, whole, err_msg=source.kernel)


@pytest.mark.parametrize("most", [None, 2])
@pytest.mark.parametrize(
    "ids",
    [[[0, 3, -1]], [[4, 4, 4], [-1, 1, 7]], [[-1, -1, -1]], [[5, 99, -7], [0, 1, 2], [3, 4, 0]]],
    ids=["one token", "past the end", "none", "two rows"],
)
@pytest.mark.parametrize("name", ["q4_0", "q5_K"])
def test_experts_that_no_id_chooses_stay_as_they_are(
    name: str, ids: list[list[int]], most: int | None, gpu: Any
) -> None:
    """Also with ids that are a part of a larger tensor."""
    ne = (256 * 6, 16, 6, 1)
    whole = expected(name, ne, random_rows(name, ne))
    table = np.full((len(ids), 5), 2, np.int32)
    table[:, 1:4] = ids
    for source, data in sources(name, ne):
        with gpu.context:
            buffer = gpu.alloc(table.nbytes)
            gpu.staging.upload(buffer.ptr, table.reshape(-1).view(np.uint8))
            gpu.synchronize()
        chosen = Tensor(data=buffer.ptr + 4, nb=(4, 20, 0, 0), ne=(3, len(ids), 1, 1))
        out = packed(gpu, name, ne, source, data, ids=chosen, most=most)
        is_chosen = np.isin(np.arange(6), ids)
        for start, end in itertools.pairwise((*packing.tiles_of(TYPES[name], ne).starts, len(out))):
            plane, right = (x[start:end].reshape(6, -1) for x in (out, whole))
            np.testing.assert_array_equal(plane[is_chosen], right[is_chosen])
            assert (plane[~is_chosen] == 0xAA).all()


@pytest.mark.parametrize("name", FORMATS)
def test_few_blocks_have_enough_under_way(name: str) -> None:
    """And fewer than a quarter of the multiprocessors of an H100, unless a group has few bytes."""
    t, ne = TYPES[name], (2048, 1408, 64, 1)
    for layout in ("plain", *([LAYOUT] if name in FORMS else ())):
        source, target = loading.source_of(t, ne, layout), packing.tiles_of(t, ne).at(0)
        blocks = loading.few_blocks(source, target)
        chunk = source.nbytes // 2 * loading.PARTS[source.kernel]
        assert blocks * chunk >= loading.UNDER_WAY > (blocks - 1) * chunk
        assert blocks < 33 or chunk < 12 << 10


@pytest.mark.parametrize("name", ("q4_0", "mxfp4", "q6_K"))
def test_many_pieces_go_round_the_ring(name: str, gpu: Any) -> None:
    ne = (TYPES[name].block * 4, 83, 100 if TYPES[name].block == 32 else 12, 1)
    data = random_rows(name, ne)
    assert len(data) > 4 * pinned.RING
    np.testing.assert_array_equal(loaded(gpu, name, ne, data), expected(name, ne, data))


def test_plain_weights_are_copied(gpu: Any) -> None:
    for nbytes in (1, 5000, 8192, 8193, 600_001):
        data = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
        values, out = data.copy(), np.empty(nbytes, np.uint8)
        with gpu.context:
            buffer = gpu.alloc(nbytes)
            loading.upload(gpu.context, gpu.staging, buffer.ptr, values)
            values[:] = 0x55
            gpu.staging.download(out, buffer.ptr)
        np.testing.assert_array_equal(out, data)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_lose_no_part_of_the_ring(small_ring: None, gpu: Any) -> None:
    ne = (32, 64, 1, 1)
    data, other = (random_rows("q4_0", ne, seed) for seed in (1, 2))
    result = expected("q4_0", ne, other)

    def begin() -> Callable[[], object]:
        gpu.synchronize()
        return lambda: loaded(gpu, "q4_0", ne, data)

    for where in everywhere(begin, 5):
        np.testing.assert_array_equal(loaded(gpu, "q4_0", ne, other), result, err_msg=where)


def test_threads_that_outlive_an_interrupt_do_not_write(
    small_ring: None, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts of the ring that they would fill get other data."""
    late: list[Callable[[], None]] = []

    class Pool:
        def submit(self, job: Callable[[], None]) -> None:
            late.append(job)

    def interrupt(self: Context, launch: Launch, stream: Any = None) -> None:
        raise KeyboardInterrupt

    ne = (32, 200, 1, 1)
    data, other = (random_rows("q4_0", ne, seed) for seed in (1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(gpu.staging, "_pool", Pool())
        patch.setattr(Context, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            loaded(gpu, "q4_0", ne, data)
    start = Context.start
    places = {cast(Any, job).__self__.part.ctypes.data: job for job in late}
    assert len(places) > 2

    def start_late(self: Context, launch: Launch) -> None:
        places.pop(arguments(launch).raw, int)()  # now the part has the other data
        start(self, launch)

    monkeypatch.setattr(Context, "start", start_late)
    np.testing.assert_array_equal(loaded(gpu, "q4_0", ne, other), expected("q4_0", ne, other))
    assert not places


def test_an_error_of_a_piece_is_raised_and_the_ring_stays_usable(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ne = (64, 999, 1, 1)
    data = random_rows("q8_0", ne)
    start, count = Context.start, [0]

    def fail(self: Context, launch: Launch) -> None:
        count[0] += 1
        if count[0] == 5:
            raise ValueError("a test")
        start(self, launch)

    with monkeypatch.context() as patch:
        patch.setattr(Context, "start", fail)
        with pytest.raises(ValueError, match="a test"):
            loaded(gpu, "q8_0", ne, data)
    np.testing.assert_array_equal(loaded(gpu, "q8_0", ne, data), expected("q8_0", ne, data))


def test_a_weight_whose_tile_exceeds_a_part_is_packed_on_the_host(gpu: Any) -> None:
    ne = (1 << 15, 9, 1, 1)
    assert not loading.can_pack(TYPES["q4_0"], ne) and loading.can_pack(
        TYPES["q4_0"], (2048, 9, 1, 1)
    )
    data = random_rows("q4_0", ne)
    node = gg.constant(data.reshape(9, -1), dtype="q4_0", name="w")
    layout = WeightLayout(packing.tiles_of(TYPES["q4_0"], ne).nbytes, "tiles8")
    buffer, out = gpu.weight(node, layout, data.reshape(9, -1)), np.empty(layout.nbytes, np.uint8)
    with gpu.context:
        gpu.staging.download(out, buffer.ptr)
    np.testing.assert_array_equal(out, expected("q4_0", ne, data))


# -- weights that are borrowed in every run ------------------------------------------------------


@pytest.fixture
def mapped(tmp_path: Path) -> Callable[[Bytes, int], Bytes]:
    """Bytes in a mapped file, from an offset on."""

    def write(data: Bytes, offset: int) -> Bytes:
        path = tmp_path / f"{offset}.bin"
        path.write_bytes(bytes(offset) + data.tobytes() + bytes(100))
        with path.open("rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(whole, np.uint8, len(data), offset)

    return write


def borrowed(
    gpu: Any, name: str, ne: Ne, data: Bytes, lent: Address | None = None
) -> tuple[Bytes, bool]:
    """The bytes of a weight after two runs, and whether its pages were registered."""
    t = TYPES[name]
    plain = t.kind != "block"
    rows = data.reshape(*ne[:0:-1], t.row_bytes(ne[0]))
    constant = gg.constant(rows.view(np.float32) if plain else rows, dtype=name)
    assert np.may_share_memory(data_of(constant), data)
    layout = WeightLayout(len(data)) if plain else WeightLayout(
        packing.tiles_of(t, ne).nbytes, "tiles8"
    )  # fmt: skip
    out = np.empty(layout.nbytes, np.uint8)
    with gpu.context:
        buffer = gpu.alloc(len(out))
        host = gpu.context, gpu.staging, gpu.registry
        load = borrow(*host, buffer.ptr, constant, layout, lent)
        for byte in (0xAA, 0x33):  # an arena's memory has other uses in between
            gpu.context.driver.memset_d8_async(buffer.ptr, byte, len(out), gpu.context.stream)
            for action in load.actions:
                action(gpu.context.stream)
        gpu.staging.download(out, buffer.ptr)
    assert load.in_graphs == bool(load.pages)
    return out, bool(load.pages)


@pytest.mark.parametrize("offset", [0, 32, 4000, 4096 + 18])
@pytest.mark.parametrize("ne", [(64, 19, 3, 1), (256, 8, 40, 1)])
@pytest.mark.parametrize("name", ["q4_0", "q8_0", "f32"])
def test_a_gpu_reads_a_mapped_file(
    name: str, ne: Ne, offset: int, gpu: Any, mapped: Callable[[Bytes, int], Bytes]
) -> None:
    """The same bytes from registered pages, and from an array that cannot be registered."""
    data = random_rows(name, ne)
    result = data if name == "f32" else expected(name, ne, data)
    for rows, registers in ((mapped(data, offset), True), (data, False)):
        out, registered = borrowed(gpu, name, ne, rows)
        np.testing.assert_array_equal(out, result)
        assert registered == registers


@pytest.mark.parametrize("ne", [(64, 19, 3, 1), (256, 16, 40, 1)])
def test_a_gpu_reads_the_tiles_of_the_host(
    ne: Ne, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From registered pages and through the ring. The file is not read: the tiles have other
    weights. They are in memory anyway, so no limit applies."""
    monkeypatch.setattr(Registry, "_limit", 0)
    file, other = random_rows("q4_0", ne, 1), random_rows("q4_0", ne, 2)
    tiles = in_host_tiles("q4_0", ne, other)
    memory = np.concatenate([np.zeros(64, np.uint8), tiles])
    lent = Address(memory, 64, (18, 0, 0, 0), LAYOUT)
    bindings: Any = import_module("cuda.bindings.driver")
    for registers in (True, False):
        monkeypatch.setattr(bindings, "REGISTERS", [registers])
        vars(gpu).pop("registry", None)
        out, read_in_place = borrowed(gpu, "q4_0", ne, file, lent)
        np.testing.assert_array_equal(out, expected("q4_0", ne, other))
        assert read_in_place == registers
    monkeypatch.setattr(bindings, "REGISTERS", [True])


def registered() -> dict[int, int]:
    ranges: dict[int, int] = import_module("cuda.bindings.driver").REGISTERED
    return ranges


def test_weights_that_share_pages_register_each_page_once(
    gpu: Any, mapped: Callable[[Bytes, int], Bytes]
) -> None:
    data = mapped(np.zeros(40_000, np.uint8), 100)
    registry, start = gpu.registry, data.ctypes.data // 4096 * 4096
    middle = registry.cover(data[10_000:20_000])
    assert registered() == {start + 8192: 12_288}
    every = registry.cover(data)
    assert sorted(registered()) == [start, start + 8192, start + 20_480]
    assert len(every) == 3 and registry.cover(data[11_000:12_000]) == list(middle)
    del middle
    assert len(registered()) == 3
    del every
    assert registered() == {}


def test_pages_are_registered_within_a_limit(
    gpu: Any, mapped: Callable[[Bytes, int], Bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mapped(np.zeros(40_000, np.uint8), 0)
    monkeypatch.setattr(Registry, "_limit", 16_384)
    assert gpu.registry.cover(data) is None
    first = gpu.registry.cover(data[:8000])
    assert first and gpu.registry.cover(data[16_384:30_000]) is None
    bindings: Any = import_module("cuda.bindings.driver")
    monkeypatch.setattr(bindings, "REGISTERS", [False])
    assert Registry(gpu.context).cover(data[:8000]) is None
    monkeypatch.setattr(bindings, "REGISTERS", [True])
    # Another library has registered the pages.
    assert Registry(gpu.context).cover(data[:8000]) is None


def test_arrays_that_may_change_are_not_registered(gpu: Any) -> None:
    assert gpu.registry.cover(np.zeros(9999, np.uint8)) is None
    writable = np.frombuffer(mmap.mmap(-1, 9999), np.uint8)
    assert gpu.registry.cover(writable) is None
