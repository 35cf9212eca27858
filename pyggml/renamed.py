"""Names that changed before 0.2: using one is an error that gives the new name. Goes with 0.3."""

from __future__ import annotations

#: What stood in `pyggml` -> what to write now.
NAMES = {
    "Cost": "gg.define.Cost",
    "Cut": "gg.define.Cut",
    "Op": "gg.define.Op",
    "Slice": "gg.define.Slice",
    "Spec": "gg.define.Spec",
    "UnknownName": "gg.UnknownNameError",
    "UnsupportedOp": "gg.UnsupportedOpError",
    "lse_finish": "pyggml.ops.lse_finish",
    "lse_sum": "pyggml.ops.lse_sum",
    "make_spec": "gg.define.Spec.of",
    "name": "gg.label",
    "whole": "gg.state_of",
}

#: Keywords of ops and builders that changed.
KEYWORDS = {"type": "dtype", "kind": "act"}
