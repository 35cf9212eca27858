"""Write what llama.cpp computes for a GGUF file to an .npz file, for `pyggml diff`.

python examples/dump_llama_cpp.py model.gguf OUT.npz --tokens 1,2,3

It needs llama-cpp-python. The callback is that of llama.cpp's example eval-callback, which prints
parts of every tensor; this one keeps all of them. A name that occurs several times in a layer,
such as Qcur-0 before and after the rotation, is that of its last tensor.
"""

from __future__ import annotations

import argparse
import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: Types of ggml that results of nodes have: number -> NumPy's.
TYPES = {0: np.float32, 1: np.float16, 26: np.int32}


class Tensor(ctypes.Structure):
    """The beginning of ggml_tensor (ggml.h)."""

    _fields_ = (
        ("type", ctypes.c_int32),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


def dump(path: str | Path, tokens: Sequence[int], out: str | Path) -> None:
    """Run the model on tokens; write the results of all nodes by name, and the tokens."""
    import llama_cpp
    from llama_cpp import llama_cpp as low

    lib = ggml_library(low)
    arrays: dict[str, Any] = {}

    def keep(address: int, ask: bool, data: Any) -> bool:
        if not ask:
            name = lib.ggml_get_name(address).decode()
            tensor = Tensor.from_address(address)
            if tensor.type in TYPES:
                arrays[name] = values(lib, address, tensor)
        return True

    callback = low.ggml_backend_sched_eval_callback(keep)
    model = llama_cpp.llama_model_load_from_file(
        str(path).encode(), llama_cpp.llama_model_default_params()
    )
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(len(tokens), 32)
    settings.cb_eval = callback
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    try:
        if llama_cpp.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
    finally:
        llama_cpp.llama_batch_free(batch)
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)
    np.savez(out, tokens=np.array(tokens, np.int32), **arrays)


def ggml_library(low: Any) -> Any:
    """The functions of ggml; they are in a library next to that of llama.cpp."""
    folder = Path(low.__file__).parent / "lib"
    [path] = [path for path in folder.iterdir() if path.name.split(".")[0] == "libggml-base"][:1]
    lib = ctypes.CDLL(str(path))
    lib.ggml_get_name.restype = ctypes.c_char_p
    lib.ggml_get_name.argtypes = [ctypes.c_void_p]
    lib.ggml_nbytes.restype = ctypes.c_size_t
    lib.ggml_nbytes.argtypes = [ctypes.c_void_p]
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    lib.ggml_backend_tensor_get.argtypes = [pointer, pointer, size, size]
    return lib


def values(lib: Any, address: int, tensor: Tensor) -> np.ndarray[Any, Any]:
    """A copy of a tensor, which may be a view with any strides, in NumPy's order."""
    raw = np.empty(lib.ggml_nbytes(address), np.uint8)
    lib.ggml_backend_tensor_get(address, raw.ctypes.data, 0, raw.nbytes)
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    return np.ndarray(shape, TYPES[tensor.type], raw, 0, strides).copy()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("out", help="the .npz file")
    parser.add_argument("--tokens", required=True, help="ids: 1,2,3")
    args = parser.parse_args(argv)
    dump(args.model, [int(word) for word in args.tokens.split(",")], args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
