"""Where trackers keep what a training reports to them, and which run of theirs it is."""

import os
import sys
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpsteer_rloo.processes import is_main_process
from helpsteer_rloo.run_dir import read_record, write_json

LOGS = "logs"
"""In the directory of what is trained: files of TensorBoard and W&B."""
_EXECUTION = "execution.json"
"""Among them: what tells this training from one before it in the same directory, and from all others."""


def trackers(report_to: Any) -> list[str]:
    """The trackers that are asked for.

    >>> trackers(["tensorboard"]), trackers("none"), trackers(None)
    (['tensorboard'], [], [])
    """
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    return [name for name in names if name != "none"]


def run_name(directory: Path) -> str:
    """A name for what is trained in a directory: the same when it is gone on with, another when it begins anew."""
    run = f"{directory.resolve().parent.name}-" if (directory.parent / "stages").is_dir() else ""
    return f"{run}{directory.resolve().name}-{_execution(directory)[:4]}"


def _execution(directory: Path) -> str:
    """A random name of this training, made when it is first asked for."""
    path = directory / LOGS / _EXECUTION
    record = read_record(path, {"id": str})
    if record is None:
        record = {"id": uuid.uuid4().hex[:16]}
        if is_main_process():
            write_json(path, record)
    return record["id"]


@contextmanager
def tracked(report_to: Any, directory: Path) -> Generator[None]:
    """Within, a trainer is made and trains: trackers write to its directory, and their runs end with it.

    What is set in the environment stays as it is. Trackio keeps its own directory, where its dashboard looks.

    Raises:
        ValueError: W&B refuses to begin, for want of an account, say.
    """
    names = trackers(report_to)
    if not names or not is_main_process():
        yield
        return
    logs = directory / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    places = {"TENSORBOARD_LOGGING_DIR": str(logs), "WANDB_DIR": str(logs)}
    run = {"WANDB_RUN_ID": _execution(directory), "WANDB_RESUME": "allow"}
    with _environment({**places, **({} if "WANDB_RUN_ID" in os.environ else run)}):
        failed = True
        try:
            yield
            failed = False
        except Exception as error:
            if not type(error).__module__.startswith("wandb."):
                raise
            raise ValueError(
                f"--report_to wandb: {error} Give WANDB_MODE=offline in the environment to log without an account."
            ) from error
        finally:
            _finish(failed)


@contextmanager
def _environment(defaults: Mapping[str, str]) -> Generator[None]:
    """Within, these variables are set, but for those that were so before."""
    new = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def _finish(failed: bool) -> None:
    """End the runs that are still open, or the next training of this process would report to them."""
    wandb, trackio = sys.modules.get("wandb"), sys.modules.get("trackio")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish(exit_code=int(failed))
        wandb.teardown()  # or the next one would keep this one's directory and run
    if trackio is not None and trackio.context_vars.current_run.get() is not None:
        trackio.finish()
