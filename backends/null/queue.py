"""A queue that runs late: a task runs when somebody waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from random import Random

from pyggml.errors import DeviceError

Action = Callable[[], None]


@dataclass(slots=True, eq=False)
class Task:
    """A task and its number in the queue.

    error  why it never ran or did not finish
    """

    number: int
    action: Action
    error: Exception | None = None


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
        self._tasks: deque[Task] = deque()

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, action: Action) -> None:
        """Add a task at the end."""
        self._tasks.append(Task(next(self._numbers), action))
        if self.pace is not None:
            n_tasks = self.pace.randint(0, len(self._tasks))
            if n_tasks:
                self.run_to(self._tasks[n_tasks - 1].number)

    def run_to(self, number: int) -> None:
        """Run all tasks up to this number.

        An error drops the tasks after it, and whoever waits for one of them gets that error.
        """
        try:
            while self._tasks and self._tasks[0].number <= number:
                task = self._tasks[0]
                task.action()
                self._tasks.popleft()
        except BaseException as error:
            failure = (
                error
                if isinstance(error, Exception)
                else DeviceError(f"work in the queue was interrupted: {type(error).__name__}")
            )
            for each in self._tasks:
                each.error = failure
            self._tasks.clear()
            raise

    def run_all(self) -> None:
        """Run every task."""
        self.mark().wait()

    def mark(self) -> Mark:
        """The current end of the queue."""
        return Mark(self, self._tasks[-1] if self._tasks else None)


class Mark:
    """A point in a queue: the end of a task, or a point that the queue has reached."""

    def __init__(self, queue: Queue, task: Task | None) -> None:
        self._queue, self._task = queue, task

    def wait(self) -> None:
        """Run the queue until this point; raises the error of a task before it."""
        if self._task is not None:
            self._queue.run_to(self._task.number)
            if self._task.error is not None:
                raise self._task.error
