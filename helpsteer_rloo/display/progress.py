"""What is known of a run from its events, and how it looks: as a block of a terminal, a line of a log, or JSON."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from helpsteer_rloo.events import Event, Measured, Progressed, RunFinished, RunPlanned, StageBegan, StageEnded
from helpsteer_rloo.processes import peak_memory

_WINDOW = 64
_APART = 1.0
"""Samples that a rate is taken from, and least seconds between two: a minute of quick steps, more of slow ones."""
_NARROWEST_BAR = 8
_OF_POLICY = {
    "reward": "reward",
    "kl_per_completion": "KL",
    "entropy": "entropy",
    "completions/mean_length": "length",
}
_OF_PAIRS = {"loss": "loss", "accuracy": "accuracy", "mean_token_accuracy": "accuracy"}
"""Metrics that are shown, and their names there: of RLOO, and of every other training."""


class Pace:
    """How fast a number grows, from when it was told; of what came long before it knows nothing."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, float]] = deque(maxlen=_WINDOW)
        self._last: tuple[float, float] | None = None

    def add(self, now: float, value: float) -> None:
        """The number is this now."""
        if not self._samples or now - self._samples[-1][0] >= _APART:
            self._samples.append((now, value))
        self._last = now, value

    @property
    def rate(self) -> float | None:
        """Growth a second, once that is known."""
        if self._last is None:
            return None
        (begin, first), (end, last) = self._samples[0], self._last
        return (last - first) / (end - begin) if end > begin and last > first else None

    def seconds_until(self, value: float, now: float) -> float | None:
        """Seconds until it will be so large, if it goes on as it did."""
        if self.rate is None or self._last is None:
            return None
        return max(0.0, (value - self._last[1]) / self.rate - (now - self._last[0]))


@dataclass
class RunState:
    """Everything that a run has told, at times `now` in seconds of one clock.

    `tasks` are those of the present stage that go on, the outermost first, with their paces.
    """

    began: float
    stages: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    earlier: Mapping[str, float] = field(default_factory=dict)
    stage: str | None = None
    stage_began: float = 0.0
    tasks: dict[str, tuple[Progressed, Pace]] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    guard: float | None = None
    tokens: Pace = field(default_factory=Pace)
    memory: int = 0

    def take(self, event: Event, now: float) -> bool:
        """Learn from an event; whether it is new, which a stage that is told again to be finished is not."""
        self.memory = peak_memory()  # here, and not where it is drawn: that thread may meet a half imported torch
        match event:
            case RunPlanned():
                self.stages, self.earlier = event.stages, event.earlier_seconds
            case StageBegan():
                self._enter(event.stage, now)
            case StageEnded():
                new = event.stage not in self.seconds
                self.seconds[event.stage] = event.seconds
                if self.stage == event.stage:
                    self._enter(None, now)
                return new
            case Progressed():
                self._progress(event, now)
            case Measured():
                self._measure(event, now)
            case RunFinished():
                self._enter(None, now)
        return True

    def _enter(self, stage: str | None, now: float) -> None:
        self.stage, self.stage_began = stage, now
        self.tasks, self.metrics, self.guard, self.tokens = {}, {}, None, Pace()

    def _progress(self, event: Progressed, now: float) -> None:
        if event.ended:
            self.tasks.pop(event.task, None)
            return
        pace = self.tasks[event.task][1] if event.task in self.tasks else Pace()
        pace.add(now, event.step)
        self.tasks[event.task] = event, pace

    def _measure(self, event: Measured, now: float) -> None:
        if event.source == "watch":
            self.guard = event.metrics.get("guard")
            return
        self.metrics |= finite(event.metrics)
        if "num_tokens" in self.metrics:
            self.tokens.add(now, self.metrics["num_tokens"])

    @property
    def number(self) -> int | None:
        """Of the present stage among all, from 1."""
        return self.stages.index(self.stage) + 1 if self.stage in self.stages else None

    def seconds_left(self, now: float) -> float | None:
        """Until the present stage ends: by its outermost task, or by what it took earlier, or a stage like it."""
        if self.tasks:
            event, pace = next(iter(self.tasks.values()))
            return pace.seconds_until(event.steps, now)
        expected = self._expected(self.stage) if self.stage else None
        return None if expected is None else max(0.0, expected - (now - self.stage_began))

    def run_seconds_left(self, now: float) -> tuple[float, bool] | None:
        """Until the run ends, and whether that is all: of stages that nothing is known of it is not."""
        left = self.seconds_left(now)
        if left is None or self.number is None:
            return None
        later = [self._expected(name) for name in self.stages[self.number :] if name not in self.seconds]
        return left + sum(seconds for seconds in later if seconds is not None), None not in later

    def _expected(self, stage: str) -> float | None:
        if stage in self.earlier:
            return self.earlier[stage]
        alike = [seconds for name, seconds in self.seconds.items() if kind_of(name) == kind_of(stage)]
        return alike[-1] if alike else None


