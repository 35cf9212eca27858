"""Registers that tensor cores read asynchronously, in the code that NVRTC generates."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pyggml.backends.cuda.device import compiler


@pytest.mark.kernels
@pytest.mark.parametrize(
    "name",
    [
        "tile<Dense<__half>, 1, 128, true>",
        "tile<Dense<__nv_bfloat16>, 1, 64, true>",
        "tile<q8_0, 1, 64, false>",
        "tile<iq4_nl, 2, 128, true>",
    ],
)
def test_fragments_are_written_in_one_place(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """wgmma reads A from registers while the program goes on. A second write to such a register,
    for instance at the end of a loop, changes A during the product: sometimes the result is NaN."""
    text, texts = compiler._text, []

    def with_ptx(library: Any, program: Any, part: str, raw: bool = False) -> Any:
        if part == "CUBIN":
            texts.append(text(library, program, "PTX"))
        return text(library, program, part, raw)

    monkeypatch.setattr(compiler, "_text", with_ptx)
    compiler.compile_instance("linear_tile.cu", name, "90a")
    (ptx,) = texts
    products = re.findall(r"wgmma\.mma_async[^;]*?\}, \{([^}]*)\}, %rd", ptx)
    registers = {register.strip() for text in products for register in text.split(",")}
    assert len(registers) >= 16
    for register in registers:
        writes = re.findall(rf"^\s*(?!wgmma)\S+\s+\{{?[^;]*?(?:\s|\{{){register}\b", ptx, re.M)
        targets = [line for line in writes if "wgmma" not in line and "," not in line]
        assert len(targets) == 1, (register, targets)
