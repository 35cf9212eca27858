"""The cache of compiled kernels: its keys, damaged files, and processes that share it.

Tests marked `kernels` compile with NVRTC, which `make kernels` installs; the others use a
substitute.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from pyggml.backends import code_cache
from pyggml.backends.cuda.device import compiler, kernel_cache
from tests.cuda.conftest import fake_cubin

KERNEL = '#include "outer.cuh"\ntemplate <int n> __global__ void k(int* y) { *y = n + FIRST; }\n'
FILES = {
    "k.cu": KERNEL,
    "outer.cuh": '#pragma once\n  #  include "inner.cuh"\n',
    "inner.cuh": "#define FIRST 1\n",
    "other.cuh": "",
}
INSTANCE = ("k.cu", "k<3>", "90a")

Compiled = list[tuple[str, str, str]]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of test kernels, and an empty cache."""
    kernels = tmp_path / "kernels"
    (kernels / "include").mkdir(parents=True)
    for name, text in FILES.items():
        folder = kernels / "include" if name.endswith(".cuh") else kernels
        (folder / name).write_text(text)
    monkeypatch.setattr(compiler, "KERNELS", kernels)
    monkeypatch.setattr(code_cache, "_warned", threading.Event())
    monkeypatch.setenv("PYGGML_CACHE", str(tmp_path))
    return tmp_path / "cuda"


@pytest.fixture
def calls(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """The instances that a substitute for NVRTC has compiled."""
    instances: Compiled = []

    def compile_instance(*instance: str) -> compiler.Cubin:
        instances.append(instance)
        return fake_cubin(*instance)

    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "compile_instance", compile_instance)
    return instances


def test_an_instance_is_compiled_once(cache: Path, calls: Compiled) -> None:
    first = kernel_cache.cubin(*INSTANCE)
    assert kernel_cache.cubin(*INSTANCE) == first == fake_cubin(*INSTANCE)
    assert calls == [INSTANCE] and len(list(cache.iterdir())) == 1


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "a truncated header": lambda data: data[:20],
    "truncated code": lambda data: data[:-1],
    "a flipped bit": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "binary": lambda data: bytes(range(256)) * 4,
    "of another program": lambda data: b"[1, 2]\nand more",
    "of another version": lambda data: data.replace(b'"spilled"', b'"spills"'),
    "without a hash": lambda data: data.replace(b'"sha256"', b'"md5"'),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_corrupt_file_is_compiled_again(cache: Path, calls: Compiled, how: str) -> None:
    kernel_cache.cubin(*INSTANCE)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(DAMAGE[how](good))
    assert file.read_bytes() != good
    for _ in range(2):
        assert kernel_cache.cubin(*INSTANCE) == fake_cubin(*INSTANCE)
    assert (
        calls == [INSTANCE, INSTANCE]
        and file.read_bytes() == good
        and list(cache.iterdir()) == [file]
    )


def test_an_unwritable_folder_warns_once(
    cache: Path, calls: Compiled, recwarn: pytest.WarningsRecorder
) -> None:
    cache.touch()  # a file in place of the folder: even root cannot write into it
    warnings.simplefilter("always")
    for _ in range(3):
        assert kernel_cache.cubin(*INSTANCE) == fake_cubin(*INSTANCE)
    assert calls == [INSTANCE] * 3
    (warning,) = recwarn
    text = str(warning.message)
    assert str(cache) in text and "Set PYGGML_CACHE to a writable folder" in text


