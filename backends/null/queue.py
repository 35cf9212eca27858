"""A queue that runs late: what is put into it waits until somebody waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count
from random import Random

Task = Callable[[], None]


class Queue:
    """Tasks in order. By default none runs before it must: a missing wait then shows as a result
    of old values, as it would on a GPU.

    pace  a generator that decides how many tasks run at once when one is added: other orders in
          which a GPU might have run them. None: none

    Each task stands in the queue with its own number, so there is no count beside the queue that
    an interrupt could let fall behind it.
    """

    def __init__(self) -> None:
        self.pace: Random | None = None
        self._numbers = count()
        self._tasks: deque[tuple[int, Task]] = deque()

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: Task) -> None:
        """Put a task at the end."""
        self._tasks.append((next(self._numbers), task))
        if self.pace is not None:
            at_once = self.pace.randint(0, len(self._tasks))
            if at_once:
                self.run_to(self._tasks[at_once - 1][0])

    def run_to(self, number: int) -> None:
        """Run tasks up to that number. After an error those that wait are dropped."""
        try:
            while self._tasks and self._tasks[0][0] <= number:
                self._tasks.popleft()[1]()
        except BaseException:
            self._tasks.clear()
            raise

    def run_all(self) -> None:
        """Run every task."""
        self.mark().wait()

    def mark(self) -> Mark:
        """The end of the queue as it is now."""
        return Mark(self, self._tasks[-1][0] if self._tasks else -1)


class Mark:
    """A point in a queue."""

    def __init__(self, queue: Queue, number: int) -> None:
        self._queue = queue
        self._number = number

    def wait(self) -> None:
        """Run the queue until this point."""
        self._queue.run_to(self._number)
