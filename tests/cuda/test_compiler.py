"""The cache of compiled kernels: what it is found by, what may be wrong with it, who shares it.

Tests marked `kernels` compile with NVRTC, which `make kernels` installs; the others make do with
something in its place.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from pyggml.backends.cuda.device import compiler, kernel_cache
from tests.cuda.conftest import compiled

KERNEL = '#include "outer.cuh"\ntemplate <int n> __global__ void k(int* y) { *y = n + FIRST; }\n'
FILES = {
    "k.cu": KERNEL,
    "outer.cuh": '#pragma once\n  #  include "inner.cuh"\n',
    "inner.cuh": "#define FIRST 1\n",
    "other.cuh": "",
}
ONE = ("k.cu", "k<3>", "90a")

Compiled = list[tuple[str, str, str]]


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of kernels of our own, and an empty cache."""
    kernels = tmp_path / "kernels"
    (kernels / "include").mkdir(parents=True)
    for name, text in FILES.items():
        folder = kernels / "include" if name.endswith(".cuh") else kernels
        (folder / name).write_text(text)
    monkeypatch.setattr(compiler, "KERNELS", kernels)
    monkeypatch.setattr(kernel_cache, "_warned", threading.Event())
    monkeypatch.setenv("PYGGML_CACHE", str(tmp_path))
    return tmp_path / "cuda"


@pytest.fixture
def calls(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """What was compiled, by something in NVRTC's place."""
    made: Compiled = []

    def compile_instance(*one: str) -> compiler.Cubin:
        made.append(one)
        return compiled(*one)

    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 0))
    monkeypatch.setattr(compiler, "compile_instance", compile_instance)
    return made


def test_an_instance_is_compiled_once(cache: Path, calls: Compiled) -> None:
    first = kernel_cache.cubin(*ONE)
    assert kernel_cache.cubin(*ONE) == first == compiled(*ONE)
    assert calls == [ONE] and len(list(cache.iterdir())) == 1


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda told: b"",
    "cut in its head": lambda told: told[:20],
    "cut in its code": lambda told: told[:-1],
    "a bit turned over": lambda told: told[:-1] + bytes([told[-1] ^ 1]),
    "no text": lambda told: bytes(range(256)) * 4,
    "another program's": lambda told: b"[1, 2]\nand more",
    "of another version": lambda told: told.replace(b'"spilled"', b'"spills"'),
    "without its hash": lambda told: told.replace(b'"sha256"', b'"md5"'),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_corrupt_file_is_made_again(cache: Path, calls: Compiled, how: str) -> None:
    kernel_cache.cubin(*ONE)
    (file,) = cache.iterdir()
    good = file.read_bytes()
    file.write_bytes(DAMAGE[how](good))
    assert file.read_bytes() != good
    for _ in range(2):
        assert kernel_cache.cubin(*ONE) == compiled(*ONE)
    assert calls == [ONE, ONE] and file.read_bytes() == good and list(cache.iterdir()) == [file]


def test_a_folder_that_cannot_be_written_is_told_once(
    cache: Path, calls: Compiled, recwarn: pytest.WarningsRecorder
) -> None:
    cache.touch()  # a file where the folder would be: no user may write into that
    warnings.simplefilter("always")
    for _ in range(3):
        assert kernel_cache.cubin(*ONE) == compiled(*ONE)
    assert calls == [ONE] * 3
    (warning,) = recwarn
    text = str(warning.message)
    assert str(cache) in text and "Set PYGGML_CACHE to a writable folder" in text


def test_a_write_that_fails_leaves_nothing(
    cache: Path, calls: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kernel_cache.os, "replace", full)
    with pytest.warns(UserWarning, match="No space left"):
        assert kernel_cache.cubin(*ONE) == compiled(*ONE)
    assert list(cache.iterdir()) == []


TWO = """
import sys, time
from pathlib import Path
from pyggml.backends.cuda.device import compiler, kernel_cache

cache, me, other, kernels = Path(sys.argv[1]), *sys.argv[2:]
compiler.KERNELS = Path(kernels)
compiler.nvrtc_version = lambda: (13, 0)

def compile_instance(file, name, arch):
    # Both are here before either writes.
    (cache.parent / me).touch()
    for _ in range(3000):
        if (cache.parent / other).exists():
            return compiler.Cubin(name, "k", arch, 1, 2, 3, 4, b"code" * 1_000_000)
        time.sleep(0.01)
    raise SystemExit("the other one never came")

compiler.compile_instance = compile_instance
print(len(kernel_cache.cubin("k.cu", "k<3>", "90a").code))
print(kernel_cache._read(*cache.glob("*.cubin")).registers)
"""


def test_two_processes_fill_it_at_once(cache: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(cache), *names, str(compiler.KERNELS)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for names in (("a", "b"), ("b", "a"))
    ]
    for process in started:
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (0, "4000000\n1\n", ""), err
    assert [path.suffix for path in cache.iterdir()] == [".cubin"]


# -- what an instance is found by ---------------------------------------------------------------


def _header(monkeypatch: pytest.MonkeyPatch) -> None:
    (compiler.KERNELS / "include" / "inner.cuh").write_text("#define FIRST 2\n")


def _source(monkeypatch: pytest.MonkeyPatch) -> None:
    (compiler.KERNELS / "k.cu").write_text(KERNEL + "\n")


def _options(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "OPTIONS", (*compiler.OPTIONS, "-G"))


def _version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (13, 1))


@pytest.mark.parametrize("change", [_header, _source, _options, _version])
def test_what_its_code_depends_on_changes_its_name(
    calls: Compiled, change: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel_cache.cubin(*ONE)
    change(monkeypatch)
    kernel_cache.cubin(*ONE)
    assert calls == [ONE, ONE]


def test_each_instance_and_architecture_has_its_own(cache: Path, calls: Compiled) -> None:
    wanted = [ONE, ("k.cu", "k<4>", "90a"), ("k.cu", "k<3>", "80")]
    for one in wanted * 2:
        assert kernel_cache.cubin(*one) == compiled(*one)
    assert calls == wanted and len(list(cache.iterdir())) == 3


def test_what_it_does_not_include_does_not(calls: Compiled) -> None:
    kernel_cache.cubin(*ONE)
    (compiler.KERNELS / "include" / "other.cuh").write_text("#error\n")
    kernel_cache.cubin(*ONE)
    assert calls == [ONE]


def test_a_header_that_is_not_there_is_named(calls: Compiled) -> None:
    (compiler.KERNELS / "include" / "inner.cuh").unlink()
    with pytest.raises(compiler.CompileError, match=r"kernels/inner\.cuh cannot be read"):
        kernel_cache.cubin(*ONE)


def test_without_nvrtc_the_error_says_what_to_install(
    machine: Callable[..., None], cache: Path
) -> None:
    machine("gpu", nvrtc=False)
    with pytest.raises(
        compiler.DeviceError, match=r"NVRTC.*not installed; pip install .*\[kernels\]"
    ):
        kernel_cache.cubin(*ONE)


# -- with NVRTC ---------------------------------------------------------------------------------


@pytest.mark.kernels
def test_nvrtc_compiles_and_the_cache_gives_it_back(cache: Path) -> None:
    made = kernel_cache.cubin(*ONE)
    assert made.arch == "90a" and "k" in made.symbol and made.registers > 0
    assert made.code.startswith(b"\x7fELF") and made.spilled == 0
    (file,) = cache.iterdir()
    assert kernel_cache._read(file) == made


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
    assert kernel_cache.cubin(*ONE).code  # and the next one is not harmed
