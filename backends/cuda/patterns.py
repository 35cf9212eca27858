"""The patterns that fuse several nodes into one step."""

from __future__ import annotations

from pyggml import ops
from pyggml.backends.cuda.attention.absorb import absorbed
from pyggml.backends.cuda.attention.combine_vec import multiplied_attention
from pyggml.backends.cuda.attention.expand import expanded_keys
from pyggml.backends.cuda.attention.flash import causal_attention
from pyggml.backends.cuda.attention.joint import joint_attention
from pyggml.backends.cuda.attention.latent_row import latent_row
from pyggml.backends.cuda.attention.scores import softmax_attention
from pyggml.backends.cuda.compressor import compressed_row
from pyggml.backends.cuda.elementwise import activated_times
from pyggml.backends.cuda.fusion import Pattern
from pyggml.backends.cuda.hyper_norm import norm_after_post, norm_of_streams
from pyggml.backends.cuda.indexer import scaled_weights
from pyggml.backends.cuda.linear.turned import turned_product
from pyggml.backends.cuda.moe import sum_and_more
from pyggml.backends.cuda.moe_prompt import (
    joint_sum_of_experts,
    normed_sum_of_experts,
    sum_of_experts,
)
from pyggml.backends.cuda.moe_routing import route
from pyggml.backends.cuda.moe_token import experts_of_token
from pyggml.backends.cuda.norm import norm_times_row, norm_with_row, sum_norm_times_row
from pyggml.backends.cuda.norm_rope import norm_rope, norm_rope_into_rows
from pyggml.backends.cuda.peer_sum import joint_sum_norm
from pyggml.backends.cuda.rope import rope_into_rows
from pyggml.backends.cuda.top_k import listed_rows

#: Each pattern with the ops that may come last in it. A graph is searched from its end, so a
#: pattern whose last node comes later wins regardless of this order. Among patterns with the same
#: last op the first match wins, so a pattern precedes those that cover only part of it:
#: `joint_sum_norm` and `normed_sum_of_experts` before `sum_norm_times_row` before
#: `norm_times_row`, `multiplied_attention`
#: before `turned_product`. A one-row norm times an activation matches both `activated_times` and
#: `norm_times_row`; the former wins and saves reading a row from memory. `latent_row` and
#: `rope_into_rows` never match the same node.
PATTERNS: tuple[Pattern, ...] = (
    (latent_row, (ops.set_rows,)),
    (compressed_row, (ops.set_rows,)),
    (norm_rope_into_rows, (ops.set_rows,)),
    (rope_into_rows, (ops.set_rows,)),
    (joint_attention, (ops.rope_ext,)),
    (norm_rope, (ops.rope_ext,)),
    (norm_after_post, (ops.mul,)),
    (norm_of_streams, (ops.mul,)),
    (activated_times, (ops.mul,)),
    (joint_sum_of_experts, (ops.mul,)),
    (joint_sum_norm, (ops.mul,)),
    (normed_sum_of_experts, (ops.mul,)),
    (sum_norm_times_row, (ops.mul,)),
    (norm_times_row, (ops.mul,)),
    (norm_with_row, (ops.add, ops.mul)),
    (experts_of_token, (ops.add, ops.mul_multi_add)),
    (sum_of_experts, (ops.add, ops.mul_multi_add)),
    (sum_and_more, (ops.add,)),
    (absorbed, (ops.concat,)),
    (expanded_keys, (ops.concat,)),
    (multiplied_attention, (ops.cont, ops.mul_mat)),
    (turned_product, (ops.cont,)),
    (route, (ops.scale, ops.div, ops.get_rows)),
    (causal_attention, (ops.flash_attn_ext,)),
    (softmax_attention, (ops.mul_mat,)),
    (listed_rows, (ops.top_k,)),
    (scaled_weights, (ops.lightning_indexer,)),
)
