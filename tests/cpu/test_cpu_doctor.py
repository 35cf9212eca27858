"""The findings of the cpu backend on machines that lack something."""

from __future__ import annotations

import sys
from importlib import metadata
from types import ModuleType, SimpleNamespace

import pytest

from pyggml.backends.base import Finding
from pyggml.backends.cpu import doctor, findings
from pyggml.errors import DeviceError
from pyggml.extras import install_command


class Broken(ModuleType):
    """A package whose library does not load."""

    def __getattr__(self, name: str) -> object:
        raise OSError("libllvmlite.so: invalid ELF header\nmore")


def last(monkeypatch: pytest.MonkeyPatch, llvmlite: object) -> Finding:
    """The last finding if `llvmlite` is what Python imports."""
    monkeypatch.setitem(sys.modules, "llvmlite", llvmlite)
    monkeypatch.setattr(metadata, "version", lambda name: "1.2.3")
    return list(findings())[-1]


def processor(**features: bool) -> SimpleNamespace:
    """llvmlite on a processor with these features."""
    return SimpleNamespace(binding=SimpleNamespace(get_host_cpu_features=lambda: features))


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    [row] = findings()
    assert (row.what, row.state, row.fix) == ("numba", "absent", install_command("cpu"))
    doctor.require.cache_clear()
    with pytest.raises(DeviceError, match="the cpu backend needs numba: not installed"):
        doctor.require()


def test_without_llvmlite(monkeypatch: pytest.MonkeyPatch) -> None:
    row = last(monkeypatch, None)
    assert (row.what, row.state, row.fix) == ("numba", "absent", install_command("cpu"))


def test_a_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    row = last(monkeypatch, Broken("llvmlite"))
    assert (row.what, row.state, row.fix) == ("llvmlite", "broken", install_command("cpu"))
    assert row.text.startswith("does not load: libllvmlite.so: invalid ELF header; ")


def test_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    row = last(monkeypatch, processor(avx2=True, fma=False, f16c=True))
    assert (row.what, row.state) == ("processor", "absent") and "no AVX2" in row.text
    row = last(monkeypatch, processor(avx2=True, fma=True, f16c=True))
    assert (row.state, row.text) == ("ok", "kernels use avx2")
