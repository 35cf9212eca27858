"""Sums of rows of f16 through boxes: the kernels of two GPUs at the same time, on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import pyggml as gg
from pyggml.backends.cuda import moe_prompt, peer_rows, peer_sum
from pyggml.backends.cuda.argument import Tensor
from pyggml.backends.cuda.launch import Collective, Launch, Tail
from pyggml.backends.cuda.norm import Normed
from pyggml.joint import joint_reduce
from tests.cuda.emulated import Meeting
from tests.cuda.test_peer_sum import Floats, Gpus, odd


def launches(gpus: Gpus, parts: Sequence[Floats], outs: Sequence[Floats]) -> list[Launch]:
    rows, n = parts[0].shape
    result = []
    for i, boxes in enumerate(gpus.boxes):
        ends = outs[i].ctypes.data, parts[i].ctypes.data
        counts = (rows * n,) * gpus.count
        record = Collective("all_reduce", *ends, counts, "f32", gpus.places, i, row=n)
        assert peer_sum.suits(record)
        result.append(peer_sum.rows_launch(record, boxes, False))
    return result


def rounded(part: Floats) -> Floats:
    """What is sent of a part: rows of f16 and a power of two each."""
    finite = np.where(np.isfinite(part), np.abs(part), 0).max(1, keepdims=True)
    logs = np.floor(np.log2(np.maximum(finite, 2.0**-88)))
    with np.errstate(over="ignore", invalid="ignore"):
        halves = (part * np.exp2(14 - logs)).astype(np.float16)
        sent: Floats = (halves * np.exp2(logs - 14)).astype(np.float32)
    return sent


@pytest.fixture(scope="module")
def meeting(tmp_path_factory: pytest.TempPathFactory) -> Meeting:
    names = ["peer_rows", "peer_rows_norm<256>"]
    return Meeting(tmp_path_factory.mktemp("rows"), peer_rows.FILE, names)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Meeting:
    return Meeting(tmp_path_factory.mktemp("experts"), moe_prompt.FILE, ["add_short_joint<256>"])


def test_sums(meeting: Meeting) -> None:
    """Parts of several sizes, one after another, more rows than run at once, and numbers of all
    sizes: a word of an earlier round is never taken, and none stays behind."""
    rng, gpus = np.random.default_rng(0), Gpus(2)
    for order, (rows, n) in enumerate(
        [(1, 128), (9, 256), (40, 128), (3, 384), (9, 256), (1, 128)]
    ):
        parts = odd(rng, (2, rows, n)) * np.float32(10.0) ** rng.integers(-38, 38, (2, rows, 1))
        parts[0, -1], parts[1, -1, 1:3] = 0, (-np.nan, np.nan)
        parts = parts.astype(np.float32)
        outs = np.zeros_like(parts)
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = rounded(parts[0]) + rounded(parts[1])
        assert meeting.run(launches(gpus, parts, outs), resident=8, order=order)
        np.testing.assert_array_equal(outs[0], wanted)
        np.testing.assert_array_equal(outs[0].view(np.uint32), outs[1].view(np.uint32))
        for memory in gpus.memory:
            box = memory.data[peer_sum.words_bytes(2) :].view(np.uint32)
            assert np.flatnonzero(box).size == 1 and box.max() == order + 1  # the round


class Ends:
    """What a kernel with a norm reads and writes on one of two GPUs: residual, weight, sums, their
    norm as f32 and as f16."""

    eps = 1e-3

    def __init__(self, residual: Floats, weight: Floats, y: bool, total: bool) -> None:
        rows, n = residual.shape
        self.residual, self.weight, self.n = residual.copy(), weight, n
        self.total, self.y = (np.zeros_like(residual) for _ in range(2))
        self.halves, self.scales = np.zeros((rows, n), np.float16), np.zeros(rows, np.float32)
        self._absent = not y, not total

    def arguments(self) -> tuple[Any, Any, Any]:
        """Sums, residual, and the norm."""
        y, total = (tensor(x, absent) for x, absent in zip((self.y, self.total), self._absent))
        ends = {"halves": self.halves.ctypes.data, "scales": self.scales.ctypes.data}
        norm = Normed(y=y, w=tensor(self.weight), eps=self.eps, **ends)
        return total, tensor(self.residual), norm

    def check(self, x: Floats) -> None:
        """x: the sums."""
        y = x / np.sqrt((x * x).mean(1, keepdims=True) + self.eps) * self.weight
        if not self._absent[1]:
            np.testing.assert_allclose(self.total, x, rtol=1e-6, atol=1e-6)
        if not self._absent[0]:
            np.testing.assert_allclose(self.y, y, rtol=1e-5, atol=1e-6)
        place = np.arange(self.n)
        pair = place % 16 // 2
        place = place // 16 * 16 + pair % 2 * 8 + pair // 2 * 2 + place % 2
        left = self.halves[:, place].astype(np.float32) * self.scales[:, None]
        np.testing.assert_allclose(left, y, rtol=1e-3, atol=1e-6)


def tensor(x: Floats, absent: bool = False) -> Any:
    ne = x.shape[::-1] + (1,) * (4 - x.ndim)
    nb = x.strides[::-1] + (x.nbytes,) * (4 - x.ndim)
    return Tensor(data=0 if absent else x.ctypes.data, nb=nb, ne=ne)


def joint(gpus: Gpus, file: str, name: str, args: Sequence[Sequence[Any]]) -> list[Launch]:
    """The launches of a kernel with a norm; `args` of each GPU."""
    result = []
    for i, boxes in enumerate(gpus.boxes):
        rows, n = args[i][0].ne[1], args[i][0].ne[0]
        tail = Tail(Launch(file, name, (rows, 1, 1), (32, 1, 1), b""), tuple(args[i]), ())
        counts = (rows * n,) * 2
        record = Collective("all_reduce", 0, 0, counts, "f32", gpus.places, i, tail, n)
        result.append(peer_sum.rows_launch(record, boxes, False))
    return result


@pytest.mark.parametrize(("y", "total"), [(True, True), (False, True), (True, False)])
def test_sums_and_norms(meeting: Meeting, y: bool, total: bool) -> None:
    rng, gpus = np.random.default_rng(1), Gpus(2)
    for rows in (3, 5, 2):
        parts, residual = (rng.standard_normal((k, rows, 256), np.float32) for k in (2, 1))
        weight = rng.standard_normal(256, np.float32)
        ends = [Ends(residual[0], weight, y, total) for _ in range(2)]
        args = []
        for part, end in zip(parts, ends):
            sums, plus, norm = end.arguments()
            args.append((sums, np.uint64(part.ctypes.data), plus, norm))
        assert meeting.run(joint(gpus, peer_rows.FILE, "peer_rows_norm<256>", args), order=rows)
        for end in ends:
            end.check(rounded(parts[0]) + rounded(parts[1]) + residual[0])
        np.testing.assert_array_equal(ends[0].halves, ends[1].halves)


def test_sums_of_experts(experts: Meeting) -> None:
    """Each GPU has some pairs, of which some have further words; with shared experts or without."""
    rng, gpus, n, used = np.random.default_rng(2), Gpus(2), 256, 4
    for tokens, shared in ((3, True), (6, False)):
        residual, weight = rng.standard_normal((tokens, n), np.float32), np.ones(n, np.float32)
        pairs = tokens * used
        owner = rng.integers(0, 3, pairs)  # 2: nobody
        ends, args, parts, alive = [], [], [], []
        for gpu in range(2):
            halves = rng.standard_normal((pairs, 2 * n), np.float32).astype(np.float16)
            mine = np.flatnonzero(owner == gpu)
            values = halves[:, :n].astype(np.float32)
            long = mine[0]  # 2^17 does not fit f16
            bits = int(np.float32(2.0**17).view(np.uint32))
            words = halves.view(np.uint16)
            words[long, 5], words[long, n + 5] = 0x7C00 | bits >> 21 & 0x3FF, bits >> 5 & 0xFFFF
            values[long, 5] = 2.0**17
            places = np.full(pairs, -1, np.int32)
            places[mine] = rng.permutation(mine.size)
            scales = np.exp2(rng.integers(-12, -6, pairs)).astype(np.float32)
            shares = rng.random((tokens, used, 1), np.float32)
            more = rng.standard_normal((tokens, n), np.float32)
            factor = np.where(places < 0, 0, scales[places] * 256) * shares.reshape(-1)
            part = (values * factor[:, None]).reshape(tokens, used, n).sum(1) + more * shared
            parts.append(part.astype(np.float32))
            ends.append(Ends(residual, weight, True, True))
            sums, plus, norm = ends[-1].arguments()
            terms = (np.uint64(x.ctypes.data) for x in (halves, places, scales))
            args.append((sums, *terms, tensor(shares), tensor(more, not shared), plus, norm))
            alive.append((halves, places, scales, shares, more))
        launches = joint(gpus, moe_prompt.FILE, "add_short_joint<256>", args)
        assert experts.run(launches, order=tokens)
        for end in ends:
            wanted = rounded(parts[0]) + rounded(parts[1]) + residual
            np.testing.assert_allclose(end.total, wanted, rtol=2e-3, atol=2e-3)
            end.check(end.total)
        np.testing.assert_array_equal(ends[0].total, ends[1].total)
        np.testing.assert_array_equal(ends[0].halves, ends[1].halves)


def test_a_gpu_that_does_not_come(meeting: Meeting) -> None:
    gpus, parts = Gpus(2), np.ones((2, 3, 128), np.float32)
    outs = np.zeros_like(parts)
    first, _ = launches(gpus, parts, outs)
    assert not meeting.run([first], turns=2000)
    gpus.words[0, 0] = 1
    assert meeting.run([first])
    assert gpus.words[:, 1].tolist() == [2, 0]


def test_what_it_takes() -> None:
    """Parts that may be rounded, of rows that fit."""

    def width(ne: tuple[int, ...], places: int = 2, **attrs: Any) -> int:
        names = tuple(f"cuda:{i}" for i in range(places))
        attrs = {"places": names, "index": 0, "turn": 0} | attrs
        part = gg.input("part", ne=ne)
        return peer_rows.width_of(joint_reduce.make((part,), attrs, part.spec, line=False))

    assert width((2048, 64), exact=False) == 2048
    assert width((8192, 2048), exact=False) == 8192
    for ne, places, exact in (
        ((2048, 64), 2, True), ((2048, 64), 3, False), ((2048, 16), 2, False),
        ((2080, 64), 2, False), ((8320, 64), 2, False), ((128, 9000), 2, False),
        ((8192, 2049), 2, False),
    ):  # fmt: skip
        assert width(ne, places, exact=exact) == 0
    assert width((2048, 64)) == 0


def test_other_kinds_stay_with_nccl() -> None:
    record = Collective("all_reduce", 0, 0, (1 << 20,) * 2, "f32", ("a", "b"), 0, row=2048)
    assert peer_sum.suits(record)
    for other in (replace(record, row=0), replace(record, type="f16")):
        assert not peer_sum.suits(other)


@pytest.mark.parametrize(
    ("dtypes", "prec", "exact"),
    [("q8_0 f16", "default", False), ("q8_0 f32", "default", True), ("q8_0 f16", "f32", True)],
)
def test_parts_that_may_be_rounded(dtypes: str, prec: Any, exact: bool) -> None:
    """Only if all products that are added up have operands that may be."""
    x, total = gg.input("x", ne=(64, 32)), None
    for name, dtype in zip("ab", dtypes.split()):
        up, down = (
            gg.constant(np.zeros(shape, np.float32), name=f"{name}{part}", dtype=kind)
            for part, shape, kind in (("up", (128, 64), "q8_0"), ("down", (64, 128), dtype))
        )
        hidden = gg.fused_up_gate(up, up, x)
        y = gg.mul_mat(down, hidden, prec=prec if name == "b" else "default")
        total = y if total is None else gg.add(total, gg.reshape(y, ne=y.ne))
    assert total is not None
    places = ["cuda:0:24GiB", "cuda:1:24GiB"]
    plan = gg.compile({"y": total}, backends=places, shard={"rows": 2})
    sums = [node for node in plan._work.graph.nodes if node.op is joint_reduce]
    assert len(sums) == 2 and all(node.attrs["exact"] == exact for node in sums)
