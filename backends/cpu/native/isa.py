"""The instruction set that kernels are compiled for: this machine's, or less."""

from __future__ import annotations

import ctypes
import os
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pyggml.errors import DeviceError, UnknownNameError

#: The values of PYGGML_CPU_ISA, from the least. Each includes those before it; the LLVM features
#: that it needs, and LLVM's name of a processor with no more than that.
LEVELS: dict[str, tuple[tuple[str, ...], str]] = {
    "avx2": (("avx2", "fma", "f16c"), "haswell"),
    "avx512": (("avx512f", "avx512bw", "avx512vl", "avx512dq"), "skylake-avx512"),
    "vnni": (("avx512vnni",), "cascadelake"),
    "amx": ((), "sapphirerapids"),  # see `has_tiles`
}
#: For tests: the best level below `amx`, whose kernels do the work of AMX in vectors.
EMULATED = "amx-emulated"
TILE_FEATURES = "+amx-tile,+amx-bf16,+avx512bf16"


@dataclass(frozen=True, slots=True)
class Isa:
    """What kernels may use. `cpu` and `features` are LLVM's names for the target.

    avx512    512-bit vectors of bytes
    vnni      dot products of bytes in one instruction
    amx       tiles of bf16, and conversions to it
    emulated  kernels for tiles, without tiles
    """

    name: str
    cpu: str
    features: str
    avx512: bool
    vnni: bool
    amx: bool
    emulated: bool

    @property
    def bf16(self) -> bool:
        """Whether one instruction rounds floats to bf16."""
        return "+avx512bf16" in self.features


@cache
def has_tiles() -> bool:
    """Whether this process may use AMX with bf16. Asks the kernel for it: tiles are 8 KiB of state
    that Linux keeps only for processes that want them. Needs no LLVM, so plans can ask."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    line = next((line for line in text.splitlines() if line.startswith("flags")), "")
    if not {"amx_tile", "amx_bf16", "avx512_bf16", "avx512_vnni"} <= set(line.split()):
        return False
    if sys.platform != "linux":
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18  # ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    syscall = ctypes.CDLL(None).syscall
    syscall.restype = ctypes.c_long
    return bool(syscall(*map(ctypes.c_long, (arch_prctl, request, tile_data))) == 0)


@cache
def multiplies_tiles() -> bool:
    """Whether `isa()` has tiles, without LLVM."""
    name = os.environ.get("PYGGML_CPU_ISA") or "amx"
    return name == EMULATED or (name == "amx" and has_tiles())


def best() -> str | None:
    """The best level of this machine; None if it has not even AVX2."""
    from llvmlite import binding as llvm

    features = llvm.get_host_cpu_features()
    level = None
    for name, (needs, _) in LEVELS.items():
        if not all(features.get(feature, False) for feature in needs):
            break
        if name == "amx" and not has_tiles():
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
    emulated = name == EMULATED
    if emulated:
        name = min(top, "vnni", key=names.index)
    if name not in LEVELS:
        raise UnknownNameError(f"PYGGML_CPU_ISA={name!r}: choose from {', '.join(names)}")
    if names.index(name) >= names.index(top):
        name, cpu = top, llvm.get_host_cpu_name()
        features = llvm.get_host_cpu_features().flatten()
        if top == "amx":
            features = f"{features},{TILE_FEATURES}"
    else:
        cpu, features = LEVELS[name][1], ""
    level = names.index(name)
    return Isa(
        name, cpu, features, avx512=level >= 1, vnni=level >= 2, amx=level >= 3, emulated=emulated
    )
