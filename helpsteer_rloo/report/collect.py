"""A run's directory, read as far as the run has come."""

import functools
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from helpsteer_rloo.alarms import Alarm, Watched, alarms, read_watched
from helpsteer_rloo.checkpoints import TRAINER_STATE, logged, step_of
from helpsteer_rloo.report.fields import Node
from helpsteer_rloo.report.readings import answer_of, data_of, judged_of, pair_of, policy_judged_of
from helpsteer_rloo.report.records import (
    Data,
    Judged,
    Log,
    Policy,
    PolicyJudged,
    RewardModel,
    Run,
    Sample,
    StageState,
    State,
)
from helpsteer_rloo.report.started import differences, seed_of, setting, versions_of
from helpsteer_rloo.run_dir import (
    METRICS,
    POLICY_RECORD,
    REWARD_MODEL_RECORD,
    STAGE_MARKER,
    WATCH,
    RunDir,
    is_locked,
    read_json,
    read_lines,
    verification_name,
)

T = TypeVar("T")
MOST_SAMPLES = 5000
"""Of a file, that a page takes; the files have all."""
_STARTED = ".started.json"
_STAGE = re.compile(r"[a-z_0-9]{1,40}")
_REWARD_STAGE = re.compile(r"reward_model(_\d+)?|guard")
_ORDER = (
    "world", "base", "data", "reward_model", "verification", r"reward_model_\d+(_verification)?",
    "guard", "guard_verification", "rloo", "evaluation",
)  # fmt: skip
_USUAL_NAMES = {"guard": "guard_model", "rloo": "policy"}


def find_run(given: str) -> RunDir:
    """The run in a directory, or the one whose record stands beside it (`<output_dir>.run`) or around it.

    Raises:
        ValueError: there is none.
    """
    path = Path(os.path.realpath(given))
    for candidate in (path, path.with_name(f"{path.name}.run"), path.parent):
        if (candidate / "stages").is_dir():
            return RunDir(candidate)
    raise ValueError(
        f"{given}: there is no run here, since neither it nor {path.name}.run beside it holds stages/. Give the "
        "directory that a run writes its record to: runs/NAME, or --output_dir."
    )


def distinct_names(roots: Sequence[Path]) -> list[str]:
    """What runs are called side by side: a directory's own name, with as much of its path as tells it from the others.

    >>> distinct_names([Path("/a/warn"), Path("/b/warn"), Path("/b/stop")])
    ['a/warn', 'b/warn', 'stop']
    """
    parts = [root.resolve().parts for root in roots]
    ends = [[tuple(own[-depth:]) for depth in range(1, len(own) + 1)] for own in parts]
    taken = Counter(end for own in ends for end in own)
    return [str(Path(*next((end for end in own if taken[end] == 1), own[-1]))) for own in ends]


def collect(run: RunDir, as_of: str, name: str = "") -> Run:
    """Everything that a run's directory tells at a time; its name is that of the directory, or the one given.

    What cannot be read is left out and named, so that the rest can be seen.
    """
    reader = _Reader(run)
    settings = reader.start.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    names = reader.stage_names()
    models = tuple(reader.reward_models(names, settings))
    policy = reader.policy(names, settings)
    return Run(
        name=name or run.root.resolve().name,
        state=reader.state(),
        as_of=as_of,
        stages=tuple(reader.stage_states(names)),
        next_stage=reader.next_stage(names),
        command=str(reader.start.get("command") or ""),
        seed=seed_of(settings),
        versions=versions_of(reader.start.get("provenance")),
        settings=tuple(differences(settings)),
        data=None if reader.is_stale("data") else reader.part(reader.data),
        reward_models=models,
        policy=policy,
        notes=tuple(reader.notes),
        problems=tuple(reader.problems),
    )


@dataclass(frozen=True)
class _Trained:
    steps: int | None = None
    bad_steps: int = 0
    episodes: float | None = None


@dataclass(frozen=True)
class _Ended:
    verdict: str = ""
    action: str = ""
    rolled_back_to: int | None = None


