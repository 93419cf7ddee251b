"""Whether the hub answers, asked once and briefly, since its own functions try for a minute; and what it sends."""

import functools
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from helpsteer_rloo.events import Task

SECONDS = 5.0
"""That an answer may take."""
_BAR_ON_DISK = "huggingface_hub.snapshot_download"
"""The hub's name for the bar of a snapshot that counts bytes on the disk; its others count files, or traffic."""


@functools.cache
def absence(name: str, revision: str | None = None, repo_type: str = "model") -> str | None:
    """Why the hub cannot be reached, or None if it can, or need not since a model or data set is a directory here.

    What it answers, such as that there is no such name, is left to whoever fetches it. It is asked once in a process
    for the same thing, so that an outage later on is waited out, as the hub's own functions do it.

    >>> absence(".") is None
    True
    """
    if Path(name).is_dir():
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # That of whichever HTTP library the hub's client stands on.
    network_error: type[Exception] = cast(Any, HfHubHTTPError.__bases__[0])
    try:
        HfApi().repo_info(name, revision=revision, repo_type=repo_type, timeout=SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return None
    except (network_error, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def snapshot(name: str, patterns: Sequence[str], revision: str | None = None, repo_type: str = "model") -> Path:
    """The directory of a model or data set of the hub with the files that match patterns; a download is told of.

    Where the hub cannot be reached, it is what was downloaded earlier.

    Raises:
        OSError, HfHubHTTPError: it is not to be had.
    """
    from huggingface_hub import snapshot_download

    wanted = functools.partial(
        cast(Any, snapshot_download), name, repo_type=repo_type, revision=revision, allow_patterns=list(patterns)
    )
    if absence(name, revision, repo_type) is not None:
        return Path(wanted(local_files_only=True))
    found = wanted(dry_run=True, tqdm_class=_bar_that_tells(None))
    missing = sum(file.file_size or 0 for file in found if file.will_download)
    task = Task(f"downloading {name}", missing, unit="bytes") if missing else None
    try:
        return Path(wanted(tqdm_class=_bar_that_tells(task)))
    finally:
        if task is not None:
            task.end()


def _bar_that_tells(task: Task | None) -> type:
    """A class of bars for the hub's functions: never drawn, the one for bytes on the disk being the task's progress."""
    from huggingface_hub.utils.tqdm import tqdm

    lock, done = threading.Lock(), [0]  # files are downloaded by several threads

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._tells = task is not None and kwargs.get("name") == _BAR_ON_DISK
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._tells and task is not None:
                with lock:
                    done[0] += int(n or 0)
                    task.reach(done[0])
            return None

    return Bar
