"""When to stop RLOO: whether the reward still means anything, from what was measured along the run.

A policy that goes on against a reward model comes to where the reward rises and quality falls (Gao, Schulman & Hilton
2023, arXiv 2210.10760). A second reward model, of other data and another seed, the guard, shows when that begins.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from helpsteer_rloo.run_dir import read_steps, step_file
from helpsteer_rloo.statistics import Estimate, mean

IN_A_ROW = 2
"""Measurements that have to agree before an alarm is acted on."""
LENGTHS = (0.5, 2.0)
"""Change of the mean length, as a factor, outside of which it is said."""
LEAST_ENTROPY = 0.1
"""Share of the starting entropy under which it is said."""


@dataclass(frozen=True)
class Watched:
    """The policy at one optimizer step, on the same prompts with the same seeds at every step.

    Of each prompt's completion: `reward` as it is trained against, penalties taken off but not KL (None where no source
    gave one), `guard` by the reward model that it is not trained against, penalties taken off too, `kl` from the
    reference in nats (log-probability under the policy less that under the reference, summed over tokens), `surprise`
    (the negative log-probability under the policy, summed; its mean a token estimates the entropy), `length` in tokens,
    and whether it `ended` by itself.
    """

    step: int
    reward: tuple[float | None, ...]
    guard: tuple[float | None, ...] | None
    kl: tuple[float, ...]
    surprise: tuple[float, ...]
    length: tuple[int, ...]
    ended: tuple[bool, ...]

    @property
    def entropy(self) -> float:
        """Estimate of the entropy of a token, in nats."""
        return sum(self.surprise) / max(1, sum(self.length))

    @property
    def mean_length(self) -> float:
        """Tokens of a completion."""
        return sum(self.length) / len(self.length)

    def to_json(self) -> dict[str, float | None]:
        """The step's means, as a point of the curve of reward and guard against the root of KL (Gao et al. 2023)."""
        kl, count = sum(self.kl) / len(self.kl), len(self.kl)
        return {
            "step": self.step,
            "reward": average(self.reward),
            "guard": None if self.guard is None else average(self.guard),
            "kl": kl,
            "sqrt_kl": max(kl, 0.0) ** 0.5,
            "entropy": self.entropy,
            "length": self.mean_length,
            "ended": sum(self.ended) / count,
        }

    @property
    def merit(self) -> float:
        """What the best step is chosen by: the guard's mean score, without a guard the reward model's."""
        return average(self.reward if self.guard is None else self.guard)


COLUMNS = ("reward", "guard", "kl", "surprise", "length", "ended")
"""Of a row of a measurement, as it is written down: a completion's part of `Watched`."""
_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "length": ((int,), "a whole number"),
    "ended": ((bool,), "true or false"),
}
"""Of columns that are not numbers of any kind."""
_MAY_LACK = ("reward", "guard")
"""Columns that may hold null."""


def watched(step: int, rows: Sequence[Mapping[str, Any]]) -> Watched:
    """The measurement of a step from its rows.

    Raises:
        ValueError: a row lacks a column, or has something else in one.
    """
    for number, row in enumerate(rows, start=1):
        _check(row, f"line {number}")
    columns: dict[str, Any] = {name: tuple(row[name] for row in rows) for name in COLUMNS}
    if all(score is None for score in columns["guard"]):
        columns["guard"] = None
    return Watched(step, **columns)


def _check(row: object, place: str) -> None:
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: expected an object")
    content = cast(Mapping[str, object], row)
    for name in COLUMNS:
        value = content.get(name)
        if name in _MAY_LACK and name in content and value is None:
            continue
        kinds, expected = _KINDS.get(name, ((int, float), "a finite number"))
        if type(value) not in kinds or not abs(cast(float, value)) <= sys.float_info.max:  # whole ones may be larger
            raise ValueError(f"{place}: field {name!r}: expected {expected}")


def average(values: Sequence[float | None]) -> float:
    """The mean of the values that are there; NaN if none is."""
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else math.nan


@dataclass(frozen=True)
class Alarm:
    """What should be looked at, at a step; or what a run should not go on with: it `acts`."""

    name: str
    step: int
    sentence: str
    acts: bool


