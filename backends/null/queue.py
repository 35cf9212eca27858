"""A queue that runs late: what is put into it waits until somebody waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random

Task = Callable[[], None]


class Queue:
    """Tasks in order. By default none runs before it must: a missing wait then shows as a result
    of old values, as it would on a GPU.

    pace  a generator that decides how many tasks run at once when one is added: other orders in
          which a GPU might have run them. None: none
    """

    def __init__(self) -> None:
        self.pace: Random | None = None
        self._tasks: deque[Task] = deque()
        self._begun = 0  # tasks taken out so far
        self._added = 0

    def add(self, task: Task) -> None:
        """Put a task at the end."""
        self._tasks.append(task)
        self._added += 1
        if self.pace is not None:
            self.run_to(self._begun + self.pace.randint(0, len(self._tasks)))

    def run_to(self, number: int) -> None:
        """Run tasks until so many have been run. After an error those that wait are dropped."""
        while self._begun < min(number, self._added) and self._tasks:
            task = self._tasks.popleft()
            self._begun += 1
            try:
                task()
            except BaseException:
                self._tasks.clear()
                self._begun = self._added
                raise

    def run_all(self) -> None:
        """Run every task."""
        self.run_to(self._added)

    def mark(self) -> Mark:
        """The end of the queue as it is now."""
        return Mark(self, self._added)


class Mark:
    """A point in a queue."""

    def __init__(self, queue: Queue, number: int) -> None:
        self._queue = queue
        self._number = number

    def wait(self) -> None:
        """Run the queue until this point."""
        self._queue.run_to(self._number)
