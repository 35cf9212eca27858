"""A queue that runs late: a task runs when somebody waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import count
from random import Random

Task = Callable[[], None]


class Queue:
    """Tasks in order. By default a task runs only when somebody waits for it, so a missing wait
    shows as a result of old values, as on a GPU.

    pace  a random generator that draws how many tasks run when one is added, to imitate a GPU that
          is ahead; None: none run

    Each task carries its number in the queue: an interrupt could leave a separate counter wrong.
    """

    def __init__(self) -> None:
        self.pace: Random | None = None
        self._numbers = count()
        self._tasks: deque[tuple[int, Task]] = deque()

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: Task) -> None:
        """Add a task at the end."""
        self._tasks.append((next(self._numbers), task))
        if self.pace is not None:
            n_tasks = self.pace.randint(0, len(self._tasks))
            if n_tasks:
                self.run_to(self._tasks[n_tasks - 1][0])

    def run_to(self, number: int) -> None:
        """Run all tasks up to this number. An error drops the tasks after it."""
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
        """The current end of the queue."""
        return Mark(self, self._tasks[-1][0] if self._tasks else -1)


class Mark:
    """A point in a queue."""

    def __init__(self, queue: Queue, number: int) -> None:
        self._queue = queue
        self._number = number

    def wait(self) -> None:
        """Run the queue until this point."""
        self._queue.run_to(self._number)
