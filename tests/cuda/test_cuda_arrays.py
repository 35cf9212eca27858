"""Arrays of other libraries, copies through pinned memory and between GPUs, on fake GPUs.

Queued work runs late, so a missing wait shows.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.cuda.device import dlpack, pinned
from pyggml.backends.step import Address
from pyggml.dtypes import dtype
from pyggml.spec import Spec
from tests.cuda.conftest import Machine
from tests.cuda.foreign import Capsule, CuPy, Interface

X = np.arange(24, dtype=np.float32).reshape(4, 6)


@pytest.fixture
def cupy(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> CuPy:
    """CuPy on a machine with a fake cuda:0 and cuda:1."""
    machine("gpus")
    module = CuPy()
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


@pytest.fixture
def gpus(cupy: CuPy) -> list[Any]:
    return [backends.get("cuda", i) for i in range(2)]


def calls() -> list[str]:
    """The copies since the last call of this function."""
    import pycuda.driver

    names, pycuda.driver.CALLS[:] = list(pycuda.driver.CALLS), []
    return names


def echo(**options: Any) -> gg.Plan:
    """A plan whose output is its input."""
    return gg.compile({"x": gg.input("x", ne=(6, 4))}, backends=["cuda"], **options)


# -- in and out ----------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [Interface, Capsule])
def test_a_device_array_is_copied_within_the_device(gpus: list[Any], library: Any) -> None:
    array = library(X)
    plan = echo()
    np.testing.assert_array_equal(plan.run(x=array)["x"], X)
    assert calls() == ["dtod", "dtoh"]  # in, and the output to the host
    array.values += 1
    np.testing.assert_array_equal(plan.run(x=array)["x"], X + 1)


@pytest.mark.parametrize("library", [Interface, Capsule])
def test_a_bound_array_is_the_input_s_memory(gpus: list[Any], library: Any) -> None:
    array = library(X)
    plan = echo().bind(x=array)
    view = plan.views()["x"]
    assert view.__cuda_array_interface__["data"][0] == array.values.ctypes.data
    assert calls() == [] and not plan.store._leaves.inputs
    array.values *= 3
    np.testing.assert_array_equal(np.asarray(view), 3 * X)
    again = gg.compile({"x": gg.input("x", ne=(6, 4))}, backends=["cuda"]).bind(x=view)
    assert again.views()["x"].__cuda_array_interface__ == view.__cuda_array_interface__


def test_the_stream_waits_for_the_library_s(cupy: CuPy) -> None:
    echo().run(x=Interface(X, stream=None))
    echo().run(x=Interface(X))
    assert cupy.waited == []
    plan = echo()
    plan.run(x=Interface(X, stream=77))
    assert cupy.waited == [77]
    plan.bind(x=Interface(X, stream=78)).run()
    plan.run()
    assert cupy.waited == [77, 78, 78]  # before every run
    shared = Capsule(X)
    plan.bind(x=shared).run()
    before = len(shared.streams)
    plan.run()
    ours: Any = backends.get("cuda")
    assert set(shared.streams) == {ours.context.stream.handle} and len(shared.streams) > before >= 2


@pytest.mark.parametrize(
    "make, error, text",
    [
        (
            lambda: Interface(X.astype("f2")),
            gg.DTypeError,
            "'x': expected f32.*float16.*pass float32",
        ),
        (lambda: Interface(X.T.copy()), gg.ShapeError, r"shape \(4, 6\), got .* \(6, 4\)"),
        (lambda: Interface(X.T.copy(), np.transpose), gg.ShapeError, "other strides"),
        (lambda: Capsule(X.T.copy(), np.transpose), gg.ShapeError, "other strides"),
        (lambda: Capsule(np.repeat(X, 2, 1), lambda a: a[:, ::2]), gg.ShapeError, "other strides"),
        (lambda: Capsule(X.astype("i4")), gg.DTypeError, "int32"),
        (lambda: Interface(X.astype(">f4")), gg.DTypeError, ">f4"),
        (lambda: Interface(X, mask=X), gg.DTypeError, "input 'x'.*mask"),
    ],
)
def test_arrays_that_are_refused(
    gpus: list[Any], make: Callable[[], Any], error: type[Exception], text: str
) -> None:
    for call in (echo().run, echo().bind):
        with pytest.raises(error, match=f"(?s){text}"):
            call(x=make())


def test_an_array_that_cannot_be_exported(gpus: list[Any]) -> None:
    class Grad(Capsule):
        def __dlpack__(self, *, stream: Any = None) -> Any:
            raise BufferError("it requires grad")

    with pytest.raises(gg.DTypeError, match=r"input 'x'.*refuses to share it: it requires grad"):
        echo().run(x=Grad(X))


def test_arrays_of_another_gpu_are_refused(cupy: CuPy) -> None:
    cupy.index = 1
    for array in (Capsule(X, index=1), Interface(X)):
        with pytest.raises(gg.DTypeError, match="'x': bind needs an array in the memory of cuda:0"):
            echo().bind(x=array)
        with pytest.raises(gg.DTypeError, match="input 'x'"):
            echo().run(x=array)


def test_an_odd_address_is_copied_but_not_bound(gpus: list[Any]) -> None:
    array = Interface(X, offset=4)
    np.testing.assert_array_equal(echo().run(x=array)["x"], X)
    with pytest.raises(
        gg.ShapeError, match="cuda:0 needs arrays whose address is a multiple of 16 bytes"
    ):
        echo().bind(x=array)


def test_a_device_array_that_the_host_also_reads(gpus: list[Any]) -> None:
    x = gg.input("x", ne=(6, 4))
    outputs = {"x": x, "y": gg.label(gg.scale(x, s=-1.0), "there")}
    plan = gg.compile(outputs, backends=["cuda", "numpy"], pins={"^x$": "cuda", "there": "numpy"})
    array = Interface(X - 11)
    np.testing.assert_array_equal(plan.run(x=array)["y"], 11 - X)
    np.testing.assert_array_equal(plan.bind(x=array).run()["y"], 11 - X)


# -- capsules and views --------------------------------------------------------------------------


def capsule(code: int, bits: int, lanes: int = 1, offset: int = 0) -> tuple[Any, Any]:
    """A capsule of a tensor [2, 3] without strides, and the objects that it points to."""
    shape = (ctypes.c_int64 * 2)(2, 3)
    tensor = dlpack._Tensor(
        data=4096, ndim=2, type=dlpack._Type(code, bits, lanes), shape=shape, byte_offset=offset
    )
    make = ctypes.pythonapi.PyCapsule_New
    make.restype = ctypes.py_object
    make.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(ctypes.addressof(tensor), b"dltensor", None), (tensor, shape)


def test_element_types_of_capsules() -> None:
    for code, bits, name in ((4, 16, "bfloat16"), (2, 16, "float16"), (0, 32, "int32")):
        handle, keep = capsule(code, bits, offset=64)
        about = dlpack.described(handle)
        assert (about.type, about.shape, about.address) == (name, (2, 3), 4160), keep
        assert about.contiguous and about.nbytes == 6 * bits // 8
    for code, bits, lanes, name in ((2, 32, 4, "float32x4"), (17, 8, 1, "type 17, bits 8")):
        handle, keep = capsule(code, bits, lanes)
        assert dlpack.described(handle).type == name, keep
    with pytest.raises(ValueError):
        dlpack.described(np.zeros(3).__dlpack__(max_version=(1, 0)))  # another layout: refused
    about = dlpack.described(X[1:, ::2].__dlpack__())
    assert (about.address, about.strides) == (X.ctypes.data + 24, (24, 8)) and not about.contiguous


def test_bf16_is_taken_as_bfloat16_and_as_raw_bits(gpus: list[Any]) -> None:
    plan = gg.compile({"x": gg.input("x", "bf16", ne=(6, 4))}, backends=["cuda"])
    raw = (X.view(np.uint32) >> 16).astype(np.uint16)
    np.testing.assert_array_equal(plan.run(x=Interface(raw))["x"], X)

    class Torch(Capsule):
        def __dlpack__(self, *, stream: Any = None) -> Any:
            handle = self.values.__dlpack__()
            at = dlpack._pointer(handle, b"dltensor")
            dlpack._Tensor.from_address(at).type.code = 4
            return handle

    np.testing.assert_array_equal(plan.run(x=Torch(raw))["x"], X)
    with pytest.raises(gg.DTypeError, match=r"bfloat16.*pass float32"):
        echo().run(x=Torch(raw))


def test_views_describe_the_layout(gpus: list[Any]) -> None:
    device = gpus[0]
    for name, shape, type_, strides in (
        ("f32", (4, 64), "<f4", (256, 4)),
        ("bf16", (4, 64), "<u2", (128, 2)),
        ("q8_0", (4, 68), "|u1", (68, 1)),
    ):
        spec = Spec.of(dtype(name), (64, 4))
        at = Address(device.alloc(spec.nbytes + 32), 32, spec.nb)
        about = device.view(at, spec).__cuda_array_interface__
        assert about["data"] == (at.buffer.ptr + 32, False)
        assert (about["shape"], about["typestr"], about["strides"]) == (shape, type_, strides)
    transposed = Spec.of(dtype("f32"), (6, 4))
    about = device.view(Address(at.buffer, 0, (16, 4, 96, 96)), transposed)
    assert about.__cuda_array_interface__["strides"] == (4, 16)
    assert about.__dlpack_device__() == (2, 0)
    assert repr(about) == "<float32 array (4, 6) on cuda:0>"
    with pytest.raises(ValueError, match="without a copy"):
        np.array(about, copy=False)


# -- copies --------------------------------------------------------------------------------------


@pytest.fixture
def staging(gpus: list[Any]) -> Iterator[pinned.Staging]:
    with gpus[0].context:
        yield gpus[0].staging


def test_copies_through_the_ring_are_queued_and_correct(
    gpus: list[Any], staging: pinned.Staging
) -> None:
    device, rng = gpus[0], np.random.default_rng(0)
    sizes = [100, 7 << 20, 1, pinned.RING + 12345, 64 << 10, 3 << 20]
    buffers = [device.alloc(size) for size in sizes]
    data = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    for turn in range(2):
        for buffer, values in zip(buffers, data):
            source = values + np.uint8(turn)
            staging.upload(buffer.ptr, source)
            source[:] = 0  # the caller may change it
        arrived = [np.zeros(size, np.uint8) for size in sizes]
        arrivals = [staging.receive(a, b.ptr) for a, b in zip(arrived, buffers)]
        for arrival in arrivals[::-1]:
            arrival.wait()
        for array, values in zip(arrived, data):
            np.testing.assert_array_equal(array, values + np.uint8(turn))
    assert len(staging._events) + len(staging._flying) <= pinned.RING // pinned.GRAIN
    device.synchronize()
    calls()
    queue = device.context.stream.queue
    before = len(queue)
    for _ in range(4):
        staging.upload(buffers[0].ptr, data[0])
        staging.receive(arrived[0], buffers[0].ptr)
    assert len(calls()) == 8 == len(queue) - before  # nothing was waited for


def test_an_arrival_without_a_wait_is_not_written(gpus: list[Any], staging: pinned.Staging) -> None:
    """After a failed run, for instance, its memory may have another use."""
    buffer = gpus[0].alloc(256)
    dropped, received = np.zeros(256, np.uint8), np.zeros(256, np.uint8)
    staging.upload(buffer.ptr, np.full(256, 7, np.uint8))
    staging.receive(dropped, buffer.ptr)
    arrival = staging.receive(received, buffer.ptr)
    for _ in range(pinned.RING // pinned.GRAIN + 1):  # once around the ring
        staging.upload(buffer.ptr, np.full(256, 9, np.uint8))
    arrival.wait()
    assert not dropped.any() and (received == 7).all()


def test_send_and_fetch_do_not_wait(gpus: list[Any]) -> None:
    device, queue = gpus[0], gpus[0].context.stream.queue
    spec = Spec.of(dtype("f32"), (6, 4))
    there = Address(device.alloc(spec.nbytes), 0, spec.nb)
    host = Address(X.copy().reshape(-1).view(np.uint8), 0, spec.nb)
    back = Address(np.zeros(96, np.uint8), 0, spec.nb)
    device.fetch(host, backends.get("numpy"), there, spec)
    host.buffer[:] = 0
    arrival = device.send(there, back, spec)
    assert len(queue) == 3 and not back.buffer.any()
    later: list[int] = []
    queue.add(lambda: later.append(1))
    arrival.wait()
    assert not later and (back.buffer.view(np.float32).reshape(4, 6) == X).all()
    for nb in ((4, 32, 128, 128), (4, 48, 192, 192)):  # rows with gaps, on either side
        wide = Address(np.zeros(256, np.uint8), 0, nb)
        device.send(there, wide, spec).wait()
        np.testing.assert_array_equal(backends.get("numpy").view(wide, spec), X)
        apart = Address(device.alloc(256), 0, nb)
        device.fetch(there, device, apart, spec)
        device.send(apart, back, spec).wait()
        np.testing.assert_array_equal(back.buffer.view(np.float32).reshape(4, 6), X)


def test_a_state_on_a_gpu_is_read_on_the_host(gpus: list[Any]) -> None:
    s = gg.state("s", ne=(6, 4))
    outputs = {"y": gg.label(gg.scale(s, s=2.0), "there")}
    plan = gg.compile(outputs, backends=["cuda", "numpy"], pins={"^s$": "cuda", "there": "numpy"})
    plan.bind().store.write("s", X)
    np.testing.assert_array_equal(plan.run()["y"], 2 * X)
    np.testing.assert_array_equal(plan.repeat(3)["y"], 2 * X)


def test_copies_between_gpus_are_direct_and_in_order(gpus: list[Any]) -> None:
    """As in `execution`: the reader waits for the writer, and the writer for the copy."""
    first, second = gpus
    spec = Spec.of(dtype("f32"), (6, 4))
    here, there = (Address(d.alloc(spec.nbytes), 0, spec.nb) for d in gpus)
    first.upload(here, spec, X)
    second.wait_for(first.record())
    second.fetch(here, first, there, spec)
    first.wait_for(second.record())
    first.upload(here, spec, -X)  # reuses the memory
    first.synchronize()
    second.fetch(here, first, here, spec)
    np.testing.assert_array_equal(second.download(there, spec), X)
    direct = [call for call in calls() if "0" in call]
    assert direct == ["reach 0", "0 to 1", "0 to 1"]  # peer access is enabled once
