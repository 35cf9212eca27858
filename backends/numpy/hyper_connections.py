"""Hyper-connections: several residual streams, mixed before and after a sublayer."""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.host_memory import Floats, Raw, Scratch
from pyggml.backends.numpy.table import kernel
from pyggml.backends.numpy.tiling import PIECE, scratch_bytes, shaped, split
from pyggml.node import Node


def _comb_tokens(hc: int, n_tokens: int) -> int:
    """Tokens of a piece."""
    return min(n_tokens, max(1, PIECE // (hc * hc)))


def _comb_scratch(node: Node) -> int:
    hc, _, tokens, _ = node.ne
    return scratch_bytes(_comb_tokens(hc, tokens) * hc)


@kernel(ops.dsv4_hc_maps, scratch=_comb_scratch)
def dsv4_hc_maps(
    out: Raw, mixes: Raw, scale: Raw, base: Raw, *, scratch: Scratch, eps: float, n_iter: int
) -> None:
    hc = out.shape[3]
    for i, (factor, more) in enumerate(((1, eps), (2, 0))):
        y, part = out[0, :, i], slice(i * hc, (i + 1) * hc)
        np.multiply(mixes[0, 0, :, part], -scale[0, 0, 0, i], out=y)
        y -= base[0, 0, 0, part]
        np.exp(y, out=y)
        y += 1
        np.divide(np.float32(factor), y, out=y)
        y += np.float32(more)
    comb = out[:, :, 2:]
    dsv4_hc_comb(comb, mixes, scale, base, scratch=scratch, eps=eps, n_iter=n_iter)


@kernel(ops.dsv4_hc_comb, scratch=_comb_scratch)
def dsv4_hc_comb(
    out: Raw, mixes: Raw, scale: Raw, base: Raw, *, scratch: Scratch, eps: float, n_iter: int
) -> None:
    n_tokens, hc = out.shape[1:3]
    step = _comb_tokens(hc, n_tokens)
    memory, e = scratch.array(step * hc), np.float32(eps)
    shift = base[0, 0, 0, 2 * hc :].reshape(hc, hc)

    def divide(c: Floats, axis: int) -> None:
        shape = list(c.shape)
        shape[axis] = 1
        sums = shaped(memory, *shape)
        np.sum(c, axis=axis, out=sums, keepdims=True)
        sums += e
        c /= sums

    for t in split(n_tokens, step):
        c = out[0, t]  # [token, source, target]
        np.multiply(mixes[0, 0, t, 2 * hc :].reshape(c.shape), scale[0, 0, 0, 2], out=c)
        c += shift
        best = shaped(memory, *c.shape[:2], 1)
        np.max(c, axis=2, out=best, keepdims=True)
        np.copyto(best, 0, where=best == -np.inf)
        c -= best
        np.exp(c, out=c)
        np.sum(c, axis=2, out=best, keepdims=True)
        np.copyto(best, 1, where=best == 0)
        c /= best
        c += e
        divide(c, 1)
        for _ in range(n_iter - 1):
            divide(c, 2)
            divide(c, 1)


@kernel(ops.dsv4_hc_post, scratch=lambda node: scratch_bytes(max(PIECE, node.ne[0])))
def dsv4_hc_post(
    out: Raw, x: Raw, residual: Raw, post: Raw, comb: Raw | None, *, scratch: Scratch
) -> None:
    n_tokens, hc, n = out.shape[1:]
    memory = scratch.array(max(PIECE, n))
    for t in split(n_tokens, max(1, PIECE // n)):
        y, old, new = out[0, t], residual[0, t], x[0, 0, t]
        part = shaped(memory, *new.shape)
        for d in range(hc):
            np.multiply(new, post[0, 0, t, d, None], out=y[:, d])
            if comb is None:
                y[:, d] += old[:, d]
                continue
            for s in range(hc):
                np.multiply(old[:, s], comb[0, t, s, d, None], out=part)
                y[:, d] += part
