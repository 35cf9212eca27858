"""The names of a step's kernels, from the launches that were recorded for it."""

from __future__ import annotations

from collections.abc import Sequence

from pyggml.backends.base import Kernels
from pyggml.backends.cuda.launch import Collective, Gemm, Launch, Record
from pyggml.backends.cuda.reasons import reason
from pyggml.backends.step import Step


def kernels_of(step: Step, records: Sequence[Record]) -> Kernels:
    """The kernels of a step, and why not the fast ones."""
    names = tuple(map(name_of, records))
    return Kernels(names, reason(step, names))


def name_of(record: Record) -> str:
    """The instance of a kernel; the sizes and types of a product of cuBLAS."""
    if isinstance(record, Launch):
        return record.name
    if isinstance(record, Gemm):
        batch = f" x {record.batch}" if record.batch > 1 else ""
        return f"cuBLAS {record.m} x {record.n} x {record.k}{batch} ({', '.join(record.types)})"
    if isinstance(record, Collective):
        return f"NCCL {record.kind} of {max(record.counts)} ({record.type})"
    return f"memcpy of {record.nbytes} bytes"
