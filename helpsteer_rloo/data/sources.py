"""Where rows come from: the hub, a directory, or a file; every row arrives with its file and line."""

import gzip
import hashlib
import json
import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from helpsteer_rloo.groups import Split
from helpsteer_rloo.hub import absence, snapshot
from helpsteer_rloo.settings.knobs import DataKnobs

ENDINGS = (".jsonl", ".jsonl.gz", ".parquet")
LONGEST_LINE = 64 << 20
"""Bytes of the longest line that is read; a damaged archive can hold one that fills the memory."""

_KINDS = {
    b"\x1f\x8b": "a gzip archive",
    b"PAR1": "a parquet file",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
"""What a file is that begins with these bytes; no row in UTF-8 does."""

_LONGEST_NAME = 255
"""Bytes of a file's name, on all common file systems."""

_SPLIT_WORDS: dict[str, Split] = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "validation",
}


class BadRowError(ValueError):
    """A row that cannot be used as it stands: which file and line, which field, and why."""

    def __init__(self, file: str, line: int, field: str, reason: str) -> None:
        """Compose the message from its parts."""
        self.file, self.line, self.field, self.reason = file, line, field, reason
        super().__init__(f"{file}, line {line}, field {field!r}: {reason}")


@dataclass(frozen=True, slots=True)
class RowFile:
    """One file of rows; `split` is what its name says, `None` if it says nothing."""

    path: Path
    split: Split | None


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row before validation: its content, or the error that came of reading it."""

    file: RowFile
    line: int
    content: dict[str, Any] | BadRowError


def locate(knobs: DataKnobs) -> list[RowFile]:
    """Find the files of a data set, downloading them if `dataset_name` is a hub id.

    Raises:
        ValueError: nothing is there, the file type is unknown, two files differ in their endings alone, or the hub
            cannot be reached.
    """
    path = Path(knobs.dataset_name)
    if len(path.name.encode("utf-8", "surrogateescape")) > _LONGEST_NAME:
        raise ValueError(f"--dataset_name {path.name[:40]}…: no such file or directory; no name is as long as this.")
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise ValueError(f"{path}: unknown file type; expected one of {', '.join(ENDINGS)}.")
        return [RowFile(path, None)]
    if path.exists() and not path.is_dir():
        raise ValueError(
            f"--dataset_name {path}: is a pipe or a device, but rows are read more than once; write them to a file."
        )
    directory = path if path.is_dir() else _download(knobs)
    folders = dict.fromkeys((directory / knobs.dataset_subset, directory / "data", directory))
    folder = next((folder for folder in folders if folder.is_dir()), None)
    paths = _paths_of_rows(folder) if folder else []
    if not paths:
        raise ValueError(
            f"{folder or directory}: no file of rows here; expected files ending in {', '.join(ENDINGS)}. "
            f"The first of these folders that exists is read: {', '.join(map(str, folders))}. "
            "Look at --dataset_name and --dataset_subset."
        )
    return [RowFile(path, _split_of_name(path)) for path in paths]


def _paths_of_rows(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.iterdir() if path.name.endswith(ENDINGS) and not path.is_dir())
    for path in paths:
        if path.exists() and not path.is_file():  # reading a pipe or a device may never end
            raise ValueError(f"{path}: is no file of rows but a pipe or a device; move it away.")
    by_name: dict[str, list[str]] = {}
    for path in paths:
        ending = next(ending for ending in ENDINGS if path.name.endswith(ending))
        by_name.setdefault(path.name.removesuffix(ending), []).append(path.name)
    for same in by_name.values():
        if len(same) > 1:
            raise ValueError(
                f"{folder}: {' and '.join(same)} differ in their endings alone, so every row would count "
                f"{len(same)} times. Keep one of them and move the rest away, or pass one file as --dataset_name."
            )
    return paths


def _split_of_name(path: Path) -> Split | None:
    """The split that the first word of the name says; anything but a letter ends a word."""
    return _SPLIT_WORDS.get(re.split(r"[\W\d_]", path.name.lower(), maxsplit=1)[0])


def _download(knobs: DataKnobs) -> Path:
    name = knobs.dataset_name
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(ENDINGS):
        raise ValueError(f"--dataset_name {name}: no such file or directory (and not a hub id of the form owner/name).")
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    patterns = [f"{knobs.dataset_subset}/*{ending}" for ending in ENDINGS]
    try:
        return snapshot(name, patterns, knobs.dataset_revision, "dataset")
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, OSError) as error:
        away = absence(name, knobs.dataset_revision, "dataset")
        reason = away or (str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
        raise ValueError(
            f"Could not fetch the data set {name!r} (subset {knobs.dataset_subset!r}) from the hub: {reason}\n"
            "Check the name and the network, or pass a local copy: --dataset_name PATH, where PATH is a directory with "
            f"{knobs.dataset_subset}/train.jsonl.gz and {knobs.dataset_subset}/validation.jsonl.gz, or one "
            "file ending in " + ", ".join(ENDINGS) + "."
        ) from None


def content_digest(files: list[RowFile]) -> str:
    """A digest of the files' names and bytes: the identity of the source."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.path.name.encode())
        with file.path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def read_rows(file: RowFile) -> Iterator[RawRow]:
    """The rows of a file in order; lines count from 1, blank lines are passed over.

    Raises:
        ValueError: the file as a whole cannot be read (a damaged archive, say).
    """
    try:
        yield from _read_parquet(file) if file.path.name.endswith(".parquet") else _read_lines(file)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file.path}: cannot be read: {error}. Is the file complete?") from None


