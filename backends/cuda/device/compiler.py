"""Kernels compiled by NVRTC for one architecture, and a cache of what it made. Needs no GPU."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyggml.backends.cuda.device.install import extra
from pyggml.backends.cuda.weights import grids
from pyggml.errors import DeviceError

KERNELS = Path(__file__).parent.parent / "kernels"
#: Of every kernel. Numbers are IEEE's: no flush to zero, exact division and square root.
OPTIONS = ("--std=c++17", "--device-as-default-execution-space", "--ptxas-options=-v", "-DNDEBUG")


class CompileError(DeviceError):
    """A kernel that NVRTC refuses; the text holds its log."""


@dataclass(frozen=True, slots=True)
class Cubin:
    """A compiled instance.

    symbol     its mangled name;  code: the machine code;  arch: what it is for
    registers  a thread;  shared: bytes of static shared memory a block
    spilled    bytes a thread stores to local memory because registers ran out;  stack: its frame
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
    """Where a toolkit's `lib` or `include` may be: pip's wheels, then an installed toolkit."""
    spec = find_spec("nvidia")
    for root in spec.submodule_search_locations or () if spec is not None else ():
        yield from sorted(Path(root).glob(f"cu[0-9]*/{part}"), reverse=True)
        yield from sorted(Path(root).glob(f"cuda_*/{part}"))
    for toolkit in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if toolkit:
            yield Path(toolkit) / ("lib64" if part == "lib" else part)


@cache
def nvrtc() -> Any:
    """NVRTC by ctypes; DeviceError says how to install it."""
    found = [p for folder in folders("lib") for p in sorted(folder.glob("libnvrtc.so*[0-9]"))]
    for candidate in (*found, Path("libnvrtc.so.13"), Path("libnvrtc.so.12")):
        try:
            # Its other half is looked for by name only: loaded first, it is found.
            for half in candidate.parent.glob("libnvrtc-builtins.so*[0-9]"):
                ctypes.CDLL(str(half))
            library = ctypes.CDLL(str(candidate))
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise DeviceError(f"NVRTC, the compiler of kernels, is not installed; {extra('kernels')}")


@cache
def nvrtc_version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


@cache
def include_folders() -> tuple[Path, ...]:
    """Folders with the CUDA headers that kernels include; DeviceError where there are none."""
    for folder in folders("include"):
        if (folder / "cuda_fp16.h").is_file():
            return (folder, folder / "cccl") if (folder / "cccl").is_dir() else (folder,)
    raise DeviceError(f"the headers of CUDA (cuda_fp16.h) are not installed; {extra('kernels')}")


def compile_instance(file: str, name: str, arch: str) -> Cubin:
    """Compile the instance `name` of kernels/`file`, without a look at the cache."""
    library, program = nvrtc(), ctypes.c_void_p()
    expression = name.encode()
    options = [
        *OPTIONS,
        f"--gpu-architecture=sm_{arch}",
        *(f"-I{p}" for p in (KERNELS / "include", *include_folders())),
    ]
    raw = [o.encode() for o in options]
    # Headers that are no files are handed over.
    made = [name for name in _with_headers(file, {}) if name == grids.HEADER]
    names, texts = (
        (ctypes.c_char_p * len(made))(*(part.encode() for part in parts))
        for parts in (made, [_source(name) for name in made])
    )
    _check(
        library.nvrtcCreateProgram(
            ctypes.byref(program), _source(file).encode(), file.encode(), len(made), texts, names
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
    """Registers, shared memory, stack and spills of a kernel from the assembler's report."""
    _, _, told = log.partition(f"Compiling entry function '{symbol}'")

    def number(pattern: str) -> int:
        found = re.search(pattern, told)
        return int(found[1]) if found else 0

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


def _with_headers(file: str, seen: dict[str, str]) -> dict[str, str]:
    """The source and every header of ours that it includes, by name."""
    if file not in seen:
        seen[file] = _source(file)
        for header in re.findall(r'^\s*#\s*include\s+"([^"]+)"', seen[file], re.MULTILINE):
            _with_headers(header, seen)
    return seen


def fingerprint(file: str, name: str, arch: str) -> str:
    """What a cached instance is found by: everything that its code depends on."""
    told = hashlib.sha256()
    for part in (*sorted(_with_headers(file, {}).items()), OPTIONS, name, arch, nvrtc_version()):
        told.update(repr(part).encode())
    return told.hexdigest()[:32]


# -- the cache --------------------------------------------------------------------------------


def cache_folder() -> Path:
    """PYGGML_CACHE, else the user's cache folder."""
    own = os.environ.get("PYGGML_CACHE")
    if own:
        return Path(own) / "cuda"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyggml" / "cuda"


def _read(path: Path) -> Cubin | None:
    """What a cache file holds; None where it is absent or not what was written."""
    try:
        head, _, code = path.read_bytes().partition(b"\n")
        told = json.loads(head)
        if told.pop("sha256") != hashlib.sha256(code).hexdigest():
            return None
        return Cubin(**told, code=code)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


_warned = threading.Event()


def _write(path: Path, cubin: Cubin) -> None:
    """A file under another name first, then in its place: readers see all of it or nothing."""
    told = {k: v for k, v in asdict(cubin).items() if k != "code"}
    told["sha256"] = hashlib.sha256(cubin.code).hexdigest()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(json.dumps(told).encode() + b"\n" + cubin.code)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        if not _warned.is_set():
            _warned.set()
            warnings.warn(
                f"compiled kernels cannot be kept in {path.parent}: {error}; every process will "
                "compile them again. Set PYGGML_CACHE to a folder that can be written",
                stacklevel=2,
            )


def cubin(file: str, name: str, arch: str) -> Cubin:
    """The instance from the cache, else compiled and kept there."""
    path = cache_folder() / f"{fingerprint(file, name, arch)}.cubin"
    found = _read(path)
    if found is None:
        found = compile_instance(file, name, arch)
        _write(path, found)
    return found


def cubins(wanted: Iterable[tuple[str, str]], arch: str) -> dict[tuple[str, str], Cubin]:
    """Several (file, name) at once, on all cores."""
    each = list(dict.fromkeys(wanted))
    if not each:
        return {}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, len(each))) as pool:
        return dict(zip(each, pool.map(lambda one: cubin(one[0], one[1], arch), each)))