def read_watched(directory: Path) -> list[Watched]:
    """What was measured along a run, in the order of the steps.

    Raises:
        ValueError: a file is damaged, a row lacks a number, or a step has another number of rows than the first.
    """
    found: list[Watched] = []
    for step, rows in read_steps(directory).items():
        try:
            if found and rows and len(rows) != len(found[0].kl):
                raise ValueError(f"{len(rows)} lines, where step {found[0].step} has {len(found[0].kl)}")
            found += [watched(step, rows)] if rows else []
        except ValueError as error:
            raise ValueError(f"{step_file(directory, step)} is damaged ({error}).") from None
    return found


def best_of(history: Sequence[Watched], max_kl: float | None = None) -> Watched:
    """The step with the best merit, the earliest of equals; of those that are not over a limit of KL, if there are any.

    A step without any score is the worst.
    """
    within = [seen for seen in history if max_kl is None or not is_over(seen, max_kl)] or history
    return max(within, key=lambda seen: (-math.inf if math.isnan(seen.merit) else seen.merit, -seen.step))


def is_over(seen: Watched, max_kl: float) -> bool:
    """Whether the mean KL of a step is over a limit, its 95 % interval included."""
    return mean(seen.kl).low > max_kl


def alarms(history: Sequence[Watched], max_kl: float | None = None) -> list[Alarm]:
    """The alarms of the last step of a history.

    - overoptimization: the guard's score is lower than at its best step, and the reward is not; both paired by prompt,
      with 95 % intervals.
    - kl: the mean KL is over `max_kl`, its interval included.
    - length, entropy: the completions are much shorter or longer than at the start, or far less varied. These do not
      act: a policy may have good reasons.
    """
    start, now, best = history[0], history[-1], best_of(history)
    found: list[Alarm] = []
    if now.guard is not None and best.guard is not None and best.step < now.step:
        fall, rise = _change(best.guard, now.guard), _change(best.reward, now.reward)
        if fall.high < 0 and not rise.high < 0:
            sentence = (
                f"Since step {best.step} the guard's score changed by {_shown(fall)}, the reward by {_shown(rise)}: "
                "the policy is exploiting the reward."
            )
            found.append(Alarm("overoptimization", now.step, sentence, acts=True))
    kl = mean(now.kl)
    if max_kl is not None and is_over(now, max_kl):
        sentence = f"The KL from the reference is {kl.value:.2f} [{kl.low:.2f}, {kl.high:.2f}] nats, over {max_kl:g}."
        found.append(Alarm("kl", now.step, sentence, acts=True))
    ratio = now.mean_length / max(start.mean_length, 1e-9)
    if not LENGTHS[0] <= ratio <= LENGTHS[1]:
        sentence = f"Completions have {now.mean_length:.1f} tokens, at the start they had {start.mean_length:.1f}."
        found.append(Alarm("length", now.step, sentence, acts=False))
    if start.entropy > 0 and now.entropy < LEAST_ENTROPY * start.entropy:
        sentence = f"The entropy of a token is {now.entropy:.3f} nats, at the start it was {start.entropy:.3f}."
        found.append(Alarm("entropy", now.step, sentence, acts=False))
    return found


def verdict(history: Sequence[Watched], max_kl: float | None = None) -> Alarm | None:
    """The alarm that ends a run after the last step: one that acts, and does so for the `IN_A_ROW`-th time in a row."""
    if len(history) <= IN_A_ROW:
        return None
    lately = [alarms(history[: len(history) - back], max_kl) for back in range(IN_A_ROW)]
    names = set.intersection(*({alarm.name for alarm in found if alarm.acts} for found in lately))
    return next((alarm for alarm in lately[0] if alarm.name in names), None)


def _change(before: Sequence[float | None], after: Sequence[float | None]) -> Estimate:
    """The mean change of what was scored both times; without an interval where that is nothing."""
    changes = [b - a for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    return mean(changes or [math.nan])


def _shown(change: Estimate) -> str:
    return f"{change.value:+.3f} [{change.low:.3f}, {change.high:.3f}]"
