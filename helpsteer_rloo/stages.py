"""Stages of a run: each is run once for the same inputs, goes on after an interruption, and leaves a marker last."""

import itertools
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer_rloo.events import StageBegan, StageEnded, publish
from helpsteer_rloo.heartbeat import LIMIT, Watch
from helpsteer_rloo.preemption import stop_before
from helpsteer_rloo.processes import is_main_process
from helpsteer_rloo.run_dir import STAGE_MARKER, RunDir, fingerprint, read_json, read_record, set_aside, write_json

Say = Callable[[str], None]
_STARTED: dict[str, type | tuple[type, ...]] = {"key": str, "inputs": dict}
_FINISHED: dict[str, type | tuple[type, ...]] = {
    **_STARTED,
    "execution": str,
    "outputs": dict,
    "seconds": (int, float),
}
"""What the records of a stage that has begun, and of one that is finished, are made of."""


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    `inputs` is everything that decides the stage's result, besides the results of the stages it `needs` (by name;
    `None` stands for the stage before it). If the outputs hold a `fingerprint` of the result, running the stage again
    to the same result leaves the stages that need it finished; otherwise they run again too. `artefacts` must exist
    for the stage to count as finished. `directory`, if any, belongs to the stage alone and must then hold a file that
    matches the pattern `content`; it is moved aside, and its `companions` with it, when the stage starts anew. A stage
    that is not `distributed` runs on the main process while the others wait for its marker.
    """

    name: str
    inputs: Mapping[str, Any]
    run: Callable[[], dict[str, Any]]
    artefacts: tuple[Path, ...] = ()
    directory: Path | None = None
    companions: tuple[Path, ...] = ()
    content: str = "*"
    distributed: bool = False
    needs: tuple[str, ...] | None = None


def run_stages(run: RunDir, stages: Sequence[Stage], say: Say) -> dict[str, dict[str, Any]]:
    """Run the stages that are not finished, in order, and return every stage's outputs by name.

    Raises:
        ValueError: a stage failed for a reason the user can mend, or its directory holds something else.
        Stopped: the run was asked to stop when a stage was all but finished.
    """
    for message in _changes(run, stages):
        say(message)
    outputs: dict[str, dict[str, Any]] = {}
    for stage, needed in _with_needs(stages):
        key = _key(run, stage, needed)
        before = is_finished(run, stage, key)
        if not before:
            stop_before(f"stage {stage.name}")
            _run_one(run, stage, key, say)
        record = _finished(run, stage.name) or {}
        note_passed(run, stage.name)
        publish(StageEnded(stage.name, record["seconds"], before))
        outputs[stage.name] = record["outputs"]
    return outputs


def note_passed(run: RunDir, name: str, *, begins: bool = False) -> None:
    """Keep in the run's record which stages it has passed since it was started: found finished, or brought to an end.

    Markers alone do not tell: after a change of settings, those of later stages stand there until their turn comes. A
    stage that `begins` is not passed any more, and nor are those after it. Older runs have no such record.

    Raises:
        ValueError: the record is damaged.
    """
    record = read_json(run.start) if is_main_process() else None
    passed = record.get("passed") if record else None
    if not isinstance(passed, list):
        return
    before = itertools.takewhile(lambda other: other != name, passed)
    now = list(before if begins else dict.fromkeys([*passed, name]))
    if now != passed:
        write_json(run.start, {**(record or {}), "passed": now})


def seconds_by_stage(run: RunDir, names: Sequence[str]) -> dict[str, float]:
    """Seconds that each finished stage took when it ran."""
    records = {name: _finished(run, name) for name in names}
    return {name: record["seconds"] for name, record in records.items() if record}


def _finished(run: RunDir, name: str) -> dict[str, Any] | None:
    return read_record(run.stage(name), _FINISHED)


def _started(run: RunDir, name: str) -> dict[str, Any] | None:
    return read_record(run.stage_started(name), _STARTED)


def _with_needs(stages: Sequence[Stage]) -> list[tuple[Stage, list[str]]]:
    """Each stage with the names of the stages before it whose results it needs."""
    names = [stage.name for stage in stages]
    return [
        (stage, names[max(0, i - 1) : i] if stage.needs is None else [n for n in names[:i] if n in stage.needs])
        for i, stage in enumerate(stages)
    ]


def _key(run: RunDir, stage: Stage, needed: Sequence[str]) -> str:
    """Digest of a stage's inputs and of the results of the stages it needs."""
    executions = [(_finished(run, name) or {}).get("execution") for name in needed]
    return fingerprint([stage.name, _plain(stage.inputs), executions])


