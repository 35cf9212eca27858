"""Of the code that NVRTC makes: what the tensor cores read while the program goes on."""

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
    """A product goes on reading its A from registers behind the program's back. One that is written
    a second time (where a loop turns back, say) changes under its hands: NaN, now and then."""
    text, texts = compiler._text, []

    def kept(library: Any, program: Any, what: str, raw: bool = False) -> Any:
        if what == "CUBIN":
            texts.append(text(library, program, "PTX"))
        return text(library, program, what, raw)

    monkeypatch.setattr(compiler, "_text", kept)
    compiler.compile_instance("linear_tile.cu", name, "90a")
    (ptx,) = texts
    products = re.findall(r"wgmma\.mma_async[^;]*?\}, \{([^}]*)\}, %rd", ptx)
    read = {register.strip() for found in products for register in found.split(",")}
    assert len(read) >= 16
    for register in read:
        written = re.findall(rf"^\s*(?!wgmma)\S+\s+\{{?[^;]*?(?:\s|\{{){register}\b", ptx, re.M)
        targets = [line for line in written if "wgmma" not in line and "," not in line]
        assert len(targets) == 1, (register, targets)
