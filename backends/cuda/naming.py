"""The names of a step's kernels, from its launches. Needs no GPU."""

from __future__ import annotations

from pyggml.backends.cuda.gpu import Device
from pyggml.backends.cuda.launch import Gemm, Launch, Record
from pyggml.backends.cuda.runner import record_step
from pyggml.backends.step import Addresses, LoadStep, Step


def names_of(step: Step, at: Addresses, scratch: int, device: Device) -> list[str]:
    """The launches of a step by name; see `NamesKernels`."""
    if isinstance(step, LoadStep):
        return []
    memory = (scratch, step.scratch)
    return [name_of(r) for r in record_step(step, at, memory, device, names_only=True)]


def name_of(record: Record) -> str:
    """The instance of a kernel; the sizes and types of a product of cuBLAS."""
    if isinstance(record, Launch):
        return record.name
    if isinstance(record, Gemm):
        batch = f" x {record.batch}" if record.batch > 1 else ""
        return f"cuBLAS {record.m} x {record.n} x {record.k}{batch} ({', '.join(record.types)})"
    return f"memcpy of {record.nbytes} bytes"
