"""Kernels as native code: numba compiles a function once, LLVM alone loads it afterwards.

A kernel is a Python function of addresses, sizes and numbers. In front of it goes an entry with the
same form for all kernels, `entry(arguments, thread, threads)`: it loads the parameters from a table
of 8-byte words. Numba is imported only to compile. Object code is kept in `objects.py`'s cache, and
a process that finds all of it there starts half a second faster than one that imports numba.

The design that lost: numba's own cache. It is in the package's folder or a guess of another, each
entry takes 2 ms to find and load, and it needs numba's import.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pyggml.backends.cpu.native import objects
from pyggml.backends.cpu.native.isa import isa

#: Words that every table of arguments begins with: a counter for the threads that share the work.
COUNTER = 1


@dataclass(frozen=True, eq=False, slots=True)
class Native:
    """A kernel before compilation.

    name    unique; with the sources it decides what the cache returns
    types   the type of each parameter: "i" for integers and addresses, "f" for numbers
    make    returns the Python function; called only if the kernel must be compiled. Its parameters
            are `types`, then (counter, thread, threads) if it has more parameters than `types`
    """

    name: str
    types: str
    make: Callable[[], Callable[..., None]]
    address: list[int] = field(default_factory=list)

    def ready(self) -> int:
        """The address of its entry; compiles or loads it on first use."""
        if not self.address:
            with _lock:
                if not self.address:
                    self.address.append(_load(self))
        return self.address[0]


_lock = threading.RLock()
_engines: list[Any] = []  # keep loaded code alive


@cache
def _sources() -> str:
    """A hash of everything that object code depends on besides the kernel's name."""
    import llvmlite

    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    target = isa()
    versions = (llvmlite.__version__, sys.version_info[:2], target)
    digest.update(repr(versions).encode())
    return digest.hexdigest()


def _load(kernel: Native) -> int:
    key = hashlib.sha256(f"{_sources()} {kernel.name} {kernel.types}".encode()).hexdigest()[:32]
    code = objects.read(key)
    if code is None:
        code = _compile(kernel)
        objects.write(key, code)
    return _link(kernel.name, code)


@cache
def _machine() -> Any:
    from llvmlite import binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


def _link(name: str, code: bytes) -> int:
    from llvmlite import binding as llvm

    target = _machine()
    module = llvm.parse_assembly("")
    module.triple = llvm.get_default_triple()
    engine = llvm.create_mcjit_compiler(module, target.create_target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address("pyggml_entry"))


def _compile(kernel: Native) -> bytes:
    """The object code of the entry, with the kernel inlined into it."""
    from llvmlite import ir
    from numba import njit, types
    from numba.core.compiler_lock import global_compiler_lock

    codegen, context = _target()
    function = kernel.make()
    own = [types.int64 if t == "i" else types.float64 for t in kernel.types]
    extra = len(inspect.signature(function).parameters) - len(own)
    signature = (*own, *(types.int64,) * extra)
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "nogil": True}
    dispatcher = njit(signature, error_model="numpy", **options)(function)
    compiled = dispatcher.overloads[signature]

    i64 = ir.IntType(64)
    library = codegen.create_library(kernel.name)
    library.enable_object_caching()
    module = library.create_ir_module(kernel.name)
    inner = context.declare_function(module, compiled.fndesc)
    entry = ir.Function(module, ir.FunctionType(ir.VoidType(), [i64] * 3), "pyggml_entry")
    builder = ir.IRBuilder(entry.append_basic_block())
    arguments, thread, threads = entry.args
    values = []
    for k, type_ in enumerate(kernel.types):
        kind = i64 if type_ == "i" else ir.DoubleType()
        place = builder.add(arguments, ir.Constant(i64, 8 * (k + COUNTER)))
        values.append(builder.load(builder.inttoptr(place, kind.as_pointer())))
    values += [arguments, thread, threads][:extra]
    context.call_conv.call_function(builder, inner, types.none, signature, values)
    builder.ret_void()
    with global_compiler_lock:
        library.add_ir_module(module)
        library.add_linking_library(compiled.library)
        library.finalize()
    code: bytes = library._get_compiled_object()
    return code


@cache
def _target() -> tuple[Any, Any]:
    """Numba's code generator and context for the instruction set."""
    from numba.core import config
    from numba.core.registry import cpu_target

    target = isa()
    config.CPU_NAME, config.CPU_FEATURES = target.cpu, target.features
    context = cpu_target.target_context
    return context.codegen(), context
