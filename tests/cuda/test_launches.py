"""Starting kernels through cuda-bindings; each is loaded once. Needs no GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

import pyggml as gg
from pyggml.backends.cuda.device import compiler, driver
from pyggml.backends.cuda.device import context as contexts
from pyggml.backends.cuda.device.context import FREE_SHARED, Context
from pyggml.backends.cuda.launch import Launch
from tests.cuda.conftest import Machine, fake_cubin

LAUNCH = Launch("norm.cu", "rms_norm", (3, 2, 1), (128, 1, 1), bytes(range(12)), 0, False)


@pytest.fixture
def context(machine: Machine) -> Iterator[Context]:
    machine("gpu")
    with contexts.context(0) as context:
        yield context


def cu() -> Any:
    return driver.imported("cuda.bindings.driver")


def starts_of(context: Context, *launches: Launch) -> list[Any]:
    context.load(launches)
    for launch in launches:
        context.start(launch)
    return list(cu().STARTED)


def test_a_launch_has_the_recorded_geometry_and_arguments(context: Context) -> None:
    (start,) = starts_of(context, LAUNCH)
    config = start.config
    assert (config.gridDimX, config.gridDimY, config.gridDimZ) == LAUNCH.grid
    assert (config.blockDimX, config.blockDimY, config.blockDimZ) == LAUNCH.block
    assert config.sharedMemBytes == 0 and config.hStream is context.stream
    assert start.args == LAUNCH.args and start.function.allowed == []


@pytest.mark.parametrize("overlap", (True, False))
def test_overlap_is_an_attribute_of_the_launch(context: Context, overlap: bool) -> None:
    (start,) = starts_of(context, replace(LAUNCH, overlap=overlap))
    assert start.config.numAttrs == len(start.config.attrs) == overlap
    for attribute in start.config.attrs:
        assert attribute.id.name.endswith("PROGRAMMATIC_STREAM_SERIALIZATION")
        assert attribute.value.programmaticStreamSerializationAllowed == 1


def test_a_kernel_is_loaded_once_and_allowed_the_most_shared_memory(context: Context) -> None:
    sizes = (0, FREE_SHARED, FREE_SHARED + 1, 100_000, 90_000, 100_000)
    starts = starts_of(context, *(replace(LAUNCH, shared=size) for size in sizes))
    assert len({id(start.function) for start in starts}) == 1
    assert starts[0].function.allowed == [FREE_SHARED + 1, 100_000]


def test_a_roomy_kernel_prefers_all_memory_to_be_shared(context: Context) -> None:
    roomy = replace(LAUNCH, name="roomy", roomy=True)
    other, first, second = starts_of(context, LAUNCH, roomy, roomy)
    assert (other.function.shares, first.function.shares) == ([], [100])
    assert second.function is first.function


def test_static_shared_memory_counts(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grid of a block type is static, beside a column that is not."""
    monkeypatch.setattr(
        compiler, "compile_instance", lambda *at: replace(fake_cubin(*at), shared=16_384)
    )
    sizes = (FREE_SHARED - 16_384, FREE_SHARED - 16_383)
    starts = starts_of(context, *(replace(LAUNCH, shared=size) for size in sizes))
    assert starts[0].function.allowed == [FREE_SHARED - 16_383]


def test_too_much_shared_memory_is_an_error_that_names_the_kernel(context: Context) -> None:
    with pytest.raises(gg.DeviceError, match=r"rms_norm: 999999 bytes .*INVALID_VALUE"):
        context.load([replace(LAUNCH, shared=999_999)])


def test_full_memory_is_an_out_of_memory_error(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = (cu().CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
    monkeypatch.setattr(cu(), "cuModuleLoadData", lambda code: full)
    with pytest.raises(gg.OutOfMemoryError, match="loading rms_norm"):
        context.load([LAUNCH])
