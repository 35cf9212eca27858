"""llama-bench's fields of a measurement: the build, the machine, the model and the options."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyggml import __version__
from pyggml.backends import HOSTS
from pyggml.backends.processors import n_processors
from pyggml.runtime.shards import shard_text

if TYPE_CHECKING:
    from pyggml.gguf import GGUFFile
    from pyggml.models.model import Model

#: What llama-bench's scripts look for and pyggml has no choice of.
FIXED = {
    "cpu_mask": "0x0", "cpu_strict": False, "poll": 0, "n_cpu_moe": 0, "split_mode": "layer",
    "main_gpu": 0, "no_kv_offload": False, "tensor_split": "0.00", "use_mmap": True,
    "load_mode": "mmap", "embeddings": False, "no_op_offload": 0, "fit_target": 0, "fit_min_ctx": 0,
}  # fmt: skip


#: Fields that can differ between lines of a plot -> their short names, those of the options.
SHORT = {
    "model_type": "", "backends": "", "n_threads": "t", "n_gpu_layers": "ngl", "n_batch": "b",
    "n_ubatch": "ub", "type_k": "ctk", "type_v": "ctv", "type_i": "cti",
    "flash_attn": "fa", "mla": "mla", "amb": "amb", "fmoe": "fmoe", "tensor_buft_overrides": "ot",
    "shard": "shard",
}  # fmt: skip


def described(model: Model, *, n_batch: int, n_ubatch: int) -> dict[str, Any]:
    """The fields, with llama-bench's names and types, and mla, amb and fmoe as ik_llama.cpp's.

    backends   the model's places
    amb        MiB, or 0 without a budget
    shard      the value of --shard, or "none"
    random_weights  whether the model has other weights than its file
    n_gpu_layers and tensor_buft_overrides are -1 and "none", since a model has only pins
    """
    options, file = model.options, model.file
    commit, number = build()
    return {
        "build_commit": commit, "build_number": number,
        "cpu_info": cpu_info(), "gpu_info": gpu_info(model.backends),
        "backends": ",".join(model.backends),
        "model_filename": str(file.paths[0]), "model_type": model_type(file),
        "model_size": sum(t.nbytes for t in file.tensors.values()),
        "model_n_params": sum(t.n_elements for t in file.tensors.values()),
        "n_batch": n_batch, "n_ubatch": n_ubatch, "n_threads": n_threads(model.backends),
        "type_k": options.cache_k, "type_v": options.cache_v, "type_i": options.cache_i,
        "n_gpu_layers": -1,
        "flash_attn": int(options.flash), "mla": options.mla, "amb": model.amb or 0,
        "fmoe": int(options.fused), "decode_weights": model.decode_weights,
        "tensor_buft_overrides": "none",
        "shard": "none" if model.shard is None else shard_text(model.shard),
        "random_weights": file.values is not None, **FIXED,
    }  # fmt: skip


def model_type(file: GGUFFile) -> str:
    """Architecture, size and the type of most weights, such as `llama 135M Q4_1`."""
    n = sum(t.n_elements for t in file.tensors.values())
    unit, scale = next((u, n_) for u, n_ in (("B", 1e9), ("M", 1e6), ("K", 0)) if n >= n_)
    size = f"{n / (scale or 1e3):.3g}{unit}"
    types = Counter[str]()
    for tensor in file.tensors.values():
        types[tensor.dtype.name] += tensor.nbytes
    largest = types.most_common(1)[0][0]
    return f"{file.fields['general.architecture']} {size} {largest[0].upper()}{_rest(largest)}"


def _rest(name: str) -> str:
    """The type's name after its first letter, as llama.cpp writes it: q4_K, IQ4_NL."""
    return name[1:] if name[1:].endswith("_K") else name[1:].upper()


@cache
def build() -> tuple[str, int]:
    """The commit and the number of commits of a checkout; otherwise the version, and 0."""
    top = Path(__file__).resolve().parent.parent.parent
    if (top / ".git").exists() and (git := shutil.which("git")) is not None:
        words = [
            _output([git, "-C", str(top), *args.split()])
            for args in ("rev-parse --short HEAD", "rev-list --count HEAD")
        ]
        if all(words):
            return words[0], int(words[1])
    return __version__, 0


@cache
def cpu_info() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def _gpus() -> str:
    smi = shutil.which("nvidia-smi")
    words = [smi, "--query-gpu=name", "--format=csv,noheader"] if smi else []
    return ", ".join(_output(words).splitlines()) if words else ""


def gpu_info(places: Sequence[str]) -> str:
    """The names of the GPUs, or nothing if no place is one."""
    return _gpus() if any(place.startswith("cuda") for place in places) else ""


def n_threads(places: Sequence[str]) -> int:
    """The threads of the first backend in the host's memory, else as many as NumPy has."""
    hosts = [kind for kind in (place.partition(":")[0] for place in places) if kind in HOSTS]
    if hosts[:1] == ["cpu"]:
        texts = [os.environ.get("PYGGML_THREADS", "")]
    else:
        texts = [os.environ.get(name, "") for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")]
    return next((int(text) for text in texts if text.isdecimal()), 0) or n_processors()


def _output(words: list[str]) -> str:
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
