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
    pos, kv_end, stride = call["pos"], call.get("kv_end"), call.attrs["stride"]
    strided = [] if stride == 1 else [np.int32(stride)]
    call.launch(
        "attention_mask.cu",
        f"causal_mask<{'false' if kv_end is None else 'true'}{', int' * len(strided)}>",
        grid=call.out.ne[1],
        block=256,
        args=[call.out.tensor, pos.tensor, (kv_end or pos).tensor, reach, *strided],
    )