def _plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs as they come back from a JSON file, so that they can be compared with recorded ones."""
    return json.loads(json.dumps(dict(inputs), default=str))


def is_finished(run: RunDir, stage: Stage, key: str) -> bool:
    """Whether the stage has run for these inputs, and what it left is there, from that very execution."""
    record = _finished(run, stage.name)
    if record is None or record["key"] != key or not all(path.exists() for path in stage.artefacts):
        return False
    if stage.directory is None:
        return True
    marker = read_json(stage.directory / STAGE_MARKER) or {}
    return marker.get("execution") == record["execution"] and any(stage.directory.glob(stage.content))


def finished_stages(run: RunDir, stages: Sequence[Stage]) -> list[str]:
    """Names of the stages that are finished for their present inputs."""
    return [stage.name for stage, needed in _with_needs(stages) if is_finished(run, stage, _key(run, stage, needed))]


def _changes(run: RunDir, stages: Sequence[Stage]) -> list[str]:
    """Sentences that say which settings changed since the last run, and which stages that makes invalid."""
    messages = []
    listed = _with_needs(stages)
    for stage in stages:
        record = _finished(run, stage.name) or _started(run, stage.name)
        if record is None:
            continue
        old, new = record["inputs"], _plain(stage.inputs)
        changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        if changed:
            invalid = [stage.name]
            for later, needed in listed:
                if later.name not in invalid and set(needed) & set(invalid):
                    invalid.append(later.name)
            what = ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in changed)
            messages.append(f"Changed since the last run: {what}. These stages run again: {', '.join(invalid)}.")
    return messages


def _run_one(run: RunDir, stage: Stage, key: str, say: Say) -> None:
    main = is_main_process()
    if not main and not stage.distributed:
        _wait_for(run, stage, key)
        return
    if main:
        goes_on = _begin(run, stage, key, say)
        goes_on = goes_on and stage.directory is not None and any(stage.directory.glob("checkpoint-*"))
        say(f"Stage {stage.name}" + (" goes on." if goes_on else "."))
        publish(StageBegan(stage.name, goes_on))
    begin = time.monotonic()
    outputs = stage.run()
    if not main:
        _wait_for(run, stage, key)
        return
    execution = outputs.get("fingerprint") or uuid.uuid4().hex
    if stage.directory is not None:
        write_json(stage.directory / STAGE_MARKER, {"stage": stage.name, "key": key, "execution": execution})
    record = {
        "key": key,
        "execution": execution,
        "inputs": _plain(stage.inputs),
        "outputs": outputs,
        "seconds": round(time.monotonic() - begin, 2),
    }
    write_json(run.stage(stage.name), record)
    run.stage_started(stage.name).unlink(missing_ok=True)


def _begin(run: RunDir, stage: Stage, key: str, say: Say) -> bool:
    """Take possession of the stage's directory; return whether an interrupted execution is gone on with."""
    started = _started(run, stage.name)
    goes_on = started is not None and started["key"] == key
    if stage.directory is not None:
        owned = read_json(stage.directory / STAGE_MARKER) or {}
        goes_on = goes_on and owned.get("key") == key
        if not goes_on:
            refuse_foreign(stage.directory)
            _set_aside(stage, say)
            stage.directory.mkdir(parents=True, exist_ok=True)
            write_json(stage.directory / STAGE_MARKER, {"stage": stage.name, "key": key, "execution": None})
    note_passed(run, stage.name, begins=True)
    run.stage(stage.name).unlink(missing_ok=True)
    write_json(run.stage_started(stage.name), {"key": key, "inputs": _plain(stage.inputs)})
    return goes_on


def _wait_for(run: RunDir, stage: Stage, key: str) -> None:
    """Wait until the main process has finished a stage.

    Raises:
        ValueError: it has ended, or cannot be seen any more.
    """
    watch = Watch(run.heartbeat)
    while not is_finished(run, stage, key):
        if watch.has_lost_it():
            raise ValueError(
                f"The main process has given no sign of life in {run.heartbeat} for {LIMIT:.0f} seconds, and stage "
                f"{stage.name} is not finished, so this process stops too. The main one's output has the reason. The "
                "same command goes on from what is finished."
            )
        time.sleep(1.0)


def refuse_foreign(directory: Path) -> None:
    """Refuse to touch a directory that holds anything but the result of a stage.

    Raises:
        ValueError: it is a file, or a directory with a content that no stage made.
    """
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, where a directory is to be made; give another one.")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / STAGE_MARKER).exists():
        raise ValueError(
            f"{directory} is not empty and does not hold a result of this tool; it is left alone. "
            "Give another --output_dir, or empty the directory yourself."
        )


def _set_aside(stage: Stage, say: Say) -> None:
    """Move what an earlier execution made, if that is anything, and what belongs to it out of the way."""
    for path in (stage.directory, *stage.companions):
        if path is not None and path.is_dir() and any(entry.name != STAGE_MARKER for entry in path.iterdir()):
            say(f"The earlier result in {path} is kept as {set_aside(path)}.")
