"""The kernel table of the NumPy backend.

A kernel is called as `fn(out, *sources, scratch=Scratch, **attributes)` with strided
four-dimensional arrays in NumPy shape: None for an absent source, `Packed` for bf16 and block
types; `scratch` only where it is declared. It fills `out`, touches nothing else and returns nothing
(or `out` itself): a result that is returned instead is an error.
"""

from __future__ import annotations

from pyggml.backends.table import Kernel, KernelTable

KERNELS = KernelTable(Kernel, {"f32", "f16", "i32", "i64"})
kernel = KERNELS.kernel
