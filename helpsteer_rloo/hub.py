"""Whether the hub answers, and with what: asked briefly, since its own functions try for a minute."""

import functools
from pathlib import Path
from typing import Any, cast

SECONDS = 5.0
"""That an answer may take."""


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
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # That of whichever HTTP library the hub's client stands on.
    network_error: type[Exception] = cast(Any, HfHubHTTPError.__bases__[0])
    try:
        HfApi().repo_info(name, revision=revision, repo_type=repo_type, timeout=SECONDS)
    except (network_error, OSError, HFValidationError) as error:
        return error
    return None


@functools.cache
def absence(name: str, revision: str | None = None, repo_type: str = "model") -> str | None:
    """Why the hub cannot be reached, or None if it can, or need not since a model or data set is a directory here.

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
