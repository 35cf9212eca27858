"""A folder of compiled kernels, named by a hash of everything that their code depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from pyggml.backends import code_cache
from pyggml.backends.cuda.device import compiler
from pyggml.backends.cuda.device.compiler import Cubin
from pyggml.backends.processors import n_processors


def fingerprint(file: str, name: str, arch: str) -> str:
    """The key of an instance in the cache: a hash of everything that its code depends on."""
    digest = hashlib.sha256()
    sources = sorted(compiler.with_headers(file, {}).items())
    for part in (*sources, compiler.OPTIONS, name, arch, compiler.nvrtc_version()):
        digest.update(repr(part).encode())
    return digest.hexdigest()[:32]


def cache_folder() -> Path:
    """The folder of cached kernels."""
    return code_cache.folder("cuda")


def _read(path: Path) -> Cubin | None:
    """The contents of a cache file; None if it is absent or damaged."""
    try:
        head, _, code = path.read_bytes().partition(b"\n")
        fields = json.loads(head)
        if fields.pop("sha256") != hashlib.sha256(code).hexdigest():
            return None
        return Cubin(**fields, code=code)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _write(path: Path, cubin: Cubin) -> None:
    fields = {k: v for k, v in asdict(cubin).items() if k != "code"}
    fields["sha256"] = hashlib.sha256(cubin.code).hexdigest()
    code_cache.write(path, json.dumps(fields).encode() + b"\n" + cubin.code)


def cubin(file: str, name: str, arch: str) -> Cubin:
    """The instance from the cache; compiled and stored if it is absent."""
    path = cache_folder() / f"{fingerprint(file, name, arch)}.cubin"
    instance = _read(path)
    if instance is None:
        instance = compiler.compile_instance(file, name, arch)
        _write(path, instance)
    return instance


def cubins(keys: Iterable[tuple[str, str]], arch: str) -> dict[tuple[str, str], Cubin]:
    """The instances of several (file, name), compiled on all cores."""
    unique = list(dict.fromkeys(keys))
    if not unique:
        return {}
    with ThreadPoolExecutor(min(n_processors(), len(unique))) as pool:
        return dict(zip(unique, pool.map(lambda key: cubin(key[0], key[1], arch), unique)))