@dataclass
class _Reader:
    """Reads the files of a run; what cannot be read is a note while the run goes on, and a problem afterwards."""

    run: RunDir
    goes_on: bool = False
    notes: list[str] = field(default_factory=list[str])
    problems: list[str] = field(default_factory=list[str])
    start: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        self.goes_on = bool(self.part(lambda: is_locked(self.run.lock)))
        found = self.part(lambda: read_json(self.run.start)) or self.part(lambda: read_json(self.run.summary))
        self.start = found or {}

    def part(self, read: Callable[[], T]) -> T | None:
        """One part of the run; None, if it cannot be read, which is told."""
        try:
            return read()
        except (ValueError, OSError) as error:
            self.tell(str(error))
            return None

    def tell(self, problem: str) -> None:
        """Say once what cannot be read; of a run that goes on it may be readable before long."""
        told, message = self.notes if self.goes_on else self.problems, problem.replace(f"{self.run.root}/", "")
        if message not in told:
            told.append(message)

    def node(self, path: Path) -> Node | None:
        """The object in a file, if there is one."""
        content = read_json(path)
        return None if content is None else Node(content, str(path))

    # ---- stages -----------------------------------------------------------------------------------------------------

    @property
    def planned(self) -> list[str]:
        """The stages that the run was started for, in order; none if it is older than this being written down."""
        names = self.start.get("stages")
        return [name for name in map(str, names) if _STAGE.fullmatch(name)] if isinstance(names, list) else []

    @property
    def passed(self) -> list[str] | None:
        """The stages that it has passed since it was started; None if it is older than this being written down."""
        names = self.start.get("passed")
        return [str(name) for name in names] if isinstance(names, list) else None

    def is_stale(self, stage: str) -> bool:
        """Whether what there is of a stage may be of an earlier start, with other settings."""
        return self.passed is not None and stage in self.planned and stage not in self.passed

    def is_done(self, stage: str) -> bool:
        """Whether a stage has ended, and not in an earlier start alone."""
        return self.run.stage(stage).exists() and not self.is_stale(stage)

    def stage_names(self) -> list[str]:
        """Stages that have begun, in the order that they run in, and not those of an earlier start."""
        if not self.planned:
            files = self.run.stage("x").parent.glob("*.json")
            return sorted({path.name.removesuffix(_STARTED).removesuffix(".json") for path in files}, key=_place)
        ahead = next((name for name in self.planned if not self.is_done(name)), "")
        begun = {ahead} if ahead and self.run.stage_started(ahead).exists() else set[str]()
        return [name for name in self.planned if self.is_done(name) or name in begun]

    def next_stage(self, names: Sequence[str]) -> str:
        """The first stage that is planned and has not begun."""
        return next((name for name in self.planned if name not in names), "")

    def state(self) -> State:
        """Whether the run goes on, has ended, or was left in the middle or between two stages."""
        if self.goes_on:
            return "running"
        wanted = self.planned or self.stage_names()
        return "finished" if wanted and all(map(self.is_done, wanted)) else "unfinished"

    def stage_states(self, names: Sequence[str]) -> Iterator[StageState]:
        """The stages, with the seconds of those that have ended."""
        for name in names:
            seconds = self.part(functools.partial(self.seconds, name)) if self.is_done(name) else None
            yield StageState(name, seconds)

    def seconds(self, stage: str) -> float | None:
        """Seconds that a stage took, if it has ended."""
        node = self.node(self.run.stage(stage))
        return node.number("seconds") if node else None

    def outputs(self, stage: str) -> Node | None:
        """What a stage that has ended found."""
        node = self.node(self.run.stage(stage)) if self.is_done(stage) else None
        return node.inside("outputs") if node else None

    def directory(self, stage: str, set_to: object) -> Path | None:
        """The directory that a stage writes to: where it usually is, as the stage says itself, or as settings say.

        Another run's directory of the same name is known by its key.
        """
        outputs = self.part(lambda: self.outputs(stage))
        root = self.run.root
        candidates = [root / _USUAL_NAMES.get(stage, stage), root.with_name(root.name.removesuffix(".run"))]
        said = [outputs.content.get("directory") if outputs else None, set_to]
        candidates += [path for one in said if one for path in (Path(str(one)), root.parent / Path(str(one)).name)]
        records = [self.part(functools.partial(read_json, self.run.stage(stage)))]
        records += [self.part(functools.partial(read_json, self.run.stage_started(stage)))]
        keys = [record.get("key") for record in records if record]
        for candidate in candidates:
            marker = self.part(functools.partial(read_json, candidate / STAGE_MARKER))
            if marker and marker.get("stage") == stage and marker.get("key") in keys:
                return candidate
        return None

    # ---- parts ------------------------------------------------------------------------------------------------------

    def data(self) -> Data | None:
        """What became of every row."""
        node = self.node(self.run.data_report)
        return data_of(node) if node else None

    def reward_models(self, names: Sequence[str], settings: Mapping[str, Any]) -> Iterator[RewardModel]:
        """The reward models that the run trains, or the one that it was given."""
        stages = sorted((name for name in names if _REWARD_STAGE.fullmatch(name)), key=lambda name: (name[0], name))
        output = setting(settings, "reward", "output_dir")
        given = setting(settings, "rloo", "reward_model_path")
        if not any(name.startswith("reward_model") for name in stages) and given:
            judged = self.part(lambda: self.judged(Path(str(given))))
            if judged:
                yield RewardModel("reward model", judged=judged)
        for stage in sorted(stages, key=lambda name: name == "guard"):
            number = stage.removeprefix("reward_model")
            set_to = setting(settings, "rloo", "guard_reward_model") if stage == "guard" else f"{output}{number}"
            yield self.reward_model(stage, self.directory(stage, set_to))

    def reward_model(self, stage: str, directory: Path | None) -> RewardModel:
        """One reward model of the run."""
        trained = self.part(lambda: self.trained(stage)) or _Trained()
        return RewardModel(
            name=stage.replace("_", " "),
            log=self.log(directory),
            steps=trained.steps,
            bad_steps=trained.bad_steps,
            judged=self.part(lambda: self.judged(directory)) if directory else None,
            pairs=self.samples(verification_name(stage), self.run.pairs(stage), pair_of),
        )

    def judged(self, directory: Path) -> Judged | None:
        """How the reward model in a directory was judged, if it was."""
        node = self.node(directory / REWARD_MODEL_RECORD)
        return judged_of(node.inside("heldout")) if node and node.has("heldout") else None

    def log(self, directory: Path | None) -> Log:
        """What a training has logged: its own record, or what its newest checkpoint keeps of it."""
        if directory is None:
            return Log()
        rows, problem = read_lines(directory / METRICS)
        if problem and self.state() == "finished":
            self.tell(problem)
        elif problem and not self.goes_on:  # one that was killed may have left half a line, which is no damage
            self.notes.append(problem.replace(f"{self.run.root}/", ""))
        if not rows:
            states = sorted(directory.glob(f"checkpoint-*/{TRAINER_STATE}"), key=lambda path: step_of(path.parent))
            rows = (self.part(lambda: logged(states[-1].parent)) if states else None) or []
        return Log(tuple(row for row in rows if isinstance(row.get("step"), int)))

    def samples(
        self, stage: str, path: Path, read: Callable[[int, Mapping[str, Any], str], Sample]
    ) -> tuple[Sample, ...]:
        """The first lines of the file of samples that a stage writes."""
        if self.is_stale(stage):
            return ()
        rows, problem = read_lines(path)
        if problem:
            self.tell(problem)
        if len(rows) > MOST_SAMPLES:
            self.notes.append(f"{path.name} has {len(rows)} lines, of which the first {MOST_SAMPLES} are here.")
        found: list[Sample] = []
        wrong: list[str] = []
        for number, row in enumerate(rows[:MOST_SAMPLES], start=1):
            try:
                found.append(read(number, row, path.name))
            except ValueError as error:
                wrong.append(str(error))
        if wrong:
            self.tell(wrong[0] + (f" (And {len(wrong) - 1} more lines cannot be read.)" if wrong[1:] else ""))
        return tuple(found)

    def policy(self, names: Sequence[str], settings: Mapping[str, Any]) -> Policy | None:
        """The policy, once its training has begun."""
        if "rloo" not in names:
            return None
        directory = self.directory("rloo", setting(settings, "rloo", "output_dir"))
        trained = self.part(lambda: self.trained("rloo")) or _Trained()
        ended = (self.part(lambda: self.ended(directory)) if directory else None) or _Ended()
        seen = (self.part(lambda: tuple(read_watched(directory / WATCH))) if directory else None) or ()
        return Policy(
            log=self.log(directory),
            watched=seen,
            alarms=self.part(lambda: _alarms(seen, setting(settings, "rloo", "max_kl"))) or (),
            verdict=ended.verdict,
            action=ended.action,
            rolled_back_to=ended.rolled_back_to,
            steps=trained.steps,
            bad_steps=trained.bad_steps,
            episodes=trained.episodes,
            judged=self.part(self.policy_judged),
            answers=self.samples("evaluation", self.run.samples, answer_of),
        )

    def trained(self, stage: str) -> "_Trained | None":
        """How far a training went, if it has ended."""
        outputs = self.outputs(stage)
        if outputs is None:
            return None
        episodes = outputs.number("episodes") if outputs.has("episodes") else None
        return _Trained(outputs.count("steps"), outputs.count("bad_steps"), episodes)

    def ended(self, directory: Path) -> "_Ended | None":
        """What watching a policy came to, if that was done and has ended."""
        record = self.node(directory / POLICY_RECORD)
        watch = record.inside("training").maybe("watch") if record else None
        if watch is None:
            return None
        verdict = watch.maybe("verdict")
        back = watch.count("rolled_back_to") if watch.has("rolled_back_to") else None
        return _Ended(verdict.text("sentence"), watch.text("action", ""), back) if verdict else _Ended()

    def policy_judged(self) -> PolicyJudged | None:
        """How the policy was judged, if it was."""
        outputs = self.outputs("evaluation")
        return policy_judged_of(outputs) if outputs else None


def _place(stage: str) -> tuple[int, str]:
    """Where in a run a stage stands."""
    first = next((n for n, pattern in enumerate(_ORDER) if re.fullmatch(pattern, stage)), len(_ORDER))
    return first, stage


def _alarms(history: Sequence[Watched], max_kl: object) -> tuple[Alarm, ...]:
    """The alarms along a run, each once, when it was first raised."""
    limit = float(max_kl) if isinstance(max_kl, int | float) else None
    found: dict[str, Alarm] = {}
    for length in range(2, len(history) + 1):
        for alarm in alarms(history[:length], limit):
            found.setdefault(alarm.name, alarm)
    return tuple(found.values())
