"""Whether the hub answers, and with what: asked briefly, since its own functions try for a minute. What it sends."""

import functools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar, cast

from helpsteer_rloo.events import Task

SECONDS = 5.0
"""That an answer may take in all, however it trickles in."""
ODD = (ValueError, LookupError, AttributeError, TypeError)
"""What the hub's client raises about an answer that is no JSON, or not what the hub sends."""
_Answer = TypeVar("_Answer")
_BAR_ON_DISK = "huggingface_hub.snapshot_download"
"""The hub's name for the bar of a snapshot that counts bytes on the disk; its others count files, or traffic."""


class NoHubError(OSError):
    """What answers in the place of the hub is something else: the page of a proxy, say."""


def network_error() -> type[Exception]:
    """That of whichever HTTP library the hub's client stands on: no answer, or one that breaks off."""
    from huggingface_hub.errors import HfHubHTTPError

    return cast(Any, HfHubHTTPError.__bases__[0])


def in_time(ask: Callable[[], _Answer]) -> _Answer:
    """What a call gives that asks the hub, unless it takes too long; a client's own limits are for every read anew.

    Raises:
        TimeoutError: it is not done in `SECONDS`. It is left to itself then, and ends with the process.
        Exception: what it raises.
    """
    answer: Future[_Answer] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            answer.set_exception(error)

    waited = threading.Thread(target=run, daemon=True)
    waited.start()
    waited.join(SECONDS)
    if waited.is_alive():
        raise TimeoutError(f"no whole answer in {SECONDS:g} seconds")
    return answer.result()


def refusal(name: str, revision: str | None = None, repo_type: str = "model") -> str | None:
    """What the hub has against giving out a model or data set, in a few words; None if nothing, or if it is away."""
    from huggingface_hub import errors

    found = _failure(name, revision, repo_type)
    if isinstance(found, errors.GatedRepoError):  # which is a RepositoryNotFoundError, too
        return "the hub gives it to those alone who were granted access: ask for it on its page, and log in"
    if isinstance(found, errors.RevisionNotFoundError):
        return f"the hub has no revision {revision!r} of it"
    if isinstance(found, errors.HFValidationError):
        return "the hub has no such names"
    if not isinstance(found, errors.HfHubHTTPError):
        return None
    status = found.response.status_code
    if isinstance(found, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"the hub has no {repo_type} of that name, or it is private"
    return f"the hub answers with status {status}"


def _failure(name: str, revision: str | None, repo_type: str) -> Exception | None:
    """What went wrong when the hub was asked for a model or data set; a directory here needs no asking."""
    if Path(name).is_dir():
        return None
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    try:
        in_time(lambda: HfApi().repo_info(name, revision=revision, repo_type=repo_type, timeout=SECONDS))
    except (network_error(), OSError, HFValidationError) as error:
        return error
    except ODD as error:
        return NoHubError(f"what answers there is no hub ({type(error).__name__})")
    return None


@functools.cache
def absence(name: str, revision: str | None = None, repo_type: str = "model") -> str | None:
    """Why the hub cannot be reached, or None if it can, or need not since a model or data set is a directory here.

    Something else that answers in its place is an absence, too.

    What it answers, such as that there is no such name, is left to whoever fetches it. It is asked once in a process
    for the same thing, so that an outage later on is waited out, as the hub's own functions do it.

    >>> absence(".") is None
    True
    """
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    error = _failure(name, revision, repo_type)
    if error is not None and not isinstance(error, (HfHubHTTPError, HFValidationError)):
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
