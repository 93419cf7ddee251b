"""Where the things are that a record names: where they were, or beside what the record is of, if all was moved.

A run that was copied has both. Then that counts which is the same still, by the identity that the record has of it.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from helpsteer_rloo.identity import model_identity

BASE_IDENTITY = "base_identity"
"""What a record calls the identity of its base, as `model_identity` has it."""


def found_again(name: str, directory: Path, mark: str, same: Callable[[Path], bool] | None = None) -> Path | None:
    """A directory that the record in another one names, if it is still there.

    Args:
        name: As it was when the record was written; what is relative was so to a working directory that nobody knows.
        directory: Of the record.
        mark: A file that the directory named has.
        same: Whether a directory holds what it held when the record was written, if the record tells; of several the
            first that does is taken, or else the first.
    """
    was, beside = Path(name), directory.resolve().parent / Path(name).name
    places = (was, beside) if was.is_absolute() else (beside, was)
    there = [place for place in places if (place / mark).exists()]
    kept = filter(same, there) if same is not None else iter(there)
    return next(kept, there[0] if there else None)


def base_found_again(name: str, directory: Path, identity: str | None = None) -> str:
    """The base of a model in a directory: an absolute path that is gone, or changed, becomes the place beside it.

    Args:
        name: Of the base, as recorded.
        directory: Of the model.
        identity: Of the base, if it is recorded.

    >>> base_found_again("Qwen/Qwen3-8B", Path("models/policy"))
    'Qwen/Qwen3-8B'
    """
    if not Path(name).is_absolute():
        return name
    same = None if identity is None else lambda place: model_identity(str(place)) == identity
    return str(found_again(name, directory, "config.json", same) or name)


def recorded_identity(record: Mapping[str, Any]) -> str | None:
    """The identity that a record has of its base; none in those of earlier versions, or if the base is the hub's."""
    found = record.get(BASE_IDENTITY)
    return found if isinstance(found, str) and found.startswith("local:") else None


def doubt_of_base(record: Mapping[str, Any], directory: Path) -> str | None:
    """What is to be known where a model was trained on another base than is found now; None if nothing is."""
    name, identity = record["base"]["name"], recorded_identity(record)
    if identity is None or not Path(name).is_dir() or model_identity(name) == identity:
        return None
    return f"{directory} was trained on another base than {name} holds now; what it gives is not what it gave."
