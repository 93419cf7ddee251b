"""Stages of a run: each is run once for the same inputs, goes on after an interruption, and leaves a marker last."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer_rloo.run_dir import RunDir, fingerprint, read_json, set_aside, write_json

Say = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    `inputs` is everything that decides the stage's result, besides the stages before it. `artefacts` must exist for
    the stage to count as finished. `directory`, if any, belongs to the stage alone; it is moved aside when the stage
    starts anew. A stage that is not `distributed` runs on the main process while the others wait for its marker.
    """

    name: str
    inputs: Mapping[str, Any]
    run: Callable[[], dict[str, Any]]
    artefacts: tuple[Path, ...] = ()
    directory: Path | None = None
    distributed: bool = False


def run_stages(run: RunDir, stages: Sequence[Stage], say: Say) -> dict[str, dict[str, Any]]:
    """Run the stages that are not finished, in order, and return every stage's outputs by name.

    Raises:
        ValueError: a stage failed for a reason the user can mend, or its directory holds something else.
    """
    keys = _chain(stages)
    finished = [_is_finished(run, stage, keys[stage.name]) for stage in stages]
    for message in _changes(run, stages, keys):
        say(message)
    outputs = {}
    for stage, done in zip(stages, finished, strict=True):
        if not done:
            _run_one(run, stage, keys[stage.name], say)
        outputs[stage.name] = (read_json(run.stage(stage.name)) or {})["outputs"]
    return outputs


def seconds_by_stage(run: RunDir, names: Sequence[str]) -> dict[str, float]:
    """Seconds that each finished stage took when it ran."""
    records = {name: read_json(run.stage(name)) for name in names}
    return {name: record["seconds"] for name, record in records.items() if record}


def _chain(stages: Sequence[Stage]) -> dict[str, str]:
    """A key for each stage's inputs together with those of all stages before it."""
    keys, before = {}, ""
    for stage in stages:
        before = fingerprint([before, stage.name, _plain(stage.inputs)])
        keys[stage.name] = before
    return keys


def _plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in inputs.items()}


def _is_finished(run: RunDir, stage: Stage, key: str) -> bool:
    record = read_json(run.stage(stage.name))
    return record is not None and record["key"] == key and all(path.exists() for path in stage.artefacts)


def _changes(run: RunDir, stages: Sequence[Stage], keys: Mapping[str, str]) -> list[str]:
    """Sentences that say which settings changed since the last run, and which stages that makes invalid."""
    messages = []
    for number, stage in enumerate(stages):
        record = read_json(run.stage(stage.name)) or read_json(run.stage_started(stage.name))
        if record is None or record["key"] == keys[stage.name]:
            continue
        old, new = record["inputs"], _plain(stage.inputs)
        changed = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
        if changed:
            listed = ", ".join(f"{name} {old.get(name)!r} -> {new.get(name)!r}" for name in changed)
            invalid = ", ".join(later.name for later in stages[number:])
            messages.append(f"Changed since the last run: {listed}. These stages run again: {invalid}.")
    return messages


def _run_one(run: RunDir, stage: Stage, key: str, say: Say) -> None:
    main = os.environ.get("RANK", "0") == "0"
    if not main and not stage.distributed:
        _wait_for(run, stage, key)
        return
    if main:
        started = read_json(run.stage_started(stage.name))
        goes_on = started is not None and started["key"] == key
        if stage.directory is not None and not goes_on:
            _clear(stage, say)
        run.stage(stage.name).unlink(missing_ok=True)
        write_json(run.stage_started(stage.name), {"key": key, "inputs": _plain(stage.inputs)})
        say(f"Stage {stage.name}" + (" goes on." if goes_on else "."))
    begin = time.monotonic()
    outputs = stage.run()
    if main:
        seconds = round(time.monotonic() - begin, 2)
        record = {"key": key, "inputs": _plain(stage.inputs), "outputs": outputs, "seconds": seconds}
        write_json(run.stage(stage.name), record)
        run.stage_started(stage.name).unlink(missing_ok=True)
    else:
        _wait_for(run, stage, key)


def _wait_for(run: RunDir, stage: Stage, key: str) -> None:
    while not _is_finished(run, stage, key):
        time.sleep(1.0)


def _clear(stage: Stage, say: Say) -> None:
    """Move the result of an earlier run out of the way; refuse to touch a directory of anything else."""
    directory = stage.directory
    if directory is None or not directory.exists() or not any(directory.iterdir()):
        return
    ours = [*stage.artefacts, *directory.glob("checkpoint-*"), directory / "rollouts"]
    if not any(path.exists() for path in ours):
        raise ValueError(
            f"{directory} is not empty and does not hold a result of this tool; it is left alone. "
            "Give another --output_dir, or empty the directory yourself."
        )
    say(f"The earlier result in {directory} is kept as {set_aside(directory)}.")
