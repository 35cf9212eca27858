"""The parity cases of every op, for the tests and for comparing backends.

Each line is one or more cases in the form of `Case`: `{a|b}` means one line with each word.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from pyggml import ops
from pyggml.dtypes import TYPES
from pyggml.parity.case import Case
from pyggml.quants import DECODABLE

PLAIN = "f32|f16|bf16"
LEGACY = "q8_0|q4_0|q4_1|q5_0|q5_1|iq4_nl"
#: Every block type that can be decoded.
BLOCKS = "|".join(name for name, t in TYPES.items() if t.kind == "block" and name in DECODABLE)
#: Unary ops that take every number. `log` and `sqrt` have lines of their own.
UNARY = "|".join(op.name for op in ops.elementwise.UNARY if op not in (ops.log, ops.sqrt))
#: All layouts, for lines that try each of them.
LAYOUTS = "|@wide|@inner|@step|@p0213|@p1032|@p3210"

ELEMENTWISE = """
{add|sub|mul|div}({f32|f16}[37,5,3,2], $2[{37,5,3,2|37|1,5|1,1,3,2|1|37,5,1,2}])
{add|sub|mul|div}(f32[12,6,4,2]{LAYOUTS}, f32[4,3,1,2]{@wide||@p0213})
add({i32|i64}[33,5]<1000, $1[{33|33,5|11}]<1000-)
div(f32[16,3], f32[16,3]~wild)
scale({f32|f16}[{37,5|64|1|33,2,3,2}], s=-1.7, b=0.3)
scale(f32[64,5]{LAYOUTS}, s={2.0|0.0})
clamp({f32|f16}[37,5]{|~wild}, min={-0.5|-inf}, max=0.25)
fill({f32|f16}[37,5]~wild, value=-3.5)
{UNARY}({f32|f16}[{37,5|1|64,3,2,2}]{|@inner|@p1032})
{exp|log|sqr|sqrt|tanh|relu|sigmoid}(f32[64,5]~wild)
{log|sqrt}({f32|f16}[37,5,3]~above{|@wide|@p1032})
glu({f32|f16}[26,7,2]{|@inner|@p0213}, act={'silu'|'gelu'|'relu'}, swapped={True|False})
glu(f32[26,7]{|@wide}, f32[26,7]{|@step}, act={'silu'|'gelu'|'relu'})
add_id(f32[10,3,4]@apart, f32[10,5]@apart, i32[3,4]<5-@apart)
{add|mul}({f32|f16}[64,5]{|@apart}, $2[{64|64,5}]@apart)
{silu|exp}({f32|f16}[64,5]@apart)
add_id(f32[10,3,4]{|@inner|@p0213}, f32[10,5]{|@wide}, i32[3,4]<5-{|@wide})
"""

SHAPES = """
reshape(f32[12,5,2], ne={(24,5)|(5,2,12)|(2,2,6,5)|(120,)})
reshape(q4_0[64,6], ne=(64,2,3))
view(f32[12,5,3,2]{|@p2013}, ne=(5,2,2,1), start=(3,1,0,1), step=(2,2,1,1))
view(q8_0[128,6], ne=(64,3,1,1), start=(32,1,0,0), step=(1,2,1,1))
permute(f32[7,5,3,2]{|@inner}, axes={(0,1,2,3)|(1,0,2,3)|(3,0,1,2)|(2,3,1,0)})
permute(q4_0[32,5,3,2], axes=(0,3,1,2))
transpose({f32|f16|bf16|i32}[7,5,3])
cont({f32|f16|bf16}[7,5,3,2]{LAYOUTS})
cont({i32|i64}[7,5,3,2]<99-{@p3210|@step})
cont({q8_0|q4_K|iq2_xs}[256,5,3]{@wide|@inner|@step|@p0213})
cast({f32|f16|bf16}[37,5,2]{|@wide|@p1032}, dtype={'f32'|'f16'|'bf16'})
cast({f32|f16|bf16|q8_0}[64,5,2]{|@wide|@p0213}, dtype={'q8_0'|'q4_0'|'q4_1'|'q5_0'})
cast({f32|f16|bf16|q8_0}[64,5,2]{|@wide|@p0213}, dtype={'q5_1'|'iq4_nl'})
cast({BLOCKS}[512,3]{|@inner|~wild}, dtype='f32')
cast({q8_0|q6_K}[256,3], dtype={'f16'|'bf16'})
cast(f32[33,4]~ties{|@p1032}, dtype={'i32'|'i64'})
cast({i32|i64}[33,4]<99-{|@step}, dtype={'f32'|'i32'|'i64'})
concat({f32|f16|i32}[5,4,3,2]{|@inner|@p3210}, $1[5,4,3,2], dim={0|1|2|3})
concat({q8_0|q4_K|bf16}[256,3,2], $1[256,3,2], dim={0|1|2|3})
concat(f32[1,7], f32[6,7], dim=0)
repeat({f32|f16|bf16}[5,1,3,2]{|@inner|@p1032}, ne=(10,4,3,4))
repeat(i32[5,3]<9, ne=(5,3,2,2))
get_rows({PLAIN}[37,9,3,2]{|@inner|@p0213}, i32[7,3,2]<9-{|@wide})
get_rows({BLOCKS}[256,9], i32[5]<9)
get_rows({q8_0|q4_K}[256,9,3,2]{@inner|@p0213}, i32[4,3,2]<9-)
get_rows(i32[7,9]<99-, i32[5]<9-)
get_rows({f32|f16}[64,9]@apart, i32[5]<9-@apart)
set_rows({f32|f16}[64,9]@apart, f32[64,5]@apart, {i32|i64}[5]!9@apart)
cast({f32|f16}[64,5]@apart, dtype={'f16'|'bf16'|'q8_0'})
cpy({f32|f16|bf16}[64,5]@apart, {f16|f32|bf16}[64,5]{|@apart})
cpy(f16[64,2000], bf16[128000])
cpy(bf16[1,70000], f16[70000])
cpy({f16|bf16}[64,2000]@step, f32[128000])
set_rows({PLAIN}[64,8,4,3]{|@inner|@p0213}, {f32|f16}[64,3,4,3]{|@wide}, {i32|i64}[3,{4|2|1},3]!8)
set_rows({q8_0|q4_0|iq4_nl}[64,8,2]{|@inner}, f32[64,3,2]{|@p0213}, i32[3,1]!8)
set_rows(f32[37,9], f32[37,5], i32[5]!9{|@step})
set_rows({i32|i64}[5,9]<99, $1[5,4]<99, {i32|i64}[4]!9)
cpy({PLAIN}[12,10]{|@p1032}, {PLAIN}[{12,10|6,5,4|20,6}]{|@inner|@p1032})
cpy({f32|q8_0}[64,6]{|@wide}, {q8_0|q4_0|f16}[64,3,2]{|@inner})
cpy(i32[7,5]<99-, {i32|i64|f32}[5,7]{|@step})
"""

REDUCE = """
{sum_rows|argmax|argsort}(f32[37,5]@apart)
rms_norm(f32[64,5]@apart, eps=1e-06)
sum_rows(f32[{37,5,2|1|1000,3|2,2,2,2}]{|@inner|@p1032})
rms_norm(f32[{37,5,2|512,3|8|1,4}]{|@inner|@step|@p0213}, eps={1e-06|0.5})
soft_max(f32[{37,5,3|1,2|512}])
soft_max(f32[{5|4},40]~wild)
soft_max_ext(f32[6,40]~wild, {-|f16[6,40]~mask}, f32[1], scale=0.7)
soft_max_ext(f32[37,5,3]{|@inner|@p0213|@p1032}, scale={1.0|0.1})
soft_max_ext(f32[19,3,{1|5|6|12},2], {f16|f32}[19,{3|4}]~mask, scale=0.7, max_bias={0.0|8.0})
soft_max_ext(f32[11,4,4,6]@inner, {f16|f32}[11,6,{1|2|4},{1|3}]~mask{|@wide}, max_bias={0.0|4.0})
soft_max_ext(f32[29,3,4], {-|f16[29,3]~mask|f32[29,3,4]~mask}, f32[4], scale=0.5)
soft_max_ext(f32[29,3,4]{|@apart}, {-|f16[29,3]~mask}, f32[4]@apart, scale=0.5)
soft_max_ext(f32[17,3,3], f16[17,3]~mask, f32[3], max_bias=8.0, head0=5, n_head=12)
soft_max_ext(f32[300,70,3,2], f16[300,70]~mask)
argsort(f32[{33,5,2|1|700,3}]{|~ties|@inner}, order={'asc'|'desc'})
argsort(f32[{33,9|5000,2}]~wild{|@step}, order={'asc'|'desc'})
top_k(f32[{64,7|9,2,2}]{|~ties|@wide|~wild}, k={1|6|9})
argmax(f32[{33,5,3,2|33,4|7}]{|~ties|@inner|@p1032|~wild})
argmax(f32[{3,50|20000,3}]~wild)
"""

ROPE = """
rope_ext({f32|f16}[64,3,5,2]{|@inner|@p0213}, i32[5]<6000, n_dims={64|20}, mode={'normal'|'neox'})
rope_ext(f32[192,3,5], i32[5]<6000, n_dims=64, mode={'normal'|'neox'}, offset={0|128|2})
rope_ext(f32[64,2,5], i32[5]<6000, n_dims=64, freq_base=500000.0, freq_scale=0.25, attn_factor=1.3)
rope_ext(f32[80,2,5], i32[5]<6000, {-|f32[32]~above|f32[40]~above@wide}, n_dims=40, mode={'normal'|'neox'}, n_ctx_orig={4096|100}, freq_scale=0.025, ext_factor={1.0|0.7465}, attn_factor=0.7305, beta_fast=24.0, beta_slow=2.0)
rope_ext(f32[64,1,1], i32[1]<6000, n_dims=64)
rope_ext(f32[64,2,9], i32[9]<{160000|2147483647}, n_dims=64, freq_scale={1.0|0.025}, mode={'normal'|'neox'})
rope_ext(f32[64,2,5], i32[5]#-2147483648, {-|f32[32]~above@apart|f32[40]~above@wide}, n_dims=64)
rope_ext({f32|f16}[64,2,5]@apart, i32[5]<6000{|@apart}, {-|f32[32]~above@apart}, n_dims=64, mode={'normal'|'neox'})
"""  # noqa: E501

LINEAR = """
mul_mat({PLAIN|BLOCKS}[256,{16|1|7}], f32[256,{5|1}])
mul_mat({PLAIN}[77,6], {PLAIN}[77,3], dtype={'f32'|'f16'})
mul_mat({PLAIN}[64,7,2,3]{|@inner|@p0213|@p1032|@p3210}, f32[64,5,4,3]{|@inner|@p0213})
mul_mat(f32[33,5]{|@p1032}, {PLAIN}[33,4,3]{|@p1032|@p2013|@step})
mul_mat({f32|q8_0|q4_K}[256,3,2,2]{|@wide|@p0213}, f32[256,1,{2|6|12},{2|4}])
mul_mat({BLOCKS}[256,3,2,2], f32[256,2,4,4])
mul_mat(f32[1,1], f32[1,1])
mul_mat({f32|f16}[64,7]@apart, f32[64,{1|5|20}]@apart)
mul_mat_id({f32|q8_0}[64,9,4], f32[64,2,3]@apart, i32[2,3]<4-@apart)
mul_mat({f32|q8_0}[64,1,1], f32[64,3,5], prec='f32')
mul_mat(f16[40,300,1]{|@p1032}, f32[40,9,{1|16}])
mul_mat_id({f32|f16|bf16|q8_0|q4_K}[256,12,8], {f32|f16}[256,{1|2|6},5]{|@inner}, i32[6,5]<8-{|@wide})
mul_mat_id({f32|q4_0}[64,9,4]{|@inner}, f32[64,3,1], i32[3,1]<4)
mul_mat_id(f32[64,9,4], f32[64,1,70], i32[2,70]<4-)
mul_mat_id({f32|bf16|q8_0|q4_K}[256,12,8], {f32|f16}[256,1,{5|40}], i32[2,$3]<8-, prec='f32')
"""  # noqa: E501

MOE = """
moe_up_gate({f32|f16|q8_0|q4_K}[256,10,5]{|@inner}, $1[256,10,5], {f32|f16}[256,{1|3},7], i32[3,7]<5-, act={'silu'|'gelu'|'relu'})
fused_up_gate({f32|bf16|q8_0|q4_K}[256,11]{|@wide}, $1[256,11], {f32|f16}[256,5,2]{|@p0213}, act={'silu'|'gelu'|'relu'})
moe_up_gate({f16|q8_0|q4_K}[256,10,5], {f16|q8_0}[256,10,5], f32[256,3,{7|30}], i32[3,$3]<5-, act='gelu', prec='f32')
fused_up_gate({bf16|q8_0|q4_K}[256,11], $1[256,11], f32[256,{1|5|20}], act='gelu', prec='f32')
grouped_topk(f32[{160,7|16,3|16}]{|@wide}, n_group={1|2|8}, n_group_used=1, n_top={1|2}, k=2)
grouped_topk(f32[64,{5|1}], n_group=8, n_group_used=4, n_top={1|2|8}, k=8)
grouped_topk(f32[40,30]~wild, n_group=8, n_group_used=3, n_top={1|2|5}, k=6)
multi_add(f32[{13,6,5|1,1,1|700,3,2}]{|@inner|@p0213})
mul_multi_add(f32[13,6,5]{|@inner|@p0213}, f32[1,6,5]{|@step|@apart})
"""  # noqa: E501

ATTENTION = """
flash_attn_ext(f32[192,3,4]{|@p0213}, {PLAIN}[192,23,{1|2|4}]{|@inner}, $2[128,23,$3], f16[23,5]~mask, scale=0.07)
flash_attn_ext(f32[576,{1|3},4]@p0213, {f32|f16|bf16|q8_0}[576,17], $2[512,17]=1+{0|64}, {-|f16[17,3]~mask}, scale=0.04)
flash_attn_ext(f32[64,4,6], {f32|f16|q8_0}[64,17,2], $1[64,17,2], f16[17,4,{1|3|6}]~mask{|@wide}, max_bias={0.0|8.0}, scale=0.125, lse={True|False})
flash_attn_ext(f32[64,5,3], {f32|f16|q4_0}[64,31,3], $1[32,31,3], logit_softcap=10.0, scale=0.5, prec='f32')
flash_attn_ext(f32[32,3,12,4]{|@inner}, f32[32,12,4,4]{|@p0213}, f32[32,12,4,4], f16[12,3,3,2]~mask, max_bias=8.0, scale=0.2, head0={0|4}, n_head=16)
flash_attn_ext(f32[32,3,4], f32[32,14,2], f32[48,14,2], {-|f16[14,3]~mask}, f32[4], {-|i32[1]#9|i32[1]#0}, scale=0.3, lse={True|False})
flash_attn_ext(f32[32,3,4], f32[32,14,2], f32[48,14,2], {-|f16[14,3]~mask}, -, i32[1]#{20|9|0}, scale=0.3, lse={True|False}, kv0={0|8})
flash_attn_ext(f32[40,2,5], f32[40,1,5], f32[24,1,5], scale=0.2)
flash_attn_ext(f32[64,70,2], f16[64,700,1], f16[64,700,1], f16[700,70]~mask, scale=0.2, lse=True)
flash_attn_ext(f32[64,7,{2|4}], {f32|f16|bf16|q8_0}[64,37,2]~holed, $2[64,37,2]~holed, f16[37,7,{1|2}]~holes, scale=0.125, max_bias={0.0|8.0}, lse={True|False})
flash_attn_ext(f32[64,7,2], {f32|f16|q8_0|q4_0}[64,{37|300},1]~ended, $1[64,$2,1]~ended, {-|f16[$2,7]~mask}, -, i32[1]#18, scale=0.125, {logit_softcap=5.0|prec='f32'})
flash_attn_ext(f32[576,{1|3|20|70},4]@p0213, {f32|f16|bf16|q8_0}[576,69]~holed, $2[512,69]=1+{0|64}, f16[69,$1]~holes, scale=0.04)
flash_attn_ext(f32[576,{1|20},4], {f16|q8_0}[576,333]~ended, $2[512,333]=1+64, -, -, i32[1]#167, scale=0.04)
flash_attn_ext(f32[{64|80|96|128|256},{70|6},2], {f16|bf16}[$1,330,2]~holed, $3[$1,330,2]~holed, f16[330,$2]~holes, scale=0.1)
flash_attn_ext(f32[{64|192},130,34], {f16|bf16|q8_0}[$1,150,34]~ended, $2[{64|128},150,34]~ended, {-|f16[150,130]~holes}, -, i32[1]#75, scale=0.1)
flash_attn_ext(f32[40,2,5], f32[40,29,5]~holed, f32[24,29,5]~holed, f16[29,2]~holes, f32[5], scale=0.2)
flash_attn_ext(f32[32,{1|3},2], {f32|f16|bf16}[32,300,1], $2[{1|5},300,1], {-|f16[300,3]~mask}, {-|f32[2]}, scale=0.2, lse={True|False})
flash_attn_ext(f32[32,3,4], f32[32,14,2], f32[48,14,2], {-|f16[14,3]~mask}, f32[4]@apart, i32[1]#9@apart, scale=0.3)
flash_attn_ext(f32[64,3,4], f16[64,300,2], f16[64,300,2], -, f32[4]@apart, i32[1]#200@apart, scale=0.1)
causal_mask(i32[{1|5|70}]<37{|@apart}, n_kv={37|256}, window={None|1|9})
causal_mask(i32[{1|5}]<1{|@apart}, n_kv=1, window={None|1|9})
causal_mask(i32[{1|5|70}]<37{|@apart}, i32[33]<40{|@apart}, n_kv=33, window={None|1|9})
causal_mask(i32[7]#{-1|37}, i32[5]#{-2147483648|0|1|38}, n_kv=5, window={None|9})
causal_mask(i32[7]#{-2147483648|-1|-2147483600}, n_kv={1|37|256}, window={None|1|9|2147483647})
merge_lse(f32[{2|33},3,5,2]{|@inner}, f32[$1,3,5,2]{|@wide})
"""  # noqa: E501

#: Sources that are weights in a model: constants, whole and in part.
WEIGHTS = """
mul_mat({PLAIN|BLOCKS}[256,{16|7}]@weight{|@inner}, f32[256,{5|1}])
mul_mat({f32|f16|q8_0|q4_K}[256,6,2,3]@weight{@wide|@step|@p0213|@p0321}, {f32|f16}[256,3,4,3])
mul_mat({PLAIN}[77,6,2]@weight{|@p1032|@p2013}, {PLAIN}[77,3,2]{|@weight})
mul_mat(q8_0[64,16]@weight{|@wide}, f32[64,9], {dtype='f16'|prec='f32'})
mul_mat_id({f32|f16|bf16|q8_0|q4_K|iq4_xs}[256,12,4]@weight{|@inner|@p0213}, f32[256,{1|2},5], i32[2,5]<4-)
moe_up_gate({f32|f16|q8_0|q4_K}[256,10,5]@weight{|@inner}, $1[256,10,5]{|@weight|@weight@wide}, f32[256,3,7], i32[3,7]<5-)
moe_up_gate(q8_0[256,10,5]@weight, q8_0[256,10,5]=0+0, f32[256,1,7], i32[3,7]<5-)
fused_up_gate({f32|bf16|q8_0|q4_K}[256,11]@weight{|@wide}, {f32|q4_K}[256,11]@weight{|@step}, f32[256,5])
mul_mat_id({f16|q8_0|iq4_xs}[256,12,4]@weight, f32[256,{1|2},40], i32[2,40]<4-, prec='f32')
moe_up_gate({bf16|q8_0|q4_K}[256,10,5]@weight, $1[256,10,5]@weight, f32[256,1,{7|30}], i32[3,$2]<5-, prec='f32')
fused_up_gate({f32|q8_0|q4_K}[256,11]@weight, $1[256,11]@weight, f32[256,{1|5|20}], prec='f32')
get_rows({PLAIN|BLOCKS}[256,9]@weight, i32[5]<9-)
get_rows({f32|q8_0|q4_K}[256,9,3]@weight{@inner|@p0213}, i32[4,3]<9-{|@weight})
{add|sub|mul|div}(f32[64,5,2], f32[{64|64,5}]@weight{|@wide})
add_id(f32[10,3,4], f32[10,5]@weight{|@wide}, i32[3,4]<5-)
rms_norm(f32[64,5]@weight, eps=1e-06)
soft_max_ext(f32[29,3,4], f16[29,3]~mask{|@weight}, f32[4]@weight{|@step}, scale=0.5)
flash_attn_ext(f32[32,3,4], f16[32,14,2]{|@weight|@weight@p0213}, f16[48,14,2]{|@weight}, f16[14,3]~mask, f32[4]@weight, scale=0.3)
rope_ext(f32[80,2,5], i32[5]<6000, f32[40]~above@weight{|@inner}, n_dims=40)
cast({PLAIN|q8_0|q4_K}[256,6]@weight{|@inner}, dtype={'f32'|'f16'})
cont({f32|f16}[7,5,3]@weight@{inner|p1032})
cont({q8_0|q4_K}[256,5,3]@weight@{inner|p0213})
concat({f32|q8_0}[256,3,2]@weight, $1[256,{2|3},2]{|@weight@inner}, dim=1)
repeat(f32[5,1,3]@weight, ne=(10,4,3))
set_rows({f32|q8_0}[64,8], f32[64,3]@weight{|@wide}, i32[3]!8{|@weight})
cpy(f32[12,10]@weight{|@p1032}, f16[12,10])
mul_multi_add(f32[13,6,5], f32[1,6,5]@weight)
"""  # noqa: E501

#: Rows, matrices or heads at offsets that overflow 32 bits.
DISTANT = """
{add|mul}(f32[37,5]@far, f32[37,5]@far)
silu({f32|f16}[64,5,2]@far)
glu(f32[26,7]@far)
add_id(f32[10,3,4]@far, f32[10,5]@far, i32[3,4]<5-@far)
cont({f32|f16|i32|q8_0}[64,5,3]<99@far)
cast({f32|q4_0}[64,5]@far, dtype='f16')
concat(f32[64,3]@far, f32[64,2]@far, dim=1)
repeat(f32[5,3]@far, ne=(10,6))
get_rows({f32|q8_0}[64,9{|,3}]@far, i32[4$2]<9-)
set_rows({f32|f16|q8_0}[64,8]@far, f32[64,3]@far, i32[3]!8)
cpy(f32[12,10]@far, f16[12,10]@far)
sum_rows(f32[37,5]@far)
rms_norm(f32[37,5]@far, eps=1e-06)
soft_max_ext(f32[29,3,4]@far, f16[29,3,4]~mask@far, scale=0.5)
argsort(f32[33,5]@far)
rope_ext(f32[64,2,5]@far, i32[5]<6000, n_dims=64)
mul_mat({PLAIN|q8_0|q4_K}[256,7]@far, f32[256,{1]|5]|5]@far})
mul_mat({f32|q8_0}[256,7,3]@far, f32[256,2,3]@far)
mul_mat_id({f32|q8_0}[256,12,4]@far, f32[256,1,5]@far, i32[2,5]<4-)
moe_up_gate({f32|q8_0}[256,10,5]@far, $1[256,10,5]@far, f32[256,1,7]@far, i32[3,7]<5-)
fused_up_gate(q8_0[256,11]@far, q8_0[256,11]@far, f32[256,5]@far)
multi_add(f32[13,6,5]@far)
mul_multi_add(f32[13,6,5]@far, f32[1,6,5]@far)
flash_attn_ext(f32[64,3,4]@far, {f32|f16|q8_0}[64,17{|,2}]@far, $1[64,17$2]@far, f16[17,3]~mask@far, scale=0.3)
merge_lse(f32[33,3,5]@far, f32[33,3,5]@far)
"""  # noqa: E501

TABLE = (ELEMENTWISE, SHAPES, REDUCE, ROPE, LINEAR, MOE, ATTENTION, WEIGHTS, DISTANT)


def _expand(line: str, chosen: tuple[str, ...] = ()) -> Iterator[str]:
    """The line with each choice of words; `$n` repeats the word chosen in the n-th braces."""
    match = re.search(r"\{([^{}]*)\}", line)
    if match is None:
        yield re.sub(r"\$(\d)", lambda m: chosen[int(m[1]) - 1], line)
        return
    for word in match[1].split("|"):
        yield from _expand(line[: match.start()] + word + line[match.end() :], (*chosen, word))


def expand(text: str) -> tuple[Case, ...]:
    """The distinct cases of a table, in its order; then those of ops with a meaning once more, by
    their meanings.
    """
    words = {"PLAIN": PLAIN, "BLOCKS": BLOCKS, "LEGACY": LEGACY, "UNARY": UNARY}
    for name, choice in {**words, "LAYOUTS": LAYOUTS}.items():
        text = text.replace(name, choice)
    texts = dict.fromkeys(case for line in text.split("\n") if line for case in _expand(line))
    plain = tuple(map(Case.parse, texts))
    return plain + tuple(replace(case, means=True) for case in plain if has_meaning(case.op))


def has_meaning(op: str) -> bool:
    """Whether the op has a meaning in simpler ops (a few names are functions, not ops)."""
    return getattr(getattr(ops, op), "meaning", None) is not None


@cache
def cases() -> tuple[Case, ...]:
    """Every case of the small grid."""
    return expand("".join(TABLE))
