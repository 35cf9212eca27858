"""Failures without a GPU, or with too little memory on one. Each is an error that says what to do,
leaves nothing behind, and leaves the process usable."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.backends.cuda.device import compiler, cublas, driver
from pyggml.backends.cuda.device.tensormap import tensor_map
from pyggml.runtime.plan import Plan
from tests.cuda.allocations import ALLOCATIONS, fail_allocation
from tests.cuda.conftest import Machine

ONES = np.ones((40, 256), np.float32)


def everything() -> dict[str, gg.Node]:
    """A graph with weights for cuBLAS and for pyggml's kernels, a state, an input and scratch."""
    x, state = gg.input("x", ne=(256, 40)), gg.state("s", ne=(256, 40))
    norm = gg.constant(np.ones(256, np.float32), name="norm")
    w = [
        gg.constant(np.eye(256, dtype=np.float32), dtype=name, name=f"w_{name}")
        for name in ("f16", "q8_0")
    ]
    y = gg.mul(gg.rms_norm(gg.sub(x, state), eps=1e-6), norm)
    return {"y": gg.mul_mat(w[1], gg.mul_mat(w[0], y))}


def numpy_works() -> None:
    plan = gg.compile({"y": gg.relu(gg.input("x", ne=(4,)))})
    np.testing.assert_array_equal(plan.run(x=[-1, 0, 1, 2])["y"], [0, 0, 1, 2])


# -- no GPU ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (None, ("needs pycuda", "not installed", "make cuda", "build_pycuda.sh")),
        ("no driver", ("no NVIDIA driver here", "version 580 or newer", "backends=['numpy']")),
        ("no device", ("no CUDA-capable device", "nvidia-smi", "backends=['numpy']")),
        ("old", ("too old", "CUDA 12.2", "need 13.0", "version 580 or newer")),
        ("older", ("too old for pycuda", "cuCtxCreate_v4", "version 580 or newer")),
        ("foreign", ("pycuda cannot be loaded", "libcurand.so.10", "tools/build_pycuda.sh")),
    ],
)
def test_a_machine_without_a_gpu(machine: Machine, name: str | None, words: list[str]) -> None:
    machine(name)
    plan = gg.compile(everything(), backends=["cuda"])
    before = ALLOCATIONS.blocks
    for call in (plan.bind, plan.bind, lambda: plan.run(x=ONES)):  # the same error every time
        with pytest.raises(gg.DeviceError) as caught:
            call()
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "`pyggml doctor` lists what else" in str(caught.value)
    assert ALLOCATIONS.blocks == before
    numpy_works()
    mixed = gg.compile(everything(), backends=["numpy", "cuda"])  # NumPy runs everything
    assert mixed.run(x=ONES)["y"].shape == (40, 256)


