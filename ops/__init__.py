"""What can be computed: shape rule, formula, cost, slice rule and meaning of every operation.

No array code and no device. `ALL` lists the op objects by name; the functions stand here too.
"""

from typing import Any as _Any

from pyggml.node import Op as _Op
from pyggml.ops.attention import causal_mask, flash_attn_ext, merge_lse
from pyggml.ops.attention import lse_finish as lse_finish
from pyggml.ops.attention import lse_sum as lse_sum
from pyggml.ops.copy import cast, concat, cont, cpy, get_rows, repeat, set_rows
from pyggml.ops.elementwise import (
    add,
    add_id,
    clamp,
    div,
    exp,
    fill,
    gelu,
    glu,
    log,
    mul,
    relu,
    scale,
    sigmoid,
    silu,
    sqr,
    sqrt,
    sub,
    tanh,
)
from pyggml.ops.leaf import constant, input, state
from pyggml.ops.linear import mul_mat, mul_mat_id
from pyggml.ops.moe import fused_up_gate, grouped_topk, moe_up_gate, mul_multi_add, multi_add
from pyggml.ops.norm import rms_norm
from pyggml.ops.reduce import argmax, argsort, soft_max, soft_max_ext, sum_rows, top_k
from pyggml.ops.rope import rope_ext
from pyggml.ops.views import permute, reshape, state_of, transpose, view

__all__ = [
    "add", "add_id", "argmax", "argsort", "cast", "causal_mask", "clamp", "concat", "constant",
    "cont", "cpy", "div", "exp", "fill", "flash_attn_ext", "fused_up_gate", "gelu", "get_rows",
    "glu", "grouped_topk", "input", "log", "merge_lse", "moe_up_gate",
    "mul", "mul_mat", "mul_mat_id", "mul_multi_add", "multi_add", "permute", "relu", "repeat",
    "reshape", "rms_norm", "rope_ext", "scale", "set_rows", "sigmoid", "silu", "soft_max",
    "soft_max_ext", "sqr", "sqrt", "state", "state_of", "sub", "sum_rows", "tanh", "top_k",
    "transpose", "view",
]  # fmt: skip

ALL: dict[str, _Op[_Any]] = {
    found.name: found for found in list(globals().values()) if isinstance(found, _Op)
}

assert __name__ == "pyggml.ops", "import pyggml.ops, not the top-level folder ops"
