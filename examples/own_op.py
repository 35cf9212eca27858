"""Defining your own op: a shape rule and a NumPy kernel, or a meaning in other ops."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

import pyggml as gg
from pyggml.backends.numpy import kernel
from pyggml.define import Node, Spec


@gg.op
def cumsum(a: Node, *, reverse: bool = False) -> Spec:
    """y[i] = a[0] + .. + a[i] along each row; reverse: a[i] + .. to the end.   a, y  f32"""
    if a.dtype.name != "f32":
        raise gg.DTypeError(f"a has type {a.dtype}, expected f32")
    return a.spec


@kernel(cumsum)
def _(out: Any, a: Any, *, reverse: bool) -> None:
    order = slice(None, None, -1 if reverse else 1)
    np.cumsum(a[..., order], axis=-1, out=out[..., order])


@gg.op
def swish_mean(a: Node, *, eps: float = 0.0) -> Spec:
    """y = silu(a) / (mean of the row + eps). Other ops express it, so every backend can run it."""
    return a.spec


@swish_mean.means
def _(a: Node, *, eps: float = 0.0) -> Node:
    return gg.div(gg.silu(a), gg.scale(gg.sum_rows(a), s=1 / a.ne[0], b=eps))


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=__doc__).parse_args(argv)
    x = gg.input("x", "f32", ne=(5, 2))
    plan = gg.compile({"sum": cumsum(x, reverse=True), "mean": swish_mean(cumsum(x))})
    print(plan)
    print(plan.run(x=np.ones((2, 5))))


if __name__ == "__main__":
    main()
