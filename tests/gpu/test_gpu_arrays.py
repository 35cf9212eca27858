"""Arrays of CuPy and PyTorch, many steps without the host, copies between devices, on a GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from pyggml.errors import DTypeError, GraphError, ShapeError
from tests.gpu.checks import apart, equal, refused

X = np.random.default_rng(21).standard_normal((33, 640)).astype("f4")


def _doubled(dtype: str = "f32") -> gg.Plan:
    x = gg.input("x", dtype, ne=(640, 33))
    return gg.compile({"y": gg.scale(gg.cast(x, dtype="f32"), s=2.0), "x": x}, backends=["cuda"])


def _ptr(array: Any) -> int:
    return int(array.__cuda_array_interface__["data"][0])


class Interface:
    """An array without DLPack, whose stream is in `__cuda_array_interface__`."""

    def __init__(self, array: Any) -> None:
        self._array, self.__cuda_array_interface__ = array, array.__cuda_array_interface__


def check_taken(array: Any, other: Any, write: Callable[[Any, np.ndarray], None]) -> None:
    """Run with the array copied, bound, and replaced; CUDA graphs must be recorded again."""
    plan = _doubled()
    for turn in range(3):  # launched, captured, replayed
        write(array, X + turn)
        equal(plan.run(x=array)["y"], 2 * (X + turn))
    for bound in (array, other):
        plan.bind(x=bound)
        for turn in range(4):
            write(bound, X - turn)
            views = plan.views()
            equal(views["y"], 2 * (X - turn))
            assert _ptr(views["x"]) == _ptr(bound), "the input was copied"
    plan.bind(x=None)
    equal(plan.run(x=X)["y"], 2 * X)
    refused(GraphError, lambda: plan.bind(x=plan.views(x=X)["y"]), "arena")


def test_cupy() -> None:
    import cupy

    def write(array: Any, values: np.ndarray) -> None:
        array.set(values)

    first, second = cupy.asarray(X), cupy.asarray(X)
    y = _doubled().views(x=first)["y"]
    for view in (cupy.asarray(y), cupy.from_dlpack(y)):
        assert view.data.ptr == _ptr(y) and (view.get() == 2 * X).all()
    check_taken(first, second, write)
    refused(DTypeError, lambda: _doubled().run(x=cupy.zeros((33, 640), "f8")), "float64")
    refused(ShapeError, lambda: _doubled().run(x=cupy.zeros((640, 33), "f4").T), "strides")


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("interface", [False, True])
def test_an_array_that_a_stream_still_writes_is_read_after_that(
    interface: bool, bound: bool
) -> None:
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    slow, source, target = cupy.empty(1 << 28, "u1"), cupy.asarray(X), cupy.empty(X.shape, "f4")
    plan = _doubled().bind()
    target.data.memset(0, target.nbytes)
    cupy.cuda.Device().synchronize()
    with stream:
        for _ in range(200):
            slow.data.memset_async(1, slow.nbytes, stream)
        target.data.copy_from_device_async(source.data, source.nbytes, stream)
        array = Interface(target) if interface else target  # Interface reads the stream here
        results = plan.bind(x=array).run() if bound else plan.run(x=array)
    equal(results["y"], 2 * X)


def test_torch() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")

    def write(array: Any, values: np.ndarray) -> None:
        array.copy_(torch.from_numpy(values))

    first, second = (torch.zeros((33, 640), device="cuda") for _ in range(2))
    check_taken(first, second, write)
    write(first, X)
    y = _doubled().views(x=first)["y"]
    for view in (torch.from_dlpack(y), torch.as_tensor(y, device="cuda")):
        assert view.data_ptr() == _ptr(y) and (view.cpu().numpy() == 2 * X).all()
    half = first.to(torch.bfloat16)
    equal(_doubled("bf16").bind(x=half).run()["y"], 2 * half.float().cpu().numpy())
    with torch.cuda.stream(torch.cuda.Stream()):
        late = torch.empty_like(first)
        torch.cuda._sleep(100_000_000)
        late.copy_(first)
        results = _doubled().run(x=late)
    equal(results["y"], 2 * X)
    refused(DTypeError, lambda: _doubled().run(x=half), "bfloat16")
    refused(DTypeError, lambda: _doubled().run(x=first.requires_grad_()), "share")


# -- steps without the host ----------------------------------------------------------------------

WIDTH, HEADS, ROWS, VOCABULARY = 64, 4, 128, 512


def greedy() -> dict[str, gg.Node]:
    """One step of greedy decoding: one layer of attention over a cache, then argmax."""
    rng = np.random.default_rng(22)

    def weight(name: str, *shape: int) -> gg.Node:
        return gg.constant(rng.standard_normal(shape).astype("f4") / shape[-1] ** 0.5, name=name)

    token, pos = (gg.state(name, "i32", ne=(1,)) for name in ("token", "pos"))
    x = gg.get_rows(weight("embd", VOCABULARY, WIDTH), token)
    q, k, v = (gg.mul_mat(weight(name, WIDTH, WIDTH), x) for name in "qkv")
    heads = (WIDTH // HEADS, HEADS)
    q = gg.rope_ext(gg.reshape(q, ne=(*heads, 1)), pos, n_dims=heads[0])
    k = gg.rope_ext(gg.reshape(k, ne=(*heads, 1)), pos, n_dims=heads[0])
    caches = []
    for name, row in (("k", k), ("v", v)):
        cache = gg.state(f"cache_{name}", "f32", ne=(WIDTH, ROWS))
        cache = gg.set_rows(cache, gg.reshape(row, ne=(WIDTH, 1)), pos)
        caches.append(gg.permute(gg.reshape(cache, ne=(*heads, ROWS)), axes=(0, 2, 1, 3)))
    scores = gg.mul_mat(caches[0], gg.permute(q, axes=(0, 2, 1, 3)))
    soft = gg.soft_max_ext(scores, gg.causal_mask(pos, n_kv=ROWS), scale=0.25)
    mixed = gg.cont(
        gg.permute(gg.mul_mat(gg.cont(gg.transpose(caches[1])), soft), axes=(0, 2, 1, 3))
    )
    mixed = gg.mul_mat(weight("o", WIDTH, WIDTH), gg.reshape(mixed, ne=(WIDTH, 1)))
    x = gg.add(gg.label(gg.silu(mixed), "middle"), x)
    best = gg.argmax(gg.mul_mat(weight("head", VOCABULARY, WIDTH), x))
    ids = gg.set_rows(gg.state("ids", "i32", ne=(1, ROWS)), gg.reshape(best, ne=(1, 1)), pos)
    one = gg.constant(np.ones(1, "i4"), name="one")
    return {"token": gg.cpy(best, token), "pos": gg.cpy(gg.add(pos, one), pos), "ids": ids}


def _decoded(repeats: list[int], **options: Any) -> list[int]:
    """The tokens that `repeat` generates with these counts."""
    plan = gg.compile(greedy(), **options).bind()
    plan.store.write("token", [7])
    for count in repeats:
        plan.repeat(count)
    count = int(plan.store.read("pos")[0])
    return [int(i) for i in plan.store.read("ids")[:count, 0]]


@pytest.mark.parametrize(
    "options",
    [
        {"backends": ["cuda"]},
        {"backends": ["cuda", "numpy"], "pins": {"middle": "numpy"}},
        {"backends": ["cuda:0", "cuda:1"], "pins": {r"^(k|o|cache_k|middle)$": "cuda:1"}},
    ],
    ids=["cuda", "cuda and host", "two GPUs"],
)
def test_steps_without_the_host(options: dict[str, Any]) -> None:
    """100 steps, in one call, in two or one by one, give the same tokens as on NumPy, also with a
    part of each step on the host or on another GPU."""
    if "cuda:1" in options["backends"]:
        needs_two()
    expected = _decoded([1] * 100, backends=["numpy"])
    assert len(set(expected)) >= 20, f"the tokens repeat: {expected}"
    for repeats in ([1] * 100, [100], [2, 98]):
        assert _decoded(repeats, **options) == expected, f"in {len(repeats)} calls"


def needs_two() -> None:
    device: Any = backends.get("cuda")
    with device.context:
        count = device.context.driver.Device.count()
    if count < 2:
        pytest.skip("there is one GPU here")


# -- copies between devices ----------------------------------------------------------------------


@pytest.mark.parametrize(("ne", "runs"), [((640, 33), 25), ((4096, 1500), 4)])
def test_copies(ne: tuple[int, int], runs: int) -> None:
    """Steps on the host between steps on the GPU, many times: large copies (more than the pinned
    ring) and small ones, contiguous and strided. Every run gives the same bits, and NumPy's
    results."""
    x = gg.input("x", ne=ne)
    a = gg.label(gg.silu(gg.label(gg.scale(x, s=2.0), "gpu a")), "host a")
    turned = gg.label(gg.cont(gg.transpose(gg.label(gg.add(a, x), "gpu b"))), "gpu c")
    b = gg.label(gg.relu(turned), "host b")
    part = gg.view(b, ne=(ne[1] // 2, ne[0] // 2), start=(3, 1), step=(1, 2))
    rows = gg.label(gg.cont(part), "gpu d")
    c = gg.label(gg.sqr(rows), "host c")
    y = {
        "y": gg.label(gg.scale(gg.label(gg.concat(c, rows, dim=1), "gpu e"), s=0.5), "gpu f"),
        "z": gg.label(gg.sum_rows(b), "gpu g"),
    }
    plan = gg.compile(y, backends=["cuda", "numpy"], pins={"^host": "numpy", "^gpu": "cuda"})
    on_host = [split.backend.place for split in plan.splits if split.steps].count("numpy")
    assert on_host == 3, f"unexpected splits:\n{plan}"
    array = np.random.default_rng(4).standard_normal(ne[::-1]).astype("f4")
    expected = gg.compile(y).run(x=array)
    first = plan.run(x=array)
    for turn in range(runs):
        results = plan.repeat(1 + turn % 3, x=array)
        for key in y:
            assert results[key].tobytes() == first[key].tobytes(), f"run {turn}: {key} differs"
            assert apart(results[key], expected[key]) < 1e-6, f"run {turn}: {key}"


def test_arrays_of_two_gpus() -> None:
    """An array on either GPU as the input of both: copied, bound, and read again."""
    needs_two()
    import cupy

    x = gg.input("x", ne=(640, 33))
    parts = {"a": gg.label(gg.scale(x, s=2.0), "on 0"), "b": gg.label(gg.scale(x, s=3.0), "on 1")}
    pins = {"on 0": "cuda:0", "on 1": "cuda:1"}
    plan = gg.compile(parts, backends=["cuda:0", "cuda:1"], pins=pins)
    for index in range(2):
        with cupy.cuda.Device(index):
            array = cupy.asarray(X)
            cupy.cuda.Device(index).synchronize()
        for results in (plan.run(x=array), plan.bind(x=array).run(), plan.run()):
            equal(results["a"], 2 * X)
            equal(results["b"], 3 * X)
        plan.bind(x=None)


def test_memory_is_freed() -> None:
    """All memory is freed, and bound arrays are released with the plan."""
    from weakref import ref

    import cupy

    from tests.cuda.allocations import ALLOCATIONS

    gc.collect()
    device: Any = backends.get("cuda")
    ALLOCATIONS.watch(device.context.driver)
    before = ALLOCATIONS.blocks
    array = Interface(cupy.asarray(X))
    alive = ref(array)
    plan = _doubled().bind(x=array)
    y = plan.views()["y"]
    view = cupy.from_dlpack(y)
    del plan, array, y
    gc.collect()
    assert (view.get() == 2 * X).all(), "the output's memory was freed with the plan"
    assert alive() is None, "the array outlived the plan"
    del view
    _decoded([1, 5], backends=["cuda"])
    gc.collect()
    assert ALLOCATIONS.blocks == before


def test_results_stay_as_they_are() -> None:
    """Large results are views of pinned memory, which later runs must not overwrite."""
    x = gg.input("x", ne=(1 << 16,))
    plan = gg.compile({"y": gg.scale(x, s=2.0)}, backends=["cuda"])
    arrays = [
        np.arange(1 << 16, dtype=np.float32) + i for i in range(40)
    ]  # more than there is room
    queued = [plan.submit(x=array) for array in arrays[:20]]
    results = [plan.run(x=array)["y"] for array in arrays[20:]]
    results = [run.result()["y"] for run in queued] + results
    assert all(np.array_equal(y, 2 * array) for y, array in zip(results, arrays, strict=True))
