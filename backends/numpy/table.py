"""The kernel table of the NumPy backend.

A kernel is called as `fn(out, *sources, scratch=Scratch, **attributes)`. Arrays are strided and
four-dimensional, in NumPy shape; bf16 and block types are `Packed`, an absent source is None.
`scratch` is passed only to kernels that declare it. Ids have been checked (see `host_runner.py`). A
kernel fills `out` and writes nothing else except scratch. It returns None or `out`; the runner
raises an error if it returns another array.
"""

from __future__ import annotations

from pyggml.backends.table import Kernel, KernelTable

KERNELS = KernelTable(Kernel, {"f32", "f16", "i32", "i64"})
kernel = KERNELS.kernel
