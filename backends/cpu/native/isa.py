"""The instruction set that kernels are compiled for: this machine's, or less."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

from pyggml.errors import DeviceError, UnknownNameError

#: The values of PYGGML_CPU_ISA, from the least. Each includes those before it; the LLVM features
#: that it needs, and LLVM's name of a processor with no more than that.
LEVELS: dict[str, tuple[tuple[str, ...], str]] = {
    "avx2": (("avx2", "fma", "f16c"), "haswell"),
    "avx512": (("avx512f", "avx512bw", "avx512vl", "avx512dq"), "skylake-avx512"),
    "vnni": (("avx512vnni",), "cascadelake"),
}


@dataclass(frozen=True, slots=True)
class Isa:
    """What kernels may use. `cpu` and `features` are LLVM's names for the target.

    avx512  512-bit vectors of bytes
    vnni    dot products of bytes in one instruction
    """

    name: str
    cpu: str
    features: str
    avx512: bool
    vnni: bool


def best() -> str | None:
    """The best level of this machine; None if it has not even AVX2."""
    from llvmlite import binding as llvm

    features = llvm.get_host_cpu_features()
    level = None
    for name, (needs, _) in LEVELS.items():
        if not all(features.get(feature, False) for feature in needs):
            break
        level = name
    return level


@cache
def isa() -> Isa:
    """The best level of this machine, or PYGGML_CPU_ISA if that is less.

    Errors: UnknownNameError for another value of PYGGML_CPU_ISA; DeviceError without AVX2.
    """
    from llvmlite import binding as llvm

    names, top = list(LEVELS), best()
    if top is None:
        raise DeviceError("the cpu backend needs a processor with AVX2, FMA and F16C")
    name = os.environ.get("PYGGML_CPU_ISA") or top
    if name not in LEVELS:
        raise UnknownNameError(f"PYGGML_CPU_ISA={name!r}: choose from {', '.join(names)}")
    if names.index(name) >= names.index(top):
        name, cpu = top, llvm.get_host_cpu_name()
        features = llvm.get_host_cpu_features().flatten()
    else:
        cpu, features = LEVELS[name][1], ""
    level = names.index(name)
    return Isa(name, cpu, features, avx512=level >= 1, vnni=level >= 2)
