"""Sums of one row over imitated GPUs without launches of their own: the bits are those of NCCL's
sum in front of the same kernels."""

from __future__ import annotations

import numpy as np
import pytest

import pyggml as gg
from pyggml import backends
from tests.cuda.compared import constant, random
from tests.cuda.test_many_gpus import Imitate, gpus, kernels, same  # noqa: F401
from tests.spmd.threads import every, ranks_of


def normed(x: gg.Node, name: str) -> gg.Node:
    return gg.mul(gg.rms_norm(x, eps=1e-5), gg.constant(random(x.ne[0]), name=f"norm_{name}"))


def net(x: gg.Node, name: str, dtype: str, hidden: int) -> gg.Node:
    k = x.ne[0]
    up, gate = (constant(f"{part}_{name}", dtype, hidden, k) for part in ("up", "gate"))
    return gg.mul_mat(constant(f"down_{name}", dtype, k, hidden), gg.fused_up_gate(up, gate, x))


def experts(x: gg.Node, dtype: str, shared: str | None) -> gg.Node:
    k, n, used, hidden = x.ne[0], 12, 4, 64
    probs = gg.soft_max(gg.mul_mat(gg.constant(random(n, k), name="router"), x, prec="f32"))
    ids = gg.top_k(probs, k=used)
    shares = gg.get_rows(gg.reshape(probs, ne=(1, n, 1)), ids)
    up, gate = (constant(name, dtype, n, hidden, k) for name in ("up", "gate"))
    rows = gg.moe_up_gate(up, gate, gg.reshape(x, ne=(k, 1, 1)), ids)
    y = gg.mul_multi_add(gg.mul_mat_id(constant("down", dtype, n, k, hidden), rows, ids), shares)
    return y if shared is None else gg.add(y, net(x, "shared", shared, 64 * 4))


def layer(k: int, dtype: str, shared: str | None) -> dict[str, gg.Node]:
    """A feed-forward net, experts, and two products, each behind a norm of what came before."""
    x = gg.input("x", ne=(k, 1))
    x = gg.add(x, net(normed(x, "a"), "a", dtype, 256))
    x = gg.add(experts(normed(x, "b"), dtype, shared), x)
    y = normed(x, "c")
    return {f"y{n}": gg.mul_mat(constant(f"w{n}", dtype, n, k), y) for n in (21, 30)} | {
        "x": gg.scale(x, s=2.0)
    }


def plan(count: int, outputs: dict[str, gg.Node], store: gg.Store | None = None) -> gg.Plan:
    places = [f"cuda:{i}" for i in range(count)]
    cut = {"rows": count, "experts": count}
    return gg.compile(outputs, backends=places, shard=cut, store=store)


def names(bound: gg.Plan, gpu: int) -> list[str]:
    """The kernels of a GPU that meet others, and the one that counts rounds."""
    runner = [runner for runner in bound.runners if hasattr(runner, "steps")][gpu]
    every = [name for i in range(len(runner.steps)) for name in runner.kernels(i).names]
    words = "NCCL", "peer_sum", "_sent", "Sent", "Summed", "end_of_run"
    return [name.split("<")[0] for name in every if any(word in name for word in words)]


@pytest.mark.parametrize(
    ("count", "k", "dtype", "shared"),
    [(2, 256, "q8_0", "q8_0"), (2, 2304, "iq4_nl", None), (3, 1056, "q8_0", "iq4_nl")],
)
def test_rows(
    gpus: Imitate, monkeypatch: pytest.MonkeyPatch,  # noqa: F811
    count: int, k: int, dtype: str, shared: str | None,
) -> None:  # fmt: skip
    """Kernel by kernel, captured, replayed, and in processes unless that takes long here; with
    numbers that are not finite."""
    gpus(count)
    outputs, x = layer(k, dtype, shared), {"x": random(1, k)}
    with monkeypatch.context() as patch:
        patch.setenv("PYGGML_PEER_SUM", "0")
        bound = plan(count, outputs).bind()
        assert all("NCCL" in name for name in names(bound, 0))
        wanted = bound.run(x)
        odd = {"x": x["x"].copy()}
        odd["x"][0, 3], odd["x"][0, -1] = np.nan, np.inf
        odder = bound.run(odd)
    for i in range(count):
        backends.get("cuda", i).context.communicators.clear()
    one = plan(count, outputs).bind()
    down = "down" if shared is None else "down_shared"
    meets = ["vec_sent", "norm_router", down]
    assert names(one, 0) == [*meets, "vec_normed" if k <= 2048 else "peer_sum_norm", "end_of_run"]
    assert names(one, 1) == [*meets, "peer_sum", "end_of_run"]  # it has no outputs
    for _ in range(3):
        same(one.run(x), wanted)
        same(one.run(odd), odder)
    whole = gg.compile(outputs).run(x)
    for name, values in whole.items():
        np.testing.assert_allclose(wanted[name], values, rtol=2e-3, atol=2e-3 * abs(values).max())
    if k > 2048:
        return
    parts = [plan(count, outputs, gg.Store(ranks=ranks)) for ranks in ranks_of(count)]
    for found in every([lambda part=part: part.run(x) for part in parts]):
        same(found, wanted)