def kind_of(stage: str) -> str:
    """What stages of about the same duration have in common.

    >>> kind_of("guard") == kind_of("reward_model_2") == "reward_model"
    True
    """
    if stage.endswith("verification"):
        return "verification"
    return "reward_model" if stage == "guard" or stage.startswith("reward_model") else stage


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Those of the metrics that are numbers."""
    return {name: value for name, value in metrics.items() if isinstance(value, (int, float)) and math.isfinite(value)}


# ---- for people -----------------------------------------------------------------------------------------------------


def clock(seconds: float) -> str:
    """A duration as people read it.

    >>> clock(59.6), clock(3661)
    ('1:00', '1:01:01')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short(value: float) -> str:
    """A number in about three digits.

    >>> short(0.01234), short(12345.6), short(3.1e9)
    ('0.0123', '12.3k', '3.1G')
    """
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def stage_title(state: RunState) -> str:
    """Which stage of how many; what has no stages calls what it does by a name of its own."""
    if state.stage is None:
        return "Between two stages"
    if not state.stages:
        return state.stage
    return f"Stage {state.number}/{len(state.stages)} {state.stage}" if state.number else f"Stage {state.stage}"


def facts(state: RunState, now: float) -> list[str]:
    """Rate, time left and memory, as far as they are known."""
    found: list[str] = []
    found += [_rate(pace.rate, event.unit) for event, pace in state.tasks.values() if pace.rate is not None][:1]
    if state.tokens.rate is not None:
        found.append(f"{short(state.tokens.rate)} tokens/s")
    if (left := state.seconds_left(now)) is not None:
        found.append(f"{clock(left)} left")
    if (run := state.run_seconds_left(now)) is not None and len(state.stages) > 1:
        found.append(f"run {'' if run[1] else '> '}{clock(run[0])} left")
    return [*found, f"{state.memory / 2**30:.2f} GiB"]


def _rate(rate: float, unit: str) -> str:
    if unit == "bytes":
        return f"{rate / 1e6:.3g} MB/s"
    return f"{rate:.3g} {unit}/s" if rate > 0.1 else f"{1 / rate:.3g} s each"


def shown_metrics(state: RunState) -> list[str]:
    """The metrics that say how training goes."""
    names = _OF_POLICY if "reward" in state.metrics else _OF_PAIRS
    found = [f"{name} {short(state.metrics[key])}" for key, name in names.items() if key in state.metrics]
    return found if state.guard is None else [*found, f"guard {short(state.guard)}"]


def wrapped(parts: Sequence[str], width: int) -> list[str]:
    """Parts side by side, in as many lines as they need; none is broken.

    >>> wrapped(["loss 0.1", "accuracy 0.9", "1.2 GiB"], 24)
    ['loss 0.1 · accuracy 0.9', '1.2 GiB']
    """
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += " · " + part
        else:
            lines.append(part)
    return lines


def line(state: RunState, now: float) -> str:
    """The present stage in a line of a log; without one, the outermost tasks."""
    told = [event for event, _ in state.tasks.values()]
    title = [stage_title(state)] if state.stage or not told else []
    done = [f"{event.task} {_count(event)}" for event in told[: 1 if state.stage else 2]]
    return ", ".join([*title, *done, *shown_metrics(state), *facts(state, now)])


