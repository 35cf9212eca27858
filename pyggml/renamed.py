"""Names that changed before 0.2. Using one raises an error that gives the new name.

Version 0.3 removes this file.
"""

from __future__ import annotations

#: Old name in `pyggml` -> what to write now.
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

#: Old keyword of an op or builder -> new keyword.
KEYWORDS = {"type": "dtype", "kind": "act"}
