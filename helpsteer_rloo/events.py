"""What a run tells while it goes on: whoever works publishes, and whoever shows it subscribes.

A stage is made of tasks (training, sampling, scoring), which have steps. Only the main process is listened to.
"""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

EVERY = 0.25
"""Least seconds between two events about the steps of one task, so that they cost nothing."""
PATIENCE = 1.0
"""Seconds after which a task within another one is worth telling of."""

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class RunPlanned:
    """The stages of a run in order, and the seconds that some of them took in an earlier execution."""

    stages: tuple[str, ...]
    earlier_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StageBegan:
    """A stage is run; `goes_on` if from a checkpoint."""

    stage: str
    goes_on: bool = False


@dataclass(frozen=True, slots=True)
class StageEnded:
    """A stage is finished, and took so many seconds; `before` if it was so before this run began."""

    stage: str
    seconds: float
    before: bool = False


@dataclass(frozen=True, slots=True)
class Progressed:
    """So many of its steps a task has done: none when it begins, and `ended` when it is over."""

    task: str
    step: int
    steps: int
    unit: str = "steps"
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """Metrics at a step: of `training` exactly what the trainer logs, or of the `watch` over the policy its means."""

    source: str
    step: int
    steps: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class RunFinished:
    """A run came to its end, with these results."""

    results: Mapping[str, Any]


Event = RunPlanned | StageBegan | StageEnded | Progressed | Measured | RunFinished
Listener = Callable[[Event], None]
_listeners: list[Listener] = []


def publish(event: Event) -> None:
    """Tell all that listen."""
    for listener in tuple(_listeners):
        listener(event)


@contextmanager
def subscribed(listener: Listener) -> Generator[None]:
    """Within, a listener is called with every event, by whoever publishes it."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


class Task:
    """Tells of the steps of a task: at once or after some patience, then now and then, and of its end if it told."""

    def __init__(self, name: str, steps: int, step: int = 0, unit: str = "steps", patience: float = 0.0) -> None:
        self._name, self._steps, self._unit = name, steps, unit
        self._next, self._told = time.monotonic() + patience, False
        self._step = step
        self.reach(step)

    def reach(self, step: int) -> None:
        """So many steps are done."""
        self._step, now = step, time.monotonic()
        if now >= self._next:
            self._next, self._told = now + EVERY, True
            publish(Progressed(self._name, step, self._steps, self._unit))

    def end(self) -> None:
        """It is over, with the steps that it reached."""
        if self._told:
            publish(Progressed(self._name, self._step, self._steps, self._unit, ended=True))
            self._told = False


def counted(items: Sequence[Item], name: str, unit: str = "batches") -> Iterator[Item]:
    """The items one by one, as a task that tells of itself if it takes long.

    >>> list(counted("ab", "Spelling"))
    ['a', 'b']
    """
    task = Task(name, len(items), unit=unit, patience=PATIENCE)
    try:
        for number, item in enumerate(items):
            task.reach(number)
            yield item
        task.reach(len(items))
    finally:
        task.end()