def _count(event: Progressed) -> str:
    share = f", {event.step / event.steps:.0%}" if event.steps else ""
    if event.unit == "bytes":
        size, unit = next(found for found in _BYTES if event.steps >= found[0] or found[0] == 1)
        digits = 1 if size > 1 else 0
        return f"{event.step / size:.{digits}f} of {event.steps / size:.{digits}f} {unit}{share}"
    return f"{event.step}/{event.steps} {event.unit}{share}"


_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
"""Units that a number of bytes is told in, as sizes of downloads are."""


def block(state: RunState, now: float, width: int) -> RenderableType:
    """The present stage in some lines of a terminal so wide; nothing between two stages."""
    if state.stage is None and not state.tasks:
        return Group()
    told = [event for event, _ in state.tasks.values()]
    rows: list[RenderableType] = [_first_row(state, told[0] if told else None, now, width)]
    for event in told[1:]:
        rows.append(_text(f"  {event.task} {_count(event)}", "dim"))
    rows += [_text("  " + part, "") for part in wrapped(shown_metrics(state), width - 2)]
    rows += [_text("  " + part, "dim") for part in wrapped(facts(state, now), width - 2)]
    return Group(*rows)


def _first_row(state: RunState, event: Progressed | None, now: float, width: int) -> RenderableType:
    title = stage_title(state) if state.stage else (event.task if event else "")
    count = clock(now - state.stage_began) if event is None else _count(event)
    room = width - len(title) - len(count) - 2
    if event is None or room < _NARROWEST_BAR:
        return _text(f"{title} {count}", "bold")
    row = Table.grid(padding=(0, 1, 0, 0))
    row.add_row(Text(title, "bold"), ProgressBar(total=event.steps, completed=event.step, width=room), Text(count))
    return row


def _text(text: str, style: str) -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


# ---- for programs ---------------------------------------------------------------------------------------------------


def record(event: Event, state: RunState, now: float) -> dict[str, Any]:
    """An event as an object of JSON; `state` has taken it."""
    head = {"seconds": round(now - state.began, 3)}
    match event:
        case RunPlanned():
            return {"event": "run", **head, "stages": list(event.stages)}
        case StageBegan():
            return {"event": "stage_begin", **head, **_placed(state, event.stage), "goes_on": event.goes_on}
        case StageEnded():
            ended = {"stage_seconds": event.seconds, "before": event.before}
            return {"event": "stage_end", **head, **_placed(state, event.stage), **ended}
        case Progressed():
            return {"event": "progress", **head, **_placed(state, state.stage), **_progress_record(event, state, now)}
        case Measured():
            measured = {"source": event.source, "step": event.step, "steps": event.steps}
            metrics = {**dict.fromkeys(event.metrics), **finite(event.metrics)}
            return {"event": "metrics", **head, **_placed(state, state.stage), **measured, "metrics": metrics}
        case RunFinished():
            return {"event": "summary", **head, "status": "finished", "results": dict(event.results)}


def _placed(state: RunState, stage: str | None) -> dict[str, Any]:
    number = state.stages.index(stage) + 1 if stage in state.stages else None
    return {"stage": stage, "number": number, "stages": len(state.stages)}


def _progress_record(event: Progressed, state: RunState, now: float) -> dict[str, Any]:
    pace = state.tasks[event.task][1] if event.task in state.tasks else None
    left, run = state.seconds_left(now), state.run_seconds_left(now)
    return {
        "task": event.task,
        "step": event.step,
        "steps": event.steps,
        "unit": event.unit,
        "ended": event.ended,
        "rate": _rounded(pace.rate if pace else None),
        "tokens_per_second": _rounded(state.tokens.rate),
        "seconds_left": _rounded(left),
        "run_seconds_left": _rounded(run[0]) if run and run[1] else None,
        "memory_bytes": state.memory,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
