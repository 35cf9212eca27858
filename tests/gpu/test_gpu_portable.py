"""The attention kernels of GPUs with less shared memory, run on this one.

flash_attn_ext of few queries as on 8.0 (163 KB of shared memory per block) and on 8.6 or 8.9
(99 KB), compared with float64. The same instances are compiled for this GPU, without the features
of 9.0.
"""

from __future__ import annotations

import pytest

from pyggml import backends
from pyggml.parity import running
from pyggml.parity.cases import expand
from tests.gpu import kernels

#: Largest shared memory of a block in bytes, by compute capability.
SHARED = {"8.0": 166_912, "8.9": 101_376}
#: Kernels for few queries.
KERNELS = ("split<", "latent<", "combine<", "survey")
LINES = """
flash_attn_ext(f32[{64|128|256},{1|2},8], {f16|bf16|q8_0}[$1,{1|17|3000},{2|8}], $3[$1,$4,$5], scale=0.1)
flash_attn_ext(f32[192,{1|3},16], {f16|bf16|q8_0}[192,{130|1999},{4|16}], $2[128,$3,$4], {-|f16[$3,3]~causal|f16[$3,3]~blocks}, scale=0.07)
flash_attn_ext(f32[{80|96},{1|3},4,2], {f16|bf16}[$1,{33|1000},{1|4},2], $3[$1,$4,$5,2], {-|f16[$4,3]~mask}, scale=0.1, lse=True)
flash_attn_ext(f32[{64|128|256},1,4], {f16|q8_0}[$1,999,4], $2[$1,999,4], f16[999,1,4]~mask, f32[4], i32[1]#{0|500}, scale=0.2, max_bias=8.0, logit_softcap=10.0)
flash_attn_ext(f32[576,{1|2},{5|16|128}]@p0213, {f16|bf16|q8_0}[576,{100|4096}], $3[512,$4]=1+{0|64}, {-|f16[$4,2]~causal}, scale=0.04)
flash_attn_ext(f32[576,1,16], {f16|q8_0}[576,999], $1[512,999]=1+64, f16[999,1,16]~mask, f32[16], i32[1]#{0|500}, scale=0.04, max_bias=8.0, logit_softcap=10.0, lse=True)
"""  # noqa: E501


@pytest.mark.parametrize("line", LINES.strip().splitlines())
@pytest.mark.parametrize("capability", SHARED)
def test_kernels_of(capability: str, line: str) -> None:
    device = backends.get("cuda").context.about  # type: ignore[attr-defined]
    if device.shared < SHARED[capability]:
        pytest.skip(f"this GPU has only {device.shared} bytes of shared memory per block")
    with kernels.bound(SHARED[capability]) as counts:
        outcomes = [running.tested(case, "cuda") for case in expand(line)]
    faults = [f"{o.case}: {o.status} {o.why}" for o in outcomes if o.status != "ok"]
    assert outcomes and not faults, "\n".join(faults[:5])
    names = {name for _, name in counts}
    assert any(name.startswith(("split<", "latent<")) for name in names), names
    assert all(name.startswith(KERNELS) for name in names), names
