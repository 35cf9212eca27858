"""Products on a GPU: every block type and layout, few and many columns, heads, experts.

The cases have the form of the parity grid (pyggml/parity/case.py) and run in several processes.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from pyggml.backends.cuda.weights.formats import FORMATS
from pyggml.parity.case import Case
from pyggml.parity.cases import expand
from pyggml.parity.running import outcomes

if TYPE_CHECKING:
    from tests.gpu.conftest import Options

FORMAT = "|".join(FORMATS)
#: One type for each family of decoders.
FEW = "q8_0|iq4_nl|q4_K|mxfp4"
#: A weight is kept in tiles, an input in the layout of a file.
WEIGHT = "{|@weight}"
#: Used experts, columns per token, tokens.
TOKENS = ((4, 1, 1), (4, 2, 5), (4, 4, 60), (4, 1, 150), (4, 1, 700))

BLOCKS = f"""
mul_mat({{{FORMAT}}}[512,140]@weight, f32[512,{{1|3|8|9|70|200}}])
mul_mat({{{FORMAT}}}[512,140], f32[512,{{1|5|40}}])
mul_mat({{{FORMAT}}}[512,140]{WEIGHT}, f32[512,5], prec='f32')
mul_mat({{{FEW}}}[256,19,2,2]{WEIGHT}, f16[256,{{1|33}},6,4]@p0213)
mul_mat({{{FEW}}}[256,19,2,2]{WEIGHT}, f16[256,7,6,4]@p0213, dtype='f16')
mul_mat({{{FEW}}}[256,19,2,2]{WEIGHT}, bf16[256,40,2,2]@wide)
fused_up_gate({{{FEW}}}[256,75]{WEIGHT}, $1[256,75]$2, f32[256,{{1|6|40}},2]@p0213, act={{'silu'|'gelu'|'relu'}})
mul_mat(iq4_nl[512,100]@weight, f32[512,20]~large)
cast({{{FORMAT}}}[512,19,2]@weight, dtype={{'f16'|'f32'|'bf16'}})
mul_mat(iq4_nl[1056,100]@weight, f32[1056,{{1|30}}])
mul_mat({{{FORMAT}}}[4096,10570]@weight, f32[4096,1])
mul_mat({{q4_0|iq4_nl}}[4128,10570]@weight, f32[4128,1], dtype={{'f32'|'f16'}})
mul_mat({{{FEW}}}[512,1410]@weight, f32[512,{{129|389}}])
mul_mat({{{FEW}}}[256,18,2,2]@weight, f16[256,80,6,4]@p0213, dtype={{'f32'|'f16'}})
fused_up_gate({{{FEW}}}[256,74]@weight, $1[256,74]@weight, f32[256,150,2]@p0213, act={{'silu'|'gelu'|'relu'}})
mul_mat_id({{{FEW}}}[256,138,9]@weight, f32[256,{{2|4}},{{150|400|900}}], i32[4,$3]<9-)
moe_up_gate({{{FEW}}}[256,138,9]@weight, $1[256,138,9]@weight, f32[256,1,{{150|400|900}}], i32[4,$2]<9-, act='silu')
"""  # noqa: E501

PLAIN = """
mul_mat({PLAIN}[77,6], {PLAIN}[77,{1|3|20}], dtype={'f32'|'f16'})
mul_mat({PLAIN}[64,7,2,3]{|@p0213|@p1023|@p3210}, f32[64,{5|24},4,3]{|@p0213|@p1023})
mul_mat({PLAIN}[4096,500], f32[4096,{1|4|8|100}], prec={'default'|'f32'})
mul_mat({PLAIN}[128,300], f32[128,3,16,2]@p0213)
fused_up_gate({PLAIN}[256,11], $1[256,11], f16[256,9,2], act='gelu')
"""


def experts() -> str:
    """Cases of experts of every type, as weights and, with up to 60 tokens, as inputs."""
    lines = []
    for used, columns, tokens in TOKENS:
        layout, same = (WEIGHT, "$2") if tokens <= 60 else ("@weight", "@weight")
        types = f"{{PLAIN|{FORMAT}}}[256,75,9]{layout}"
        x = f"f32[256,{columns},{tokens}]" + "@wide" * (columns > 1)
        ids = f"i32[{used},{tokens}]<9-@wide, prec={{'default'|'f32'}}"
        lines.append(f"mul_mat_id({types}, {x}, {ids})")
        lines.append(f"moe_up_gate({types}, $1[256,75,9]{same}, {x}, {ids}, act='silu')")
    lines.append(
        "moe_up_gate(q4_K[256,75,9]@weight, q6_K[256,75,9]@weight, "
        "f32[256,1,{3|100}], i32[4,$1]<9, act='relu')"
    )
    return "\n".join(lines)


GROUPS = {"blocks": BLOCKS, "plain": PLAIN, "experts": experts()}


def of(group: str) -> tuple[Case, ...]:
    """The cases of a group, without those of meanings, which the grid has."""
    return tuple(case for case in expand(GROUPS[group]) if not case.means)


@pytest.mark.parametrize("group", GROUPS)
def test_every_product_is_within_its_bound(group: str, options: Options) -> None:
    selection = of(group)
    results = list(outcomes(selection, "cuda", jobs=options.jobs))
    counts = Counter(outcome.status for outcome in results)
    faults = [f"{o.case}: {o.status} {o.why}" for o in results if o.status != "ok"]
    assert len(results) == len(selection) and not faults, f"{counts}\n" + "\n".join(faults[:20])
