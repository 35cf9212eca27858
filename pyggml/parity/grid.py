"""The large grid: the cases of test-backend-ops for our ops, and cases from reported faults.

Lines are as in `cases`; loops generate those where one size depends on another. Flash attention has
too many combinations, so its cases are a sample, the same at every call.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import product

from pyggml.parity.case import Case
from pyggml.parity.cases import cases, expand

#: One type of each family of formats.
BASE = "f32|f16|q8_0|q4_0|q4_1|q4_K|mxfp4|nvfp4|iq2_xxs"
#: Layouts that keep rows contiguous, as block types need.
ROWS = "|@wide|@inner|@step|@p0213"

LINES = f"""
mul_mat({{PLAIN|BLOCKS}}[256,16], f32[256,{{1|2|3|4|5|6|7|8|9}}])
mul_mat({{PLAIN|BLOCKS}}[256,7]{{{ROWS}}}, {{PLAIN}}[256,5]{{{ROWS}}})
mul_mat({{PLAIN|BLOCKS}}[256,5,{{1|2}},3]{{|@inner|@p0213}}, {{f32|f16}}[256,{{1|4}},4,6])
mul_mat({{PLAIN|BLOCKS}}[256,9], f32[256,{{1|5}}], dtype='f16')
mul_mat({{PLAIN|BLOCKS}}[512,9], f32[512,{{1|5}}], prec='f32')
mul_mat({{PLAIN|BLOCKS}}[2048,1], f32[2048,{{1|7|8|9|16|128|512}}])
mul_mat({{{BASE}}}[256,16,2,3]@{{p0213|p0132|p0321}}, {{f32|f16}}[256,{{4|8|16}},2,3]{{|@$2}})
mul_mat({{{BASE}}}[1024,16,3,2], f32[1024,{{1|8|16}},3,2])
mul_mat({{PLAIN}}[{{65|80|588|77}},6]{{LAYOUTS}}, {{PLAIN}}[$2,4]{{|@wide|@inner|@step|@p1032}})
mul_mat({{PLAIN}}[{{128|129}},{{1056|1057}}], f32[$2,1,{{1|2|8}},{{1|3}}])
mul_mat({{PLAIN}}[{{1056|1057}},{{128|129}},{{1|4}}], f32[$2,1,{{4|8}},{{1|3}}])
mul_mat({{PLAIN}}[64,4,1536], f32[64,8,1536])
mul_mat({{f32|f16|bf16|q8_0|q4_K|iq4_xs}}[512,576], f32[512,{{31|127|129|257}}])
mul_mat({{f32|bf16|q8_0|q4_K}}[256,16]{{|@wide}}, f32[256,{{1|9}}]~large)
mul_mat_id({{PLAIN|BLOCKS}}[256,12,4]{{{ROWS}}}, {{f32|f16}}[256,{{1|2}},{{1|32}}], i32[2,$5]<4-)
mul_mat_id({{{BASE}}}[256,32,{{4|8}}], f32[256,1,{{1|4|5|17|32|129}}], i32[{{1|2|4}},$3]<$2)
mul_mat_id({{{BASE}}}[256,32,{{4|8}}], f32[256,{{2|4}},{{1|4|5|17|32|129}}], i32[$3,$4]<$2-)
mul_mat_id({{f32|f16}}[{{16|64}},50,16], f32[$2,{{1|16}},200], i32[16,200]<16)
mul_mat_id({{f32|q8_0}}[288,288,32], f32[288,1,32], i32[2,32]<32)
mul_mat_id({{f32|f16}}[64,32,2], f32[64,2,8192], i32[2,8192]<2)
moe_up_gate({{PLAIN|BLOCKS}}[256,10,5]{{|@inner}}, $1[256,10,5], f32[256,{{1|3}},{{5|33}}], i32[3,$4]<5-, act={{'silu'|'gelu'|'relu'}})
moe_up_gate({{PLAIN|LEGACY}}[256,10,5]{{|@inner}}, $1[256,10,5], f32[256,{{1|3}},1], i32[3,1]<5-, act={{'silu'|'gelu'|'relu'}})
moe_up_gate({{f32|f16|bf16|q8_0|q4_K}}[256,10,5], {{f32|q8_0|q4_K}}[256,10,5]{{{ROWS}}}, {{f32|f16}}[256,3,4]{{|@inner}}, i32[3,4]<5-{{|@wide}})
fused_up_gate({{PLAIN|BLOCKS}}[256,10]{{|@wide}}, $1[256,10], {{f32|f16}}[256,{{5|33}}], act={{'silu'|'gelu'|'relu'}})
fused_up_gate({{PLAIN|LEGACY}}[256,10]{{|@wide}}, $1[256,10], {{f32|f16}}[256,1], act={{'silu'|'gelu'|'relu'}})
moe_up_gate({{PLAIN|BLOCKS}}[256,10,5]{{|@weight}}, $1[256,10,5]$2, f32[256,{{1|3}},{{5|33}}], i32[3,$4]<5-, limit=4.0)
fused_up_gate({{PLAIN|BLOCKS}}[256,10]{{|@weight}}, $1[256,10]$2, f32[256,{{1|5|33}}], limit=4.0)
mul_mat_id({{PLAIN|LEGACY|q4_K|q5_K|q6_K|iq4_xs|mxfp4}}[256,12,4]{{|@weight}}, f32[256,{{1|2}},{{1|40}}], i32[2,$4]<4-, prec='f32')
moe_up_gate({{PLAIN|LEGACY|q4_K|q5_K|q6_K|iq4_xs|mxfp4}}[256,10,5]{{|@weight}}, $1[256,10,5]$2, f32[256,{{1|3}},{{1|33}}], i32[3,$4]<5-, prec='f32')
fused_up_gate({{PLAIN|LEGACY|q4_K|q5_K|q6_K|iq4_xs|mxfp4}}[256,10]{{|@weight}}, $1[256,10]$2, f32[256,{{1|5|33}}], prec='f32')
grouped_topk(f32[{{64|128|160|256|288}},{{1|4|22|129}}]{{|@wide}}, n_group={{1|8}}, n_group_used=1, n_top={{1|2}}, k={{1|4|8}})
grouped_topk(f32[{{64|160|256}},{{1|22}}]{{|@wide}}, n_group=8, n_group_used={{3|4|8}}, n_top={{1|2}}, k={{6|8}})
multi_add(f32[{{32|129}},{{1|2|6|8}},{{1|32|129}}]{{|@inner|@p0213}})
mul_multi_add(f32[{{32|129}},{{1|2|6|8}},{{1|32|129}}]{{|@inner|@p0213}}, f32[1,$2,$3])
add_id(f32[{{32|129}},{{1|2|4}},{{1|32|129}}]{{|@inner}}, f32[$1,{{4|8}}]{{|@wide}}, i32[$2,$3]<$5-)
{{add|sub|mul}}({{f32|f16}}[12,6,4,2]{{LAYOUTS}}, $2[{{12,6,4,2|4,3,1,2}}]{{LAYOUTS}})
div({{f32|f16}}[12,6,4,2]{{LAYOUTS}}, $1[{{12,6,4,2|4,3,1,2}}]~above{{LAYOUTS}})
{{add|sub|mul}}(f32[{{16,10|10,5,1,1|16,16,16,16|1,1,640,1|5120,1,4}}], f32[{{1|1,1,1,1}}])
{{UNARY}}({{f32|f16}}[{{3|33,7|16,5,3,2|1025,4}}]{{LAYOUTS}})
{{log|sqrt}}({{f32|f16}}[{{3|33,7|16,5,3,2|1025,4}}]~above{{LAYOUTS}})
scale({{f32|f16}}[{{33,7|16,5,3,2}}]{{LAYOUTS}}, s={{2.5|-0.3}}, b={{0.0|1.5}})
clamp({{f32|f16}}[{{33,7|16,5,3,2}}]{{LAYOUTS}}, min={{-0.5|-inf}}, max={{0.25|inf}})
glu({{f32|f16}}[{{26,7|128,3,2,2}}]{{LAYOUTS}}, act={{'silu'|'gelu'|'relu'}}, swapped={{True|False}})
glu({{f32|f16}}[{{26,7|128,3,2,2}}]{{|@wide|@p0213}}, act={{'silu'|'gelu'|'relu'}}, limit={{0.25|7.0}})
glu({{f32|f16}}[33,7]{{|@wide|@step}}, $1[33,7]{{|@wide|@inner}}, act={{'silu'|'gelu'|'relu'}})
cast({{PLAIN|BLOCKS}}[512,3,2]{{{ROWS}}}, dtype={{'f32'|'f16'|'bf16'}})
cast({{PLAIN}}[{{32|96}},5]{{{ROWS}}}, dtype={{'q8_0'|'q4_0'|'q4_1'|'q5_0'|'q5_1'|'iq4_nl'}})
cpy({{PLAIN}}[64,6]{{|@wide|@p1032|@step}}, {{PLAIN|q8_0|q4_0|q4_1|q5_0|q5_1|iq4_nl}}[64,6]{{|@wide|@inner|@step}})
cont({{PLAIN|BLOCKS}}[256,5,3]{{@wide|@inner|@step|@p0213|@p0321}})
get_rows({{PLAIN|BLOCKS}}[256,5]{{{ROWS}}}, i32[{{1|4|33}}]<5-{{|@wide|@step}})
get_rows({{PLAIN|BLOCKS}}[256,5,7]{{|@p0213}}, i32[4,7]<5-)
get_rows({{f32|f16|q4_0}}[{{76800|2048}},5], i32[4]<5)
set_rows({{PLAIN|LEGACY}}[64,8,2]{{{ROWS}}}, {{f32|f16}}[64,3,2]{{|@wide|@p0213}}, {{i32|i64}}[3,{{1|2}}]!8{{|@step}})
concat({{f32|f16|i32}}[5,4,3,2]{{{ROWS}}}, $1[5,4,3,2]{{{ROWS}}}, dim={{0|1|2|3}})
concat({{BLOCKS}}[256,3,2]{{|@wide}}, $1[256,3,2], dim={{0|1|2}})
repeat({{f32|f16|bf16|i32}}[5,2,3,2]<9{{LAYOUTS}}, ne={{(5,2,3,2)|(10,4,3,2)|(5,2,6,4)}})
argsort(f32[{{1|2|16|60|255|256|1023|1025|4096|16384}},{{1|5}}]{{|~ties}}{{|@wide}}, order={{'asc'|'desc'}})
top_k(f32[{{16|60|255|256|1023|16384}},{{1|5}}]{{|~ties}}{{|@wide}}, k={{1|2|7|16}})
argmax(f32[{{1|32|33|1024|5000|32000}},{{1|5|70}}]{{|~ties}}{{|@wide|@step}})
sum_rows(f32[{{1|33|256|1025|10000}},{{1|5,3,2}}]{{|@wide|@inner|@step}})
{{norm|rms_norm}}(f32[{{64|1025|33|132|260}},5,3,2]{{LAYOUTS}}, eps={{1e-06|0.0001|0.1|10.0}})
norm(f32[{{1|3|127|2048|5000}},9]~level{{|@wide|@step}}, eps={{0.0|1e-06}})
soft_max(f32[{{16|15|1024|1023|200001}}])
rope_ext({{f32|f16}}[128,{{32|40|52|64}},2]{{|@wide|@inner|@p0213}}, i32[2]<512, n_dims=128, mode={{'normal'|'neox'}})
rope_ext({{f32|f16}}[128,{{1|8}},9]{{ROWS_}}, i32[9]<6000, {{-|f32[64]~one}}, n_dims={{64|32}}, mode={{'normal'|'neox'}}, freq_scale={{1.0|1.4245}}, ext_factor={{0.0|0.7465}}, attn_factor={{1.0|1.4245}}, n_ctx_orig=512)
rope_ext(f32[{{16|80}},{{16|32}},{{3|257}}], i32[$3]<4000, n_dims={{16|8}}, mode={{'normal'|'neox'}})
rope_ext({{f32|f16}}[128,{{1|8}},9]{{|@wide|@p0213}}, i32[9]<6000, {{-|f32[64]~one}}, n_dims={{64|32}}, mode={{'normal'|'neox'}}, freq_scale={{1.0|1.4245}}, ext_factor={{0.0|0.7465}}, n_ctx_orig=512, offset=64, back=True)
rope_ext({{f32|f16}}[64,2,70], i32[70]<{{40000|160000}}, n_dims=64, mode={{'normal'|'neox'}})
rope_ext({{f32|f16}}[192,{{1|16}},5,2]{{|@p0213}}, i32[5]<6000, n_dims=64, mode={{'normal'|'neox'}}, offset={{0|32|64|128}})
causal_mask(i32[{{1|2|7|33|129}}]<31, n_kv={{31|32|33}}, window={{None|1|2|32|1000}})
causal_mask(i32[{{1|2|7|33|129}}]<255, n_kv={{255|256|257}}, window={{None|1|2|32|1000}})
causal_mask(i32[{{1|2|33|129}}]<500, n_kv={{125|126|500}}, stride={{4|7}})
causal_mask(i32[{{1|33}}]<1, n_kv=1, window={{None|1|1000}})
causal_mask(i32[{{1|7|33}}]<300, i32[{{31|256}}]<300, n_kv=$2, window={{None|1|32}})
merge_lse(f32[{{2|65|129}},{{1|4}},{{1|7|33}},{{1|2}}]{{|@inner}}, f32[$1,$2,$3,$4]{{|@wide|@p0213}})
transpose({{PLAIN|i32|i64}}[{{1|7|64}},{{1|5}},3]<9)
mul_mat({{PLAIN|BLOCKS}}[256,7]@weight{{{ROWS}}}, {{f32|f16}}[256,{{1|5}}])
mul_mat({{PLAIN|BLOCKS}}[256,5,2,3]@weight{{|@inner|@p0213}}, f32[256,{{1|4}},4,6])
mul_mat({{PLAIN|BLOCKS}}[512,{{9|33}}]@weight, f32[512,{{1|2|8|9|33}}])
mul_mat({{PLAIN|BLOCKS}}[512,9]@weight, f32[512,{{1|5}}], {{dtype='f16'|prec='f32'}})
mul_mat({{PLAIN}}[{{65|80|588|77}},6]@weight{{LAYOUTS}}, {{f32|f16}}[$2,4])
mul_mat({{f32|bf16|q8_0|q4_K}}[256,16]@weight, f32[256,{{1|9}}]~large)
mul_mat_id({{PLAIN|BLOCKS}}[256,12,4]@weight{{{ROWS}}}, f32[256,{{1|2}},{{1|32}}], i32[2,$4]<4-)
moe_up_gate({{PLAIN|BLOCKS}}[256,10,5]@weight{{|@inner}}, $1[256,10,5]@weight{{|@p0213}}, f32[256,3,{{1|33}}], i32[3,$4]<5-)
fused_up_gate({{PLAIN|BLOCKS}}[256,10]@weight{{|@wide}}, $1[256,10]@weight, f32[256,{{1|5|33}}])
get_rows({{PLAIN|BLOCKS}}[256,5]@weight{{{ROWS}}}, i32[{{4|33}}]<5-)
{{add|mul}}(f32[{{64|129}},5,3], f32[$2{{,1|,5|,5,3}}]@weight{{|@wide|@step}})
cast({{PLAIN|BLOCKS}}[256,5,3]@weight{{|@inner|@p0213}}, dtype={{'f32'|'f16'}})
""".replace("ROWS_", ROWS)  # noqa: E501


def _batched() -> Iterator[str]:
    """Products with batches: sizes of a (bs), and matrices of b for each of a (nr)."""
    for (a2, a3), (r2, r3) in product([(1, 1), (3, 1), (3, 2)], product((1, 2), (1, 2))):
        b = f"{a2 * r2},{a3 * r3}"
        yield f"mul_mat({{{BASE}}}[256,16,{a2},{a3}]{{|@inner}}, {{PLAIN}}[256,{{1|16}},{b}])"
        yield f"mul_mat({{PLAIN}}[4,16,{a2},{a3}]{{|@p1032}}, {{PLAIN}}[4,{{1|16}},{b}]{{|@p0213}})"


def _soft_max() -> Iterator[str]:
    sizes = product((16, 15, 1024, 1023), (16, 15, 1), ("1,1", "3,1", "2,3"))
    for n0, n1, outer in sizes:
        heads = outer.split(",")[0]
        masks = "|".join(f"{t}[{n0},{n1}]~blocks" for t in ("f16", "f32"))
        masks += f"|f16[{n0},{n1},{outer}]~mask"
        a, sinks = f"f32[{n0},{n1},{outer}]{{|@inner}}", f"{{-|f32[{heads}]}}"
        yield f"soft_max_ext({a}, -, {sinks}, scale={{1.0|0.1}})"
        yield f"soft_max_ext({a}, {{{masks}}}, {sinks}, scale={{1.0|0.1}}, max_bias={{0.0|8.0}})"


#: Head sizes of keys and values.
HEADS = [(n, n) for n in (40, 64, 72, 80, 96, 112, 128, 192, 256, 512)]
HEADS += [(192, 128), (320, 256), (576, 512)]
GQA = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 20, 32, 128)
N_KV = (1, 31, 32, 33, 113, 255, 256, 257, 512, 1024, 4096)
N_Q = (1, 2, 3, 7, 8, 9, 16, 32, 33, 75, 127, 128, 129, 512)
#: Upper limits of a sampled case: rows of scores, products of a query and a key.
ROWS_AT_MOST, WORK = 1024, 1 << 23


def _attention(count: int = 3000) -> Iterator[str]:
    rng = random.Random(0)
    pick = rng.choice
    while count:
        d_k, d_v = pick(HEADS)
        h_kv, gqa, n_kv, n_q = pick((1, 2, 4, 16)), pick(GQA), pick(N_KV), pick(N_Q)
        heads, n3 = h_kv * gqa, pick((1, 1, 1, 3))
        rows = heads * n_q * n3
        if rows > ROWS_AT_MOST or rows * n_kv * (d_k + d_v) > WORK * 16:
            continue
        count -= 1
        blocked = d_k % 32 == 0
        dtype = pick(
            ("f32", "f16", "bf16", "q8_0", "q8_0", "q4_0", "q5_1", "iq4_nl")[: 8 * blocked or 3]
        )
        layout = pick(("", "", "@wide", "@p0213", "@step"))
        start = pick((0, 64)) if d_k - d_v == 64 else 0
        v = f"{dtype}[{d_v},{n_kv},{h_kv},{n3}]"
        v += f"=1+{start}" if d_v < d_k or rng.random() < 0.2 else pick(("", "@wide", "@p0213"))
        m2 = pick((1, 1, heads))
        mask = f"f16[{n_kv},{n_q + pick((0, 5))},{m2},{pick((1, n3))}]"
        mask = pick(("-", mask + "~causal", mask + "~blocks", mask + "~mask"))
        sinks = pick(("-", "-", f"f32[{heads}]"))
        length = pick(("-", "-", "-", f"i32[1]#{rng.randrange(n_kv + 2)}"))
        attrs = [f"scale={d_k**-0.5!r}"]
        attrs += ["max_bias=8.0"] if mask != "-" and rng.random() < 0.3 else []
        attrs += pick(([], [], ["logit_softcap=10.0"])) + pick(([], ["prec='f32'"]))
        attrs += pick(([], ["lse=True"])) + pick(([], [], ["kv0=1"] if length != "-" else []))
        q = f"f32[{d_k},{n_q},{heads},{n3}]{pick(('', '@p0213', '@inner'))}"
        k = f"{dtype}[{d_k},{n_kv},{h_kv},{n3}]{layout}"
        chosen = f"i32[{rng.randint(1, n_kv)},{n_q},1,{n3}]!{n_kv}-"
        lists = [chosen] if rng.random() < 0.2 else []
        yield f"flash_attn_ext({', '.join([q, k, v, mask, sinks, length, *lists, *attrs])})"


@cache
def all_cases() -> tuple[Case, ...]:
    """The small grid and the large one."""
    lines = "\n".join([LINES, *_batched(), *_soft_max(), *_attention()])
    distinct = {str(case): case for case in (*cases(), *expand(lines))}
    return tuple(distinct.values())


PERF = """
mul_mat({f32|f16|bf16|q8_0|q4_0|q4_K|q6_K|iq4_nl}[4096,4096]@weight, f32[4096,{1|2|8|512}])
mul_mat_id({f16|q8_0|q4_K}[2048,768,32]@weight, f32[2048,1,{1|8|128}], i32[8,$2]<32)
flash_attn_ext(f32[128,{1|32},32], {f16|q8_0}[128,{512|4096},8], $2[128,$3,8], f16[$3,$1]~causal, scale=0.088)
flash_attn_ext(f32[576,{1|32},16]@p0213, {f16|q8_0}[576,4096], $2[512,4096]=1+64, scale=0.07)
flash_attn_ext(f32[576,1,128]@p0213, {f16|q8_0}[576,65536], $1[512,65536]=1+0, -, -, -, i32[2048,1]!65536, scale=0.04)
lightning_indexer(f32[128,64,1], {f16|q8_0}[128,65536], f32[64,1])
top_k(f32[163840], k=2048)
soft_max_ext(f32[4096,32,32], f16[4096,32]~causal, scale=0.1)
rope_ext(f32[128,32,512], i32[512]<4096, n_dims=128, mode='neox')
rms_norm(f32[4096,512], eps=1e-06)
add(f32[4096,512], f32[4096,512])
get_rows(q4_K[4096,4096]@weight, i32[512]<4096)
set_rows(f16[576,4096], f32[576,512], i32[512]!4096)
"""  # noqa: E501


@cache
def perf_cases() -> tuple[Case, ...]:
    """Cases of real models' sizes, for measuring times."""
    return expand(PERF)
