"""The rows of a benchmark: a prompt, the responses to be scored, and what the benchmark says of them."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpsteer_rloo.data.fields import FieldReader
from helpsteer_rloo.data.sources import ENDINGS, BadRowError, RawRow, RowFile, read_rows
from helpsteer_rloo.groups import Message
from helpsteer_rloo.run_dir import read_text

FILES = (*ENDINGS, ".json")


@dataclass(frozen=True, slots=True)
class Item:
    """One row. `responses` are texts by the name of their field; `labels` is all that its result depends on."""

    id: str
    prompt: tuple[Message, ...]
    responses: Mapping[str, str]
    labels: Mapping[str, Any]


Scores = Mapping[str, Mapping[str, float]]
"""Of every item, by its id, the scores of its responses by field."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Items:
    """The items of a benchmark, and how many rows were left out, by reason."""

    items: list[Item]
    left_out: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A published format, and how its authors compute results from scores.

    `total` names a file that holds what the others of a directory hold as well.
    """

    read: Callable[[Path], Items]
    result: Callable[[list[Item], Scores], Result]


def rows_of(path: Path, total: str | None = None) -> Iterator[RawRow]:
    """The rows of a file, or of all files of a directory in the order of their names.

    Args:
        path: A file that ends in one of `FILES`, or a directory of such files.
        total: Name of the file that holds all rows of a directory; if it is there, it is the only one that is read.

    Raises:
        ValueError: there is no such file, or one cannot be read.
    """
    if not path.exists():
        raise ValueError(f"--benchmark_path {path}: no such file or directory.")
    files = sorted(file for file in path.iterdir() if file.name.endswith(FILES)) if path.is_dir() else [path]
    files = [file for file in files if file.name == total] or files
    if not files or not all(file.is_file() and file.name.endswith(FILES) for file in files):
        raise ValueError(f"--benchmark_path {path}: no file of rows; expected files ending in {', '.join(FILES)}.")
    for file in files:
        yield from _list_of(file) if file.suffix == ".json" else read_rows(RowFile(file, None))


def _list_of(path: Path) -> Iterator[RawRow]:
    """The rows of a file with one JSON list; `line` counts them from 1."""
    try:
        rows = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}. Is the file complete?") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path}: expected a list of rows, got {type(rows).__name__}.")
    for number, row in enumerate(rows, start=1):
        yield RawRow(RowFile(path, None), number, row)


def read_items(rows: Iterable[RawRow], parse: Callable[[FieldReader, dict[str, Any]], Item]) -> Items:
    """Parse rows; the first that is not as it should be ends it.

    Raises:
        ValueError: a row lacks a field or holds another type, two have one id, or there is none.
    """
    items: dict[str, Item] = {}
    for raw in rows:
        if isinstance(raw.content, BadRowError):
            raise raw.content
        reader = FieldReader(raw)
        item = parse(reader, raw.content)
        if item.id in items:
            raise reader.bad("id", f"{item.id!r} is the id of an earlier row as well")
        items[item.id] = item
    if not items:
        raise ValueError("--benchmark_path: there is no row in it.")
    return Items(list(items.values()))


def id_of(reader: FieldReader, row: dict[str, Any], name: str) -> str:
    """The id of a row, a text or a whole number.

    Raises:
        BadRowError: it is neither.
    """
    value = reader.value(row, name)
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else reader.text(row, name)


def question(text: str) -> tuple[Message, ...]:
    """A prompt of one turn."""
    return (Message("user", text),)


def by(items: Iterable[Item], label: str) -> list[tuple[str, list[Item]]]:
    """Items by the value of a label, in the order of the values."""
    parts: dict[str, list[Item]] = {}
    for item in items:
        parts.setdefault(item.labels[label], []).append(item)
    return sorted(parts.items())
