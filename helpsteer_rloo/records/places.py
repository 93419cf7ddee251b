"""Where the things are that a record names: where they were, or beside what the record is of, if all was moved."""

from pathlib import Path


def found_again(name: str, directory: Path, mark: str) -> Path | None:
    """A directory that the record in another one names, if it is still there.

    Args:
        name: As it was when the record was written; what is relative was so to a working directory that nobody knows.
        directory: Of the record.
        mark: A file that the directory named has.
    """
    was, beside = Path(name), directory.resolve().parent / Path(name).name
    places = (was, beside) if was.is_absolute() else (beside, was)
    return next((place for place in places if (place / mark).exists()), None)


def base_found_again(name: str, directory: Path) -> str:
    """The base of a model in a directory: an absolute path that is gone becomes the place beside it, if it is there.

    >>> base_found_again("Qwen/Qwen3-8B", Path("models/policy"))
    'Qwen/Qwen3-8B'
    """
    return str(found_again(name, directory, "config.json") or name) if Path(name).is_absolute() else name
