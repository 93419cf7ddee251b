"""Checkpoints that are known to be whole: each is sealed with the digests of its files, written last.

A run that was killed while it saved, or whose disk was full or lost a block, goes on from the newest checkpoint that is
still as it was sealed.
"""

import errno
import hashlib
import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from helpsteer_rloo.run_dir import open_file, read_json, read_text, write_json

SEAL = "sealed.json"
"""In a checkpoint: size and SHA-256 of every other file of it, by its path there."""
TRAINER_STATE = "trainer_state.json"
"""In a checkpoint: where the trainer was, and what it had logged."""


_WEIGHTS = ("*model*.safetensors", "*model*.bin", "pytorch_model_fsdp*/*", "global_step*/*")
"""Files that hold weights: those of transformers and PEFT, of FSDP and of DeepSpeed."""


def seal(checkpoint: Path) -> None:
    """Record what the files of a finished checkpoint are.

    Raises:
        OSError: they cannot be read, or the record not written.
    """
    write_json(checkpoint / SEAL, {name: _identity(checkpoint / name) for name in sorted(_files(checkpoint))})


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if its files are those that were sealed."""
    try:
        sealed = json.loads(read_text(checkpoint / SEAL))
        for name, identity in sealed.items():
            path = checkpoint / name
            if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                return f"{name} is not in it"
            if path.stat().st_size != identity["bytes"] or _identity(path) != identity:
                return f"{name} is not what was saved"
        for name in sorted(_files(checkpoint) - sealed.keys()):
            return f"{name} was not saved with it"
        if not any(PurePath(name).match(pattern) for name in sealed for pattern in _WEIGHTS):
            return "there are no weights in it"
    except FileNotFoundError as error:
        name = Path(str(error.filename)).name
        return "it was not finished" if name == SEAL else f"{name} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def newest_whole(directory: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of the highest step that is whole, and a sentence on each newer one that is not."""
    problems: list[str] = []
    for path in reversed(_by_step(directory)):
        problem = damage(path)
        if problem is None:
            return path, problems
        problems.append(f"The checkpoint {path} cannot be used: {problem}.")
    return None, problems


def keep_newest(directory: Path, count: int, best: Path | None = None) -> None:
    """Remove all checkpoints but the newest `count` sealed ones, by step, whatever the clock said when they were made.

    One that is not sealed goes as well once a later one is; `best` stays.
    """
    checkpoints = _by_step(directory)
    kept = [path for path in checkpoints if (path / SEAL).exists()][-count:]
    if not kept:
        return
    for path in checkpoints[: checkpoints.index(kept[-1])]:
        if path not in kept and (best is None or path.resolve() != best.resolve()):
            (path / SEAL).unlink(missing_ok=True)  # first, so that a half removed one is not taken for whole
            shutil.rmtree(path)


@contextmanager
def full_disk_explained(directory: Path) -> Generator[None]:
    """Within, checkpoints and models are written to a directory; if there is no room for one, say so, and tidy up.

    Raises:
        ValueError: there was none. The checkpoint that was being written is gone, the ones before it are there.
    """
    try:
        yield
    except BaseException as error:  # torch's, where a checkpoint is written in parts, is no `Exception`
        if not _tells_of_a_full_disk(error):
            raise
        for path in _by_step(directory):
            if not (path / SEAL).exists():
                shutil.rmtree(path, ignore_errors=True)  # as other processes do
        newest, _ = newest_whole(directory)
        behind = f"The checkpoint {newest} is good" if newest else "There is no checkpoint yet"
        raise ValueError(
            f"The disk is full: {directory} could not be written to ({str(error).strip().splitlines()[-1]}). {behind}. "
            "Make room, or keep fewer checkpoints (--save_total_limit), and give the same command again."
        ) from error


def _tells_of_a_full_disk(error: BaseException) -> bool:
    """Each library has its own way to say so: an error number, that error's text, or torch's word on its archive."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    texts = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed", "inline_container.cc")
    return any(text in str(error) for text in texts)


def step_of(checkpoint: Path) -> int:
    """The optimizer step of a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("checkpoint-"))


def logged(checkpoint: Path) -> list[dict[str, Any]]:
    """What a training had logged by a checkpoint, as transformers keeps it there: each time a row, with its `step`.

    Raises:
        ValueError: the file that holds it is damaged.
    """
    history = (read_json(checkpoint / TRAINER_STATE) or {}).get("log_history")
    return [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []


def _by_step(directory: Path) -> list[Path]:
    named = [path for path in directory.glob("checkpoint-*") if path.name[11:].isdecimal() and path.is_dir()]
    return sorted(named, key=step_of)


def _files(checkpoint: Path) -> set[str]:
    files = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if path.is_file())
    return {path.as_posix() for path in files if path != Path(SEAL)}


def _identity(path: Path) -> dict[str, int | str]:
    with open_file(path) as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
