"""What a run holds, as the report shows it."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

from helpsteer_rloo.alarms import Alarm, Watched
from helpsteer_rloo.statistics import Estimate

State = Literal["running", "finished", "unfinished"]
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Setting:
    """A setting that is not at its default; `stage` is what it was given for.

    >>> Setting("rloo", "kl_coef", "0.1", "0.05").value
    '0.1'
    """

    stage: str
    name: str
    value: str
    default: str


@dataclass(frozen=True, slots=True)
class StageState:
    """A stage that has begun, and the seconds that it took if it has ended."""

    name: str
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts in bins of equal width.

    >>> Histogram(0, 5, (2, 1)).points
    ((0, 2), (5, 1), (10, 0))
    """

    start: float
    width: float
    counts: tuple[int, ...]

    @property
    def points(self) -> tuple[Point, ...]:
        """The left end of each bin with its count, and the right end of the last one with 0: a line of steps."""
        heights = (*self.counts, 0)
        return tuple((self.start + place * self.width, count) for place, count in enumerate(heights))

    @property
    def total(self) -> int:
        """All that was counted."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Split:
    """One split of the data: counts, and lengths in tokens of prompts, chosen and rejected responses."""

    pairs: int
    prompts: int
    domains: Mapping[str, int]
    strengths: Mapping[str, int]
    lengths: Mapping[str, Histogram]


@dataclass(frozen=True, slots=True)
class Data:
    """What was read, what was left out and why (in that order), what is left."""

    source: str
    fingerprint: str
    rows: int
    pairs: int
    max_length: int
    left_out: tuple[tuple[str, int], ...]
    cut: tuple[tuple[str, int], ...]
    splits: Mapping[str, Split]


@dataclass(frozen=True, slots=True)
class Log:
    """What a training logged, in the order of the steps.

    >>> Log(({"step": 5, "loss": 0.7}, {"step": 10, "loss": 0.5})).series("loss")
    ((5.0, 0.7), (10.0, 0.5))
    """

    rows: tuple[Mapping[str, Any], ...] = ()

    def series(self, name: str) -> tuple[Point, ...]:
        """The steps at which a metric was logged, with its finite values; `machine/…` are those of the machine."""
        found: list[Point] = []
        for row in self.rows:
            inner = row.get("machine") if name.startswith("machine/") else row
            value = inner.get(name.removeprefix("machine/")) if isinstance(inner, Mapping) else None
            if _is_finite(value) and _is_finite(row["step"]):
                found.append((float(row["step"]), float(value)))
        return tuple(found)

    @property
    def last_step(self) -> int:
        """The step that was logged last; 0 if none was."""
        return int(self.rows[-1]["step"]) if self.rows else 0


def _is_finite(value: Any) -> TypeGuard[float]:
    """Whether it is a number that a float can hold, which whole ones of a damaged file need not be."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs that a reward model is about equally sure of: how sure, the share it is right in, and their number."""

    confidence: float
    right: float
    count: int


@dataclass(frozen=True, slots=True)
class Bias:
    """How often the reward model prefers the response that has more of something, and how often the labels do."""

    model: Estimate
    labels: Estimate
    difference: Estimate


@dataclass(frozen=True, slots=True)
class Finding:
    """What a number of a judgement means."""

    sentence: str
    concern: bool
    name: str = ""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Side:
    """One of two responses that stand side by side, with its scores by name; `note` says what else is to be said."""

    text: str
    scores: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt with two responses; `number` is its line in the file, from 1."""

    number: int
    prompt: tuple[Turn, ...]
    first: Side
    second: Side
    domain: str = ""
    label: str = ""


@dataclass(frozen=True, slots=True)
class Judged:
    """A reward model's judgement on held-out pairs; accuracies by domain, strength, turns and length in `parts`."""

    accuracy: Estimate
    better_than_chance: bool
    parts: Mapping[str, Mapping[str, Estimate]]
    reliability: tuple[Bin, ...]
    calibration_error: Estimate | None
    biases: Mapping[str, Bias]
    probes: Mapping[str, Estimate]
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model of the run: how its training went, and how it was judged, as far as either has come."""

    name: str
    log: Log = Log()
    steps: int | None = None
    bad_steps: int = 0
    judged: Judged | None = None
    pairs: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True)
class Change:
    """A mean before and after training, and the mean change, paired by prompt."""

    before: float
    after: float
    change: Estimate


@dataclass(frozen=True, slots=True)
class BestOfN:
    """Best-of-n of the untrained policy: along n a row of `n`, `kl` and means, and the policy's means less its own.

    `n` and `reaches` say where the policy's KL lies on that curve, or that it lies beyond.
    """

    curve: tuple[Mapping[str, float], ...]
    n: float
    reaches: bool
    policy_minus: Mapping[str, Estimate]


@dataclass(frozen=True, slots=True)
class PolicyJudged:
    """The trained policy against the untrained one, on held-out prompts."""

    prompts: int
    changes: Mapping[str, Change]
    win_rates: Mapping[str, Estimate]
    kl: Estimate
    texts: Mapping[str, tuple[float, float]]
    best_of_n: BestOfN | None


@dataclass(frozen=True, slots=True)
class Policy:
    """The policy: how its training went, what was seen along it, and how it was judged.

    `verdict` is the sentence of the alarm that acts, and `action` what followed it: stop, rollback, or warn.
    """

    log: Log = Log()
    watched: tuple[Watched, ...] = ()
    alarms: tuple[Alarm, ...] = ()
    verdict: str = ""
    action: str = ""
    rolled_back_to: int | None = None
    steps: int | None = None
    bad_steps: int = 0
    episodes: float | None = None
    judged: PolicyJudged | None = None
    answers: tuple[Sample, ...] = ()


@dataclass(frozen=True, slots=True)
class Run:
    """Everything that a run's directory tells.

    `notes` are about files that could not be read yet, or not whole; `problems` about those that are damaged, with what
    is wrong and where. `next_stage` is the first one that is planned and has not begun; empty if there is none, or no
    plan.
    """

    name: str
    state: State
    as_of: str
    stages: tuple[StageState, ...] = ()
    next_stage: str = ""
    command: str = ""
    seed: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    settings: tuple[Setting, ...] = ()
    data: Data | None = None
    reward_models: tuple[RewardModel, ...] = ()
    policy: Policy | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
