"""Whether the hub answers: asked once and briefly, since its own functions try for a minute before they give up."""

import functools
from pathlib import Path
from typing import Any, cast

SECONDS = 5.0
"""That an answer may take."""


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