def row_count(file: RowFile) -> int:
    """How many rows `read_rows` finds in a file, by a look that is quicker; 0 for one that cannot be read."""
    try:
        if file.path.name.endswith(".parquet"):
            import pyarrow.parquet

            return int(pyarrow.parquet.ParquetFile(file.path).metadata.num_rows)
        open_file = gzip.open if file.path.name.endswith(".gz") else open
        with open_file(file.path, "rb") as stream:
            return sum(1 for raw in _lines(cast(BinaryIO, stream)) if raw.strip())
    except (OSError, EOFError, ValueError, zlib.error):  # pyarrow's are ValueErrors
        return 0


def _read_lines(file: RowFile) -> Iterator[RawRow]:
    open_file = gzip.open if file.path.name.endswith(".gz") else open
    with open_file(file.path, "rb") as stream:
        for line, raw in enumerate(_lines(cast(BinaryIO, stream)), start=1):
            if line == 1:
                _refuse_other_kinds(file.path, raw)
            if len(raw) > LONGEST_LINE:
                reason = f"longer than {LONGEST_LINE >> 20} MiB"
                yield RawRow(file, line, BadRowError(str(file.path), line, "(row)", reason))
            elif raw.strip():
                yield RawRow(file, line, _parse(file, line, raw))


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """The lines of a stream; of one that is longer than `LONGEST_LINE` the beginning, which is longer as well."""
    while raw := stream.readline(LONGEST_LINE + 1):
        rest = raw
        while len(rest) > LONGEST_LINE and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST_LINE + 1)
        yield raw


def _refuse_other_kinds(path: Path, first: bytes) -> None:
    kind = next((kind for beginning, kind in _KINDS.items() if first.startswith(beginning)), None)
    if kind is not None:
        raise ValueError(
            f"{path}: looks like {kind}, where its name promises JSON lines in UTF-8; rename it or convert it "
            f"(names end in {', '.join(ENDINGS)})."
        )


def _parse(file: RowFile, line: int, raw: bytes) -> dict[str, Any] | BadRowError:
    try:
        text = raw.rstrip(b"\r\n").decode("utf-8-sig" if line == 1 else "utf-8")
        content = json.loads(text, object_pairs_hook=_without_doubles)
    except UnicodeDecodeError as error:
        return BadRowError(str(file.path), line, "(row)", f"not UTF-8: {error.reason} at byte {error.start}")
    except json.JSONDecodeError as error:
        return BadRowError(
            str(file.path), line, "(row)", f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
        )
    except ValueError as error:  # a whole number of thousands of digits, or a field that stands there twice
        return BadRowError(str(file.path), line, "(row)", f"not JSON: {error}")
    except RecursionError:
        return BadRowError(str(file.path), line, "(row)", "not JSON: nested too deeply")
    if not isinstance(content, dict):
        return BadRowError(str(file.path), line, "(row)", f"expected an object, got {type(content).__name__}")
    return content


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        double = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{reprlib.repr(double)} stands there twice in one object")
    return content


def _read_parquet(file: RowFile) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        line = 0
        for batch in table.iter_batches(batch_size=1024):
            for content in batch.to_pylist():
                line += 1
                yield RawRow(file, line, content)
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:  # the latter two: no Python object for a value
        raise ValueError(f"{file.path}: not a readable parquet file: {error}") from None
