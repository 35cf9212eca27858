"""A run in the devices' queues, whose outputs are fetched later.

`submit` is a method and not an option of `run`, because all keywords of `run` are inputs. The
outputs' copies are queued with the run. Copying them in `result()` lost: the store's next run would
have overwritten them, so each result would have had to be fetched before that, or refused. An
object for calls with fixed inputs, made once and then called, is not part of the API: most of what
it would prepare, the plan keeps anyway (`Slots`, `Outputs`, `Execution.whole`), and users would
have had a second way to run a plan. Sessions have one for a decode step (`Fixed`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from pyggml.backends.base import Event
from pyggml.runtime.execution import Execution
from pyggml.runtime.inputs import Ready
from pyggml.runtime.outputs import Output
from pyggml.runtime.store import Store


class Submitted:
    """A run that `plan.submit` has queued.

    Its outputs are copied behind its last step, so later runs do not change them.
    """

    def __init__(
        self, store: Store, execution: Execution, outputs: Mapping[str, Output], inputs: Ready
    ) -> None:
        self._store, self._backends = store, execution.backends
        with_output = execution.outputs.homes(outputs)
        self._ends: list[Event] = [
            backend.record() for backend in execution.backends if backend not in with_output
        ]
        self._outputs, self._inputs = outputs, inputs  # keeps arrays of devices alive
        self._result: dict[str, Any] | None = None

    def __repr__(self) -> str:
        state = "queued" if self._result is None else "finished"
        return f"<{state} run of {', '.join(self._outputs) or 'no outputs'}>"

    def result(self) -> dict[str, Any]:
        """Wait for the run, not for later ones, and return copies of its outputs by name.

        Errors: those of the run's steps, or of an earlier run in the same queues. Later calls
        return the same arrays, or raise the error again.
        """
        if self._result is None:
            self._result = self._store.alone(self._backends, self._wait)
            self._inputs = {}
        return self._result

    def _wait(self) -> dict[str, Any]:
        try:
            for end in self._ends:
                end.wait()
            return {key: output() for key, output in self._outputs.items()}
        except Exception:
            for backend in self._backends:  # what waits for the failed work is lost, too
                with suppress(Exception):
                    backend.abandon()
            raise