def test_a_write_that_fails_leaves_nothing(
    cache: Path, calls: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(code_cache.os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert kernel_cache.cubin(*INSTANCE) == fake_cubin(*INSTANCE)
    assert list(cache.iterdir()) == []


TWO = """
import sys, time
from pathlib import Path
from pyggml.backends import code_cache
from pyggml.backends.cuda.device import compiler, kernel_cache

cache, me, other, kernels = Path(sys.argv[1]), *sys.argv[2:]
compiler.KERNELS = Path(kernels)
compiler.nvrtc_version = lambda: (13, 0)

def compile_instance(file, name, arch):
    # Wait for the other process, so that neither has written yet.
    (cache.parent / me).touch()
    for _ in range(3000):
        if (cache.parent / other).exists():
            return compiler.Cubin(name, "k", arch, 1, 2, 3, 4, b"code" * 1_000_000)
        time.sleep(0.01)
    raise SystemExit("the other process did not start")

compiler.compile_instance = compile_instance
print(len(kernel_cache.cubin("k.cu", "k<3>", "90a").code))
print(kernel_cache._read(*cache.glob("*.cubin")).registers)
"""


def test_two_processes_fill_it_at_once(cache: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(cache), *names, str(compiler.KERNELS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for names in (("a", "b"), ("b", "a"))
    ]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "4000000\n1\n", ""), err
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]


# -- keys -------------------------------------------------------------------------------------


def _header(monkeypatch: pytest.MonkeyPatch) -> None:
    (compiler.KERNELS / "include" / "inner.cuh").write_text("#define FIRST 2\n")


def _source(monkeypatch: pytest.MonkeyPatch) -> None:
    (compiler.KERNELS / "k.cu").write_text(KERNEL + "\n")


def _options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "-G"))


def _version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 1))


@pytest.mark.parametrize("change", [_header, _source, _options, _version])
def test_every_dependency_changes_the_key(
    calls: Compiled, change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_cache.cubin(*INSTANCE)
    change(monkeypatch)
    kernel_cache.cubin(*INSTANCE)
    assert calls == [INSTANCE, INSTANCE]


def test_each_instance_and_architecture_has_its_own_file(cache: Path, calls: Compiled) -> None:
    instances = [INSTANCE, ("k.cu", "k<4>", "90a"), ("k.cu", "k<3>", "80")]
    for instance in instances * 2:
        assert kernel_cache.cubin(*instance) == fake_cubin(*instance)
    assert calls == instances and len(list(cache.iterdir())) == 3


def test_other_headers_do_not_change_the_key(calls: Compiled) -> None:
    kernel_cache.cubin(*INSTANCE)
    (compiler.KERNELS / "include" / "other.cuh").write_text("#error\n")
    kernel_cache.cubin(*INSTANCE)
    assert calls == [INSTANCE]


def test_a_missing_header_is_named(calls: Compiled) -> None:
    (compiler.KERNELS / "include" / "inner.cuh").unlink()
    with pytest.raises(compiler.CompileError, match=r"kernels/inner\.cuh cannot be read"):
        kernel_cache.cubin(*INSTANCE)


def test_without_nvrtc_the_error_says_what_to_install(
    machine: Callable[..., None], cache: Path
) -> None:
    machine("gpu", nvrtc=False)
    with pytest.raises(
        compiler.DeviceError, match=r"NVRTC.*not installed; pip install .*\[kernels\]"
    ):
        kernel_cache.cubin(*INSTANCE)


# -- with NVRTC ---------------------------------------------------------------------------------


@pytest.mark.kernels
def test_the_cache_returns_what_nvrtc_compiled(cache: Path) -> None:
    cubin = kernel_cache.cubin(*INSTANCE)
    assert cubin.arch == "90a" and "k" in cubin.symbol and cubin.registers > 0
    assert cubin.code.startswith(b"\x7fELF") and cubin.spilled == 0
    (file,) = cache.iterdir()
    assert kernel_cache._read(file) == cubin


@pytest.mark.kernels
def test_a_kernel_that_does_not_compile_is_named(cache: Path) -> None:
    (compiler.KERNELS / "bad.cu").write_text(
        "template <int n>\n__global__ void bad(float* y) {\n    y[0] = missing;\n}\n"
    )
    with pytest.raises(compiler.CompileError) as caught:
        kernel_cache.cubin("bad.cu", "bad<4>", "90a")
    text = str(caught.value)
    assert "kernels/bad.cu does not compile for sm_90a as bad<4> with NVRTC" in text
    assert "bad.cu(3): error:" in text and "missing" in text
    with pytest.raises(compiler.CompileError, match="as absent<1>"):
        kernel_cache.cubin("k.cu", "absent<1>", "90a")
    assert not cache.exists() or list(cache.iterdir()) == []
    assert kernel_cache.cubin(*INSTANCE).code  # compiling still works