@pytest.mark.parametrize("module", ("cupy", "cupy_backends", "cuda"))
def test_the_other_packages(machine: Machine, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    """A package is imported when a plan needs it; an error names a missing one."""
    machine("gpu")
    monkeypatch.setitem(sys.modules, module, None)
    name = "cuda-bindings" if module == "cuda" else "cupy-cuda13x"
    message = f"needs {name}, and the module {module}.* is not installed.*make cuda.*doctor"
    if module == "cuda":
        with pytest.raises(gg.DeviceError, match=message):
            tensor_map(1 << 20, "f16", (64, 64), (2, 128), (64, 8))
        return
    plan = gg.compile(everything(), backends=["cuda"])
    for _ in range(2):
        with pytest.raises(gg.DeviceError, match=message):
            cublas._handle() if module == "cupy" else plan.bind()
    gg.compile({"y": gg.relu(gg.input("x", ne=(4,)))}, backends=["cuda"]).bind()
    numpy_works()


def test_no_cublas(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CuPy is installed, but its cuBLAS module does not find the library."""
    machine("gpu")
    folder = tmp_path / "cupy_backends" / "cuda" / "libs"
    folder.mkdir(parents=True)
    why = "libcublas.so.13: cannot open shared object file"
    (folder / "cublas.py").write_text(f"raise ImportError({why!r})")
    monkeypatch.syspath_prepend(tmp_path)
    message = rf'cupy-cuda13x finds no cuBLAS .{why}.*pip install .*cuda\]"'
    plan = gg.compile(everything(), backends=["cuda"])
    with pytest.raises(gg.DeviceError, match=message):
        plan.bind()
    for name in [name for name in sys.modules if name.startswith("cupy_backends")]:
        del sys.modules[name]
    numpy_works()


def test_a_repaired_machine_needs_no_new_process(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("no device")
    plan = gg.compile(everything(), backends=["cuda"])
    with pytest.raises(gg.DeviceError):
        plan.bind()
    machine("gpu")
    install_cublas(monkeypatch)
    plan.bind()


@pytest.mark.parametrize("place", ("cuda:1", "cuda:99"))
def test_a_wrong_index(machine: Machine, place: str) -> None:
    machine("gpu")
    plan = gg.compile(everything(), backends=[place])
    message = rf"there is no {place}; GPUs here: cuda:0\. Choose one of these, or .*numpy"
    for call in (plan.bind, lambda: plan.run(x=ONES)):
        with pytest.raises(gg.DeviceError, match=message):
            call()
    numpy_works()


def test_a_gpu_that_is_too_old(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("gpu")
    monkeypatch.setattr(driver.driver().Device, "compute_capability", lambda self: (7, 5))
    with pytest.raises(gg.DeviceError, match=r"has compute capability 7\.5; .* need 8\.0"):
        gg.compile(everything(), backends=["cuda"]).bind()
    numpy_works()


def test_without_a_compiler(machine: Machine) -> None:
    machine("gpu", nvrtc=False)
    start = ALLOCATIONS.blocks
    plan = gg.compile(everything(), backends=["cuda"])
    with pytest.raises(
        gg.DeviceError, match=r"NVRTC.* is not installed; pip install .*\[kernels\]"
    ):
        plan.bind()
    del plan
    gc.collect()
    assert ALLOCATIONS.blocks == start
    numpy_works()


# -- too little memory ----------------------------------------------------------------------------


def install_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `bind` believe that CuPy finds cuBLAS."""
    monkeypatch.setattr(cublas, "_library", lambda: None)


@pytest.fixture
def gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("gpu")
    install_cublas(monkeypatch)


def test_every_allocation_may_fail(gpu: None) -> None:
    """Each in turn. The error has the plan's table, nothing leaks, the plan can then be bound."""
    start, number = ALLOCATIONS.blocks, 0
    while True:
        number += 1
        forget_memory()
        plan: Plan | None = gg.compile(everything(), backends=["cuda"])
        assert plan is not None
        try:
            with fail_allocation(number):
                plan.bind()
            break
        except gg.OutOfMemoryError as error:
            assert re.search(r"cannot (allocate|pin) [\d,]+ bytes", str(error))
            assert "the plan needs:\ndevice | weights | states" in str(error)
        plan.bind()
        plan = None
        gc.collect()
        forget_memory()
        assert ALLOCATIONS.blocks == start, f"allocation {number}"
    # Three weights, a state, an input, the arena, the ring, and the workspace of cuBLAS.
    assert number == 1 + 3 + 2 + 1 + 1 + 1
    numpy_works()


def forget_memory() -> None:
    """Free the memory that a device keeps for the next plan."""
    vars(backends.get("cuda")).pop("staging", None)
    vars(backends.get("cuda")).pop("cublas", None)
    gc.collect()


def test_the_error_for_full_memory_has_the_plans_table(gpu: None) -> None:
    start = ALLOCATIONS.blocks
    big = gg.input("x", ne=(1 << 20, 300))
    plan = gg.compile({"y": gg.relu(big)}, backends=["cuda"])
    with pytest.raises(gg.OutOfMemoryError) as caught:
        plan.bind()
    text = str(caught.value)
    assert "cuda:0 (fake GPU) cannot allocate 1,258,291,200 bytes" in text
    assert "Pin weights to the host" in text and "the plan needs:\ndevice" in text
    del plan, caught
    gc.collect()
    assert ALLOCATIONS.blocks - start <= 1 and ALLOCATIONS.nbytes >= 0
    numpy_works()


def test_a_kernel_that_does_not_compile(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan leaves nothing behind, and can be bound once the kernel compiles."""
    working: Callable[..., compiler.Cubin] = compiler.compile_instance

    def broken(file: str, name: str, arch: str) -> compiler.Cubin:
        if file == "norm.cu":
            raise compiler.CompileError(f"kernels/{file} does not compile for sm_{arch} as {name}")
        return working(file, name, arch)

    monkeypatch.setattr(compiler, "compile_instance", broken)
    start = ALLOCATIONS.blocks
    plan = gg.compile(everything(), backends=["cuda"])
    for _ in range(2):
        with pytest.raises(compiler.CompileError, match=r"norm\.cu does not compile for sm_80"):
            plan.bind()
    monkeypatch.setattr(compiler, "compile_instance", working)
    plan.bind()
    del plan
    gc.collect()
    forget_memory()
    assert ALLOCATIONS.blocks == start


def test_the_context_is_left_as_it_was(gpu: None) -> None:
    """A context that is pushed for a call is popped, also if the call fails."""
    plan = gg.compile(everything(), backends=["cuda"])
    with fail_allocation(3), pytest.raises(gg.OutOfMemoryError):
        plan.bind()
    plan.bind()
    assert not driver.driver().Context.stack
