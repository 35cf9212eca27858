"""A whole run on a GPU as one call: the caller's arrays in, the steps, outputs out, and the wait.

It makes the context current once. Of a decode step, what the host does before the graph is launched
and after the last copy has arrived is time in which the GPU waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from pyggml.backends.base import Arrival
from pyggml.backends.cuda.device.driver import Guarded, guarded
from pyggml.backends.cuda.device.pinned import Staging
from pyggml.backends.cuda.device.prepared import Downloads, Uploads
from pyggml.backends.cuda.direct import direct, direct_of_several
from pyggml.backends.cuda.runner import CudaRunner
from pyggml.backends.cuda.together import Together


class Whole:
    """Uploads, a runner and downloads of one GPU (`RunsWhole`)."""

    def __init__(
        self,
        staging: Staging,
        uploads: Sequence[Uploads],
        runner: CudaRunner,
        downloads: Sequence[Downloads],
        running: Guarded,
    ) -> None:
        self._staging, self._runner, self._running = staging, runner, running
        self._uploads, self._downloads = tuple(uploads), tuple(downloads)
        self._direct = direct(staging, uploads, runner, downloads)

    def __call__(self, arrays: Sequence[NDArray[Any]], repeat: int) -> list[NDArray[Any]]:
        direct = self._direct
        with self._staging.context:
            result = None if direct is None or repeat > 1 else direct.queue(arrays)
            arrivals = self._queue(arrays, repeat) if result is None else ()
            with self._running:
                self._staging.settle()
        return [arrival() for arrival in arrivals] if result is None else [result]

    def _queue(self, arrays: Sequence[NDArray[Any]], repeat: int) -> list[Arrival]:
        for upload in self._uploads:
            upload.queue(arrays)
        for _ in range(repeat):
            self._runner.queue()
        return [download.queue(marked=False) for download in self._downloads]


class WholeTogether:
    """Uploads, a runner and downloads of several GPUs whose splits run together (`RunsWhole`)."""

    def __init__(
        self,
        stagings: Sequence[Staging],
        uploads: Sequence[Uploads],
        runner: Together,
        downloads: Sequence[Downloads],
    ) -> None:
        self._stagings, self._runner = tuple(stagings), runner
        self._uploads, self._downloads = tuple(uploads), tuple(downloads)
        staging = downloads[0].staging if downloads else stagings[0]
        self._direct = direct_of_several(staging, uploads, runner, downloads)

    def __call__(self, arrays: Sequence[NDArray[Any]], repeat: int) -> list[NDArray[Any]]:
        direct = self._direct
        result = None if direct is None or repeat > 1 else direct.queue(arrays)
        arrivals: Sequence[Arrival] = ()
        if result is None:
            for upload in self._uploads:
                upload(arrays)
            for _ in range(repeat):
                self._runner.run()
            arrivals = [download() for download in self._downloads]
        for staging in self._stagings:
            with staging.context, guarded("running on several GPUs"):
                staging.settle()
        return [arrival() for arrival in arrivals] if result is None else [result]
