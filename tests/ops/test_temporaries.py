"""No step allocates a temporary of 64 KiB or more outside its declared scratch."""

from __future__ import annotations

import tracemalloc

import pytest

from pyggml import compile
from pyggml.node import Node
from pyggml.parity.case import Case, build
from pyggml.parity.cases import cases

#: Most bytes allocated at once during a step: two of NumPy's 32 KiB cast buffers and a few small
#: objects. An array of an operand's size has more than 128 KiB in every case here.
LIMIT = 80 * 1024
#: Cases in which a row, a matrix or a list of ids is far larger than the limit.
LARGE = """
add(f32[512,300], f32[512])
add(f16[300,200,3]@inner, f16[300,200,3]@p1032)
mul(f32[512,60,4], f32[64,30,2]@wide)
sub(f32[200000], f32[200000])
div(f32[512,300], f32[1,300])
scale(f16[512,300]@inner, s=2.0)
scale(f32[512,300]@p1032, s=2.0, b=1.0)
clamp(f16[200000], min=0.0, max=1.0)
fill(f32[200000], value=1.0)
exp(f16[200000])
log(f32[200000]~above)
sqr(f32[512,300]@p1032)
sqrt(f32[200000]~above)
tanh(f32[200000])
relu(f16[512,300]@inner)
sigmoid(f32[200000])
silu(f16[200000])
gelu(f32[512,300]@inner)
glu(f32[512,300])
glu(f16[40000,4], act='gelu', swapped=True)
add_id(f32[512,6,70], f32[512,8], i32[6,70]<8-)
reshape(f32[512,300], ne=(300,512))
view(f32[512,300], ne=(256,300,1,1), start=(256,0,0,0), step=(1,1,1,1))
permute(f32[512,300], axes=(1,0,2,3))
transpose(f32[512,300])
cont(f32[300,512]@p1032)
cont(q4_K[1024,300]@wide)
cast(f32[300,512]@p1032, dtype='f16')
cast(f16[512,300], dtype='bf16')
cast(q4_K[1024,300]@wide, dtype='f32')
cast(iq2_xs[1024,300], dtype='f16')
cast(f32[512,300]@inner, dtype='q8_0')
cast(f32[40960,3], dtype='iq4_nl')
cast(f32[200000]~ties, dtype='i32')
cpy(f32[512,300]@p1032, f16[300,512])
cpy(f32[512,300], q8_0[512,300]@inner)
cpy(f32[512,60]@p1032, f32[60,512]@p1032)
concat(f32[512,300], f32[512,200], dim=1)
concat(q8_0[512,300]@wide, q8_0[512,300], dim=0)
repeat(f32[512,30], ne=(1024,300))
get_rows(q4_K[1024,900], i32[700]<900-)
get_rows(f32[40000,9], i32[5]<9-)
get_rows(f16[64,20000], i32[20000]<20000)
set_rows(f16[512,900], f32[512,700], i32[700]!900)
set_rows(q8_0[40960,9], f32[40960,5], i32[5]!9)
set_rows(f32[64,20000], f32[64,20000], i64[20000]!20000)
sum_rows(f32[512,300]@p1032)
rms_norm(f32[40000,5], eps=1e-05)
rms_norm(f32[64,20000]@inner, eps=1e-05)
soft_max(f32[40000,5])
soft_max_ext(f32[300,70,8], f16[300,70,2]~mask, f32[8], scale=0.5, max_bias=8.0)
soft_max_ext(f32[5000,70], f32[5000,70]~mask@wide)
argsort(f32[40000,3], order='desc')
argsort(f32[64,3000]@p1032, order='asc')
top_k(f32[40000,3], k=30000)
top_k(f32[256,3000], k=8)
argmax(f32[40000,3]@wide)
argmax(f32[64,20000]@p1032)
rope_ext(f32[192,16,100]@p0213, i32[100]<6000, f32[32]~above, n_dims=64, mode='neox', offset=128)
rope_ext(f16[64,1,5000], i32[5000]<6000, n_dims=64)
rope_ext(f32[40000,2,3], i32[3]<6000, n_dims=40000)
mul_mat(q4_K[1024,600], f32[1024,100])
mul_mat(f16[1024,600]@p1032, f32[1024,100]@p1032, dtype='f16')
mul_mat(f32[1024,600], f32[1024,100])
mul_mat(bf16[128,300,2], f16[128,40,16]@p0213)
mul_mat(f32[512,600], f32[512,1])
mul_mat(f32[64,600,2]@p0213, f32[64,300,4]@inner)
mul_mat_id(q8_0[512,300,8], f32[512,1,300], i32[6,300]<8-)
mul_mat_id(f32[512,300,8]@p0213, f16[512,6,100]@inner, i32[6,100]<8)
moe_up_gate(q4_K[512,300,8], q4_K[512,300,8], f32[512,1,300], i32[6,300]<8, act='gelu')
moe_up_gate(f32[512,300,8], f32[512,300,8], f32[512,1,300], i32[6,300]<8-)
fused_up_gate(q8_0[512,300], q8_0[512,300], f32[512,200])
fused_up_gate(f32[512,300], f16[512,300], f16[512,200])
grouped_topk(f32[256,3000], n_group=8, n_group_used=4, n_top=2, k=8)
multi_add(f32[2000,8,50])
mul_multi_add(f32[2000,8,50], f32[1,8,50])
flash_attn_ext(f32[192,100,16]@p0213, f16[192,700,16], f16[128,700,16], f16[700,100]~mask, scale=0.1)
flash_attn_ext(f32[576,70,16]@p0213, q8_0[576,700], q8_0[512,700]=1+0, f16[700,70]~mask, scale=0.1)
flash_attn_ext(f32[64,1,8], f32[64,9000,2], f32[64,9000,2], -, f32[8], i32[1]#8000, scale=0.1, lse=True)
flash_attn_ext(f32[64,300,6], bf16[64,300,2], f16[64,300,2], f16[300,300,3]~mask, scale=0.1, max_bias=8.0, logit_softcap=9.0)
causal_mask(i32[700]<900, n_kv=900, window=100)
causal_mask(i32[1]<40000, n_kv=90000)
merge_lse(f32[513,16,100], f32[513,16,100]@inner)
"""  # noqa: E501

CASES = [Case.parse(line) for line in LARGE.split("\n") if line]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_large_temporary(case: Case) -> None:
    built = build(case)
    plan = compile({"y": built.node}).bind()
    for name, array in built.states.items():
        plan.store.write(name, array)
    plan.run(built.inputs)  # fills tables that are computed on first use
    runners = plan.runners  # of one split, or of none
    peaks: dict[Node, int] = {}
    tracemalloc.start()
    try:
        for i, step in enumerate(plan.steps):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            runners[0].run_step(i)
            peaks[step.node] = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert max(peaks.values(), default=0) < LIMIT, peaks


def test_every_op_is_measured() -> None:
    assert {case.op for case in CASES} == {case.op for case in cases()}
