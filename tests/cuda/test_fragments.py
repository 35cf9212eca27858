"""Registers that tensor cores read asynchronously, in the code that NVRTC generates."""

from __future__ import annotations

import re
from typing import Any

import pytest

from pyggml.backends.cuda.device import compiler
from pyggml.backends.cuda.gpu import H200
from pyggml.backends.cuda.linear import ring
from pyggml.backends.cuda.weights.formats import FORMATS


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("tile", "tile<Dense<__half>, 1, 128, true>"),
        ("tile", "tile<Dense<__nv_bfloat16>, 1, 64, true>"),
        ("tile", "tile<q8_0, 1, 64, false>"),
        ("tile", "tile<iq4_nl, 2, 128, true>"),
        ("ring", "ring<iq4_nl, 1, false>"),
        ("ring", "ring<q4_K, 2, true>"),
        ("ring", "ring<iq4_nl, 2, true, 64>"),
    ],
)
def test_fragments_are_written_in_one_place(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wgmma reads A from registers while the program goes on. A second write to such a register,
    for instance at the end of a loop, changes A during the product: sometimes the result is NaN."""
    text, texts = compiler._text, []

    def with_ptx(library: Any, program: Any, part: str, raw: bool = False) -> Any:
        if part == "CUBIN":
            texts.append(text(library, program, "PTX"))
        return text(library, program, part, raw)

    monkeypatch.setattr(compiler, "_text", with_ptx)
    compiler.compile_instance(f"linear_{kind}.cu", name, "90a")
    (ptx,) = texts
    products = re.findall(r"wgmma\.mma_async[^;]*?\}, \{([^}]*)\}, %rd", ptx)
    registers = {register.strip() for text in products for register in text.split(",")}
    assert len(registers) >= 16
    for register in registers:
        writes = re.findall(rf"^\s*(?!wgmma)\S+\s+\{{?[^;]*?(?:\s|\{{){register}\b", ptx, re.M)
        targets = [line for line in writes if "wgmma" not in line and "," not in line]
        assert len(targets) == 1, (register, targets)


@pytest.mark.kernels
@pytest.mark.parametrize("dtype", ("iq4_nl", "q8_0", "q6_K", "mxfp4"))
@pytest.mark.parametrize("columns", ("false", "true", "true, 32", "true, 64"))
@pytest.mark.parametrize("matrices", (1, 2))
def test_products_of_a_ring_do_not_wait_for_each_other(
    dtype: str, matrices: int, columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With too few registers, the assembler makes every wgmma wait for the one before. Variables in
    shared memory fit beside the stages, and the registers that the groups of warps take are there
    from the start."""
    text, logs = compiler._text, []

    def with_log(library: Any, program: Any, part: str, raw: bool = False) -> Any:
        result = text(library, program, part, raw)
        if part == "ProgramLog":
            logs.append(result)
        return result

    monkeypatch.setattr(compiler, "_text", with_log)
    name = f"ring<{dtype}, {matrices}, {columns}>"
    cubin = compiler.compile_instance("linear_ring.cu", name, "90a")
    assert "Compiling" in logs[0] and "serialized" not in logs[0]
    few = columns[-2:].isdigit()
    sizes = ring.Sizes.of(columns != "false", int(columns[-2:]) if few else ring.COLUMNS)
    assert sizes.most == (int(columns[-2:]) if few else ring.COLUMNS)
    consumers = sizes.threads - 128
    assert cubin.registers * sizes.threads >= 24 * 128 + (112 if few else 240) * consumers
    stages = sizes.stages(FORMATS[dtype], H200)
    assert 4 <= stages <= ring.MOST_STAGES
    assert cubin.shared + sizes.shared(FORMATS[dtype], stages) <= H200.shared
