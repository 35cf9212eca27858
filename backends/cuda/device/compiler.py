"""Compiling kernels with NVRTC for one architecture. Needs no GPU."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyggml.backends.cuda.weights import grids
from pyggml.errors import DeviceError
from pyggml.extras import install_command

KERNELS = Path(__file__).parent.parent / "kernels"
#: The options for every kernel. Arithmetic is IEEE: no flush to zero, exact division and square
#: root.
OPTIONS = ("--std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v", "-DNDEBUG")


class CompileError(DeviceError):
    """NVRTC rejected a kernel; the message contains its log."""


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled instance.

    symbol     its mangled name
    arch       the architecture of `code`, the machine code
    registers  per thread
    shared     bytes of static shared memory per block
    stack      bytes of a thread's stack frame
    spilled    bytes that a thread stores to local memory for lack of registers
    """

    name: str
    symbol: str
    arch: str
    registers: int
    shared: int
    stack: int
    spilled: int
    code: bytes


# -- NVRTC ------------------------------------------------------------------------------------


def folders(part: str) -> Iterator[Path]:
    """Folders that may be a toolkit's `lib` or `include`: pip's wheels, then an installed
    toolkit."""
    spec = find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec is not None else ():
        yield from sorted(Path(root).glob(f"cu[0-9]*/{part}"), reverse=True)
        yield from sorted(Path(root).glob(f"cuda_*/{part}"))
    for toolkit in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if toolkit:
            yield Path(toolkit) / ("lib64" if part == "lib" else part)


@cache
def nvrtc() -> Any:
    """NVRTC through ctypes; DeviceError with the install command if it is missing."""
    paths = [p for folder in folders("lib") for p in sorted(folder.glob("libnvrtc.so*[0-9]"))]
    for candidate in (*paths, Path("libnvrtc.so.13"), Path("libnvrtc.so.12")):
        try:
            # NVRTC loads its builtins by bare name, which works only if they are already loaded.
            for builtins in candidate.parent.glob("libnvrtc-builtins.so*[0-9]"):
                ctypes.CDLL(str(builtins))
            library = ctypes.CDLL(str(candidate))
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise DeviceError(f"NVRTC, the kernel compiler, is not installed; {install_command('kernels')}")


@cache
def nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@cache
def include_folders() -> tuple[Path, ...]:
    """Folders with the CUDA headers that kernels include; DeviceError if there are none."""
    for folder in folders("include"):
        if (folder / "cuda_fp16.h").is_file():
            return (folder, folder / "cccl") if (folder / "cccl").is_dir() else (folder,)
    raise DeviceError(
        f"the CUDA headers (cuda_fp16.h) are not installed; {install_command('kernels')}"
    )


def compile_instance(file: str, name: str, arch: str) -> Cubin:
    """Compile the instance `name` of kernels/`file`, ignoring the cache."""
    library, program = nvrtc(), ctypes.c_void_p()
    expression = name.encode()
    options = [
        *OPTIONS,
        f"--gpu-architecture=sm_{arch}",
        *(f"-I{p}" for p in (KERNELS / "include", *include_folders())),
    ]
    raw = [o.encode() for o in options]
    # Generated headers are passed as text.
    generated = [name for name in with_headers(file, {}) if name == grids.HEADER]
    names, texts = (
        (ctypes.c_char_p * len(generated))(*(part.encode() for part in parts))
        for parts in (generated, [_source(name) for name in generated])
    )
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program),
            _source(file).encode(),
            file.encode(),
            len(generated),
            texts,
            names,
        )
    )
    try:
        _check(library.nvrtcAddNameExpression(program, expression))
        status = library.nvrtcCompileProgram(program, len(raw), (ctypes.c_char_p * len(raw))(*raw))
        log = _text(library, program, "ProgramLog")
        if status:
            raise CompileError(
                f"kernels/{file} does not compile for sm_{arch} as {name} with NVRTC "
                f"{'.'.join(map(str, nvrtc_version()))}:\n{log}"
            )
        symbol = ctypes.c_char_p()
        _check(library.nvrtcGetLoweredName(program, expression, ctypes.byref(symbol)))
        mangled = (symbol.value or b"").decode()
        code = _text(library, program, "CUBIN", raw=True)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return Cubin(name, mangled, arch, *_resources(log, mangled), code)


def _check(status: int) -> None:
    if status:
        text = nvrtc().nvrtcGetErrorString(status).decode()
        raise CompileError(f"NVRTC failed: {text}")


def _text(library: Any, program: ctypes.c_void_p, what: str, raw: bool = False) -> Any:
    size = ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    memory = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, memory))
    return memory.raw if raw else memory.value.decode(errors="replace")


def _resources(log: str, symbol: str) -> tuple[int, int, int, int]:
    """Registers, shared memory, stack and spills of a kernel, from the assembler's report."""
    _, _, report = log.partition(f"Compiling entry function '{symbol}'")

    def number(pattern: str) -> int:
        match = re.search(pattern, report)
        return int(match[1]) if match else 0

    return (
        number(r"Used (\d+) registers"),
        number(r"(\d+) bytes smem"),
        number(r"(\d+) bytes stack frame"),
        number(r"(\d+) bytes spill stores"),
    )


# -- sources ----------------------------------------------------------------------------------


def _source(file: str) -> str:
    if file == grids.HEADER:
        return grids.header()
    try:
        return (KERNELS / "include" / file if file.endswith(".cuh") else KERNELS / file).read_text()
    except OSError as error:
        raise CompileError(f"kernels/{file} cannot be read: {error}") from None


def with_headers(file: str, seen: dict[str, str]) -> dict[str, str]:
    """The source and all kernel headers that it includes, by name."""
    if file not in seen:
        seen[file] = _source(file)
        for header in re.findall(r'^\s*#\s*include\s+"([^"]+)"', seen[file], re.MULTILINE):
            with_headers(header, seen)
    return seen
