"""What the cpu backend needs on this machine. Plans do not need it; `bind` does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import metadata

from pyggml.backends.base import Finding
from pyggml.backends.cpu.native import isa
from pyggml.errors import DeviceError
from pyggml.extras import install_command

SLOW = "products run by NumPy, many times slower"


def findings() -> Iterator[Finding]:
    """The status of everything the backend needs, for `pyggml doctor`."""
    try:
        yield Finding("numba", metadata.version("numba"))
        level = isa.best()
    except ModuleNotFoundError:  # PackageNotFoundError is one
        yield Finding("numba", f"not installed; {SLOW}", install_command("cpu"), "absent")
    except (ImportError, OSError) as error:
        reason = str(error).partition("\n")[0]
        yield Finding(
            "llvmlite", f"does not load: {reason}; {SLOW}", install_command("cpu"), "broken"
        )
    else:
        if level is None:
            yield Finding("processor", f"no AVX2, FMA and F16C; {SLOW}", "", "absent")
        else:
            yield Finding("processor", f"kernels use {level}")


@cache
def require() -> None:
    """DeviceError, with the command that fixes it, if this machine cannot run the kernels."""
    for finding in findings():
        if finding.state != "ok":
            fix = f"; to fix it: {finding.fix}" if finding.fix else ""
            raise DeviceError(f"the cpu backend needs {finding.what}: {finding.text}{fix}")
