"""Arrays of CuPy and PyTorch in and out of plans, steps without the host, copies."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import numpy as np
from gpu_faults import raises

import pyggml as gg
from pyggml import backends
from pyggml.errors import DTypeError, GraphError, ShapeError

X = np.random.default_rng(21).standard_normal((33, 640)).astype("f4")


def _doubled(kind: str = "f32") -> gg.Plan:
    x = gg.input("x", kind, ne=(640, 33))
    return gg.compile({"y": gg.scale(gg.cast(x, dtype="f32"), s=2.0), "x": x}, backends=["cuda"])


def _same(what: str, got: Any, want: Any) -> str:
    got, want = np.asarray(got), np.asarray(want)
    if got.shape == want.shape and got.tobytes() == want.astype(got.dtype).tobytes():
        return ""
    return f"{what}: {got.ravel()[:3]} for {want.ravel()[:3]}"


def _ptr(array: Any) -> int:
    return int(array.__cuda_array_interface__["data"][0])


class Interface:
    """An array without DLPack: the stream that it names counts."""

    def __init__(self, array: Any) -> None:
        self._array, self.__cuda_array_interface__ = array, array.__cuda_array_interface__


def _taken(array: Any, other: Any, write: Callable[[Any, np.ndarray], None]) -> str:
    """An array of a library by copy and bound, then another in its place; graphs follow."""
    plan = _doubled()
    for turn in range(3):  # kernel by kernel, captured, replayed
        write(array, X + turn)
        wrong = _same(f"by copy {turn}", plan.run(x=array)["y"], 2 * (X + turn))
        if wrong:
            return wrong
    for held in (array, other):
        plan.bind(x=held)
        for turn in range(4):
            write(held, X - turn)
            seen = plan.views()
            wrong = _same(f"bound {turn}", seen["y"], 2 * (X - turn))
            if wrong or _ptr(seen["x"]) != _ptr(held):
                return wrong or "the input was copied"
    plan.bind(x=None)
    wrong = _same("unbound", plan.run(x=X)["y"], 2 * X)
    refused = raises(GraphError, lambda: plan.bind(x=plan.views(x=X)["y"]), "arena")
    return wrong or refused


def _cupy() -> str:
    import cupy

    def write(array: Any, values: np.ndarray) -> None:
        array.set(values)

    one, two = cupy.asarray(X), cupy.asarray(X)
    y = _doubled().views(x=one)["y"]
    for seen in (cupy.asarray(y), cupy.from_dlpack(y)):
        if seen.data.ptr != _ptr(y) or (seen.get() != 2 * X).any():
            return "CuPy does not see the output where it is"
    return (
        _taken(one, two, write)
        or raises(DTypeError, lambda: _doubled().run(x=cupy.zeros((33, 640), "f8")), "float64")
        or raises(ShapeError, lambda: _doubled().run(x=cupy.zeros((640, 33), "f4").T), "strides")
    )


def _cupy_stream() -> str:
    """An array that a stream of its own is still to write is read after that."""
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    slow, source, given = cupy.empty(1 << 28, "u1"), cupy.asarray(X), cupy.empty(X.shape, "f4")
    cupy.cuda.Device().synchronize()

    for how in (lambda array: array, Interface):  # the second reads the stream when it is made
        for bound in (False, True):
            plan = _doubled().bind()
            given.data.memset(0, given.nbytes)
            cupy.cuda.Device().synchronize()
            with stream:
                for _ in range(200):
                    slow.data.memset_async(1, slow.nbytes, stream)
                given.data.copy_from_device_async(source.data, source.nbytes, stream)
                array = how(given)
                got = plan.bind(x=array).run() if bound else plan.run(x=array)
            wrong = _same(f"{how} bound={bound}", got["y"], 2 * X)
            if wrong:
                return wrong
    return ""


def _torch() -> str:
    try:
        import torch
    except ImportError:
        print("     PyTorch is not installed: not shown with it")
        return ""

    def write(array: Any, values: np.ndarray) -> None:
        array.copy_(torch.from_numpy(values))

    one, two = (torch.zeros((33, 640), device="cuda") for _ in range(2))
    wrong = _taken(one, two, write)
    write(one, X)
    y = _doubled().views(x=one)["y"]
    for seen in (torch.from_dlpack(y), torch.as_tensor(y, device="cuda")):
        if seen.data_ptr() != _ptr(y) or (seen.cpu().numpy() != 2 * X).any():
            return wrong or "PyTorch does not see the output where it is"
    half = one.to(torch.bfloat16)
    bf16 = _doubled("bf16").bind(x=half).run()["y"]
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        late = torch.empty_like(one)
        torch.cuda._sleep(100_000_000)
        late.copy_(one)
        got = _doubled().run(x=late)["y"]
    return (
        wrong
        or _same("bf16", bf16, 2 * half.float().cpu().numpy())
        or _same("late", got, 2 * X)
        or raises(DTypeError, lambda: _doubled().run(x=half), "bfloat16")
        or raises(DTypeError, lambda: _doubled().run(x=one.requires_grad_()), "share")
    )


# -- steps without the host ----------------------------------------------------------------------

WIDTH, HEADS, ROWS, VOCABULARY = 64, 4, 128, 512


def greedy() -> dict[str, gg.Node]:
    """One step of greedy decoding: a layer of attention over a cache, then the likeliest token."""
    rng = np.random.default_rng(22)

    def weight(name: str, *shape: int) -> gg.Node:
        return gg.constant(rng.standard_normal(shape).astype("f4") / shape[-1] ** 0.5, name=name)

    token, pos = (gg.state(name, "i32", ne=(1,)) for name in ("token", "pos"))
    x = gg.get_rows(weight("embd", VOCABULARY, WIDTH), token)
    q, k, v = (gg.mul_mat(weight(name, WIDTH, WIDTH), x) for name in "qkv")
    heads = (WIDTH // HEADS, HEADS)
    q = gg.rope_ext(gg.reshape(q, ne=(*heads, 1)), pos, n_dims=heads[0])
    k = gg.rope_ext(gg.reshape(k, ne=(*heads, 1)), pos, n_dims=heads[0])
    held = []
    for name, row in (("k", k), ("v", v)):
        cache = gg.state(f"cache_{name}", "f32", ne=(WIDTH, ROWS))
        cache = gg.set_rows(cache, gg.reshape(row, ne=(WIDTH, 1)), pos)
        held.append(gg.permute(gg.reshape(cache, ne=(*heads, ROWS)), axes=(0, 2, 1, 3)))
    scores = gg.mul_mat(held[0], gg.permute(q, axes=(0, 2, 1, 3)))
    soft = gg.soft_max_ext(scores, gg.causal_mask(pos, n_kv=ROWS), scale=0.25)
    mixed = gg.cont(gg.permute(gg.mul_mat(gg.cont(gg.transpose(held[1])), soft), axes=(0, 2, 1, 3)))
    mixed = gg.mul_mat(weight("o", WIDTH, WIDTH), gg.reshape(mixed, ne=(WIDTH, 1)))
    x = gg.add(gg.label(gg.silu(mixed), "middle"), x)
    best = gg.argmax(gg.mul_mat(weight("head", VOCABULARY, WIDTH), x))
    ids = gg.set_rows(gg.state("ids", "i32", ne=(1, ROWS)), gg.reshape(best, ne=(1, 1)), pos)
    one = gg.constant(np.ones(1, "i4"), name="one")
    return {"token": gg.cpy(best, token), "pos": gg.cpy(gg.add(pos, one), pos), "ids": ids}


def _decoded(repeats: list[int], **options: Any) -> list[int]:
    """The tokens of so many steps in runs of these lengths."""
    plan = gg.compile(greedy(), **options).bind()
    plan.store.write("token", [7])
    for count in repeats:
        plan.repeat(count)
    done = int(plan.store.read("pos")[0])
    return [int(i) for i in plan.store.read("ids")[:done, 0]]


def _steps() -> str:
    """100 steps in one go, in two, and one by one; and on NumPy. Then with a step on the host."""
    want = _decoded([1] * 100, backends=["numpy"])
    if len(set(want)) < 20:
        return f"the tokens repeat: {want}"
    for repeats in ([1] * 100, [100], [2, 98]):
        got = _decoded(repeats, backends=["cuda"])
        if got != want:
            return f"{repeats[:3]}..: {got[:8]} for {want[:8]}"
    mixed: dict[str, Any] = {"backends": ["cuda", "numpy"], "pins": {"middle": "numpy"}}
    for repeats in ([1] * 100, [100]):
        got = _decoded(repeats, **mixed)
        if got != want:
            return f"mixed {repeats[:3]}..: {got[:8]} for {want[:8]}"
    return ""


# -- copies between devices ----------------------------------------------------------------------


def _copies() -> str:
    """Steps on the host between steps on the GPU, run after run: large and small, whole and
    strided, all bits as the first time and as NumPy's."""
    for ne in ((640, 33), (4096, 1500)):  # the second does not fit into the pinned ring
        x = gg.input("x", ne=ne)
        a = gg.label(gg.silu(gg.label(gg.scale(x, s=2.0), "gpu a")), "host a")
        turned = gg.label(gg.cont(gg.transpose(gg.label(gg.add(a, x), "gpu b"))), "gpu c")
        b = gg.label(gg.relu(turned), "host b")
        part = gg.view(b, ne=(ne[1] // 2, ne[0] // 2), start=(3, 1), step=(1, 2))
        held = gg.label(gg.cont(part), "gpu d")
        c = gg.label(gg.sqr(held), "host c")
        y = {
            "y": gg.label(gg.scale(gg.label(gg.concat(c, held, dim=1), "gpu e"), s=0.5), "gpu f"),
            "z": gg.label(gg.sum_rows(b), "gpu g"),
        }
        plan = gg.compile(y, backends=["cuda", "numpy"], pins={"^host": "numpy", "^gpu": "cuda"})
        if [split.backend.place for split in plan.splits].count("numpy") != 3:
            return f"other splits than meant:\n{plan}"
        given = np.random.default_rng(4).standard_normal(ne[::-1]).astype("f4")
        want = gg.compile(y).run(x=given)
        first = plan.run(x=given)
        for turn in range(25 if ne[0] == 640 else 4):
            got = plan.repeat(1 + turn % 3, x=given)
            for key in y:
                error = np.linalg.norm(got[key] - want[key]) / np.linalg.norm(want[key])
                if got[key].tobytes() != first[key].tobytes() or not error < 1e-6:
                    return f"{ne} run {turn}: {key} differs, relative error {error}"
    return ""


def _two_gpus() -> str:
    """Parts on two GPUs: copies straight between them, states on both, steps without the host."""
    device: Any = backends.get("cuda")
    with device.context:
        count = device.context.driver.Device.count()
    if count < 2:
        print("     there is one GPU here: not shown on two")
        return ""
    import cupy

    pins = {r"^(k|o|cache_k)$": "cuda:1", "middle": "cuda:1"}
    want = _decoded([1] * 100, backends=["numpy"])
    for repeats in ([1] * 100, [100], [2, 98]):
        got = _decoded(repeats, backends=["cuda:0", "cuda:1"], pins=pins)
        if got != want:
            return f"{repeats[:3]}..: {got[:8]} for {want[:8]}"
    x = gg.input("x", ne=(640, 33))
    made = {"a": gg.label(gg.scale(x, s=2.0), "on 0"), "b": gg.label(gg.scale(x, s=3.0), "on 1")}
    plan = gg.compile(
        made, backends=["cuda:0", "cuda:1"], pins={"on 0": "cuda:0", "on 1": "cuda:1"}
    )
    for index in range(2):
        with cupy.cuda.Device(index):
            given = cupy.asarray(X)
            cupy.cuda.Device(index).synchronize()
        for got in (plan.run(x=given), plan.bind(x=given).run(), plan.run()):
            wrong = _same(f"from {index} on 0", got["a"], 2 * X) or _same(
                f"from {index} on 1", got["b"], 3 * X
            )
            if wrong:
                return wrong
        plan.bind(x=None)
    return ""


def _let_go() -> str:
    """Memory is as it was before; arrays that were bound are let go with the plan."""
    from weakref import ref

    import cupy

    from tests.cuda.allocations import ALLOCATIONS

    gc.collect()
    ALLOCATIONS.watch(backends.get("cuda").context.driver)  # type: ignore[attr-defined]
    before = ALLOCATIONS.blocks
    given = Interface(cupy.asarray(X))
    alive = ref(given)
    plan = _doubled().bind(x=given)
    y = plan.views()["y"]
    seen = cupy.from_dlpack(y)
    del plan, given, y
    gc.collect()
    if (seen.get() != 2 * X).any():
        return "an output's memory did not outlive the plan"
    if alive() is not None:
        return "the plan is gone and its array is not"
    del seen
    _decoded([1, 5], backends=["cuda"])
    gc.collect()
    left = ALLOCATIONS.blocks - before
    return f"{left} blocks stay" if left else ""


CHECKS = (_cupy, _cupy_stream, _torch, _steps, _copies, _two_gpus, _let_go)
