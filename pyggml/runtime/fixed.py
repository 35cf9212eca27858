"""Runs of a plan on the same arrays: what `plan.run` checks and looks up in each run is done once.

Before a decode step is launched, Python's part is most of what the host does, above all if other
work has emptied the caches: each object that it looks at is then a wait for memory. This is not
part of the API, because users would have a second way to run a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyggml.runtime.plan import Plan


class Fixed:
    """A plan with an array for each of its inputs, whose contents the caller changes between runs.

    The arrays have the types and shapes of the inputs. The caller also sees to what `plan.run`
    would check about their contents: positions and rows.
    """

    def __init__(self, plan: Plan, arrays: Mapping[str, NDArray[Any]]) -> None:
        for key, spec in plan.inputs.items():
            array = arrays[key]
            assert (array.dtype, array.shape) == (np.dtype(spec.dtype.numpy), spec.shape), key
            assert array.flags.c_contiguous, key
        self._plan, self._arrays, self._shared = plan, arrays, plan.store.shared
        self._keys, self._names = tuple(arrays), tuple(plan.graph.outputs)
        self._values = [*arrays.values()]

    def run(self) -> dict[str, Any]:
        """What `plan.run(arrays)` returns."""
        shared = self._shared
        with shared.lock:
            execution = self._plan.execution  # not kept here: it has the memory
            if execution is not None and not execution.bound and not shared.queued:
                whole = execution.whole(self._keys, self._names)
                if whole is not None:
                    run = partial(execution.run_whole, whole, self._values, 1, self._names)
                    return self._plan.store.alone(execution.backends, run)
        return self._plan.run(self._arrays)
