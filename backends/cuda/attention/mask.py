"""causal_mask as a tensor, for readers other than fused attentions."""

from __future__ import annotations

import numpy as np

from pyggml import ops
from pyggml.backends.cuda.launch import Call
from pyggml.backends.cuda.table import kernel


@kernel(ops.causal_mask)
def causal_mask(call: Call) -> None:
    window = call.attrs["window"]
    reach = np.uint32(2**31 if window is None else min(window, 2**31))
    call.launch(
        "attention_mask.cu",
        "causal_mask",
        grid=call.out.ne[1],
        block=256,
        args=[call.out.tensor, call["pos"].tensor, reach],
    )
