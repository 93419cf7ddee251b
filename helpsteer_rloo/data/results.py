"""Rows of a file written again with what was computed of each, line by line, and gone on with after an interruption."""

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer_rloo.data.fields import FieldReader
from helpsteer_rloo.data.helpsteer3 import read_context
from helpsteer_rloo.data.sources import BadRowError, RawRow, RowFile, read_rows, row_count
from helpsteer_rloo.events import Task
from helpsteer_rloo.groups import Message, TokenGroup
from helpsteer_rloo.run_dir import read_json, require_file, require_writable, write_json

ROWS_AT_ONCE = 256
"""Rows that are read, computed on and written together, if nothing else is said."""

Compute = Callable[[Sequence[tuple[RawRow, TokenGroup]]], Iterable[dict[str, Any]]]
"""From rows and what was made of them to the fields that are added, one mapping a row, in order."""


@dataclass(frozen=True)
class Read:
    """A row as it is computed on and what was cut off to make it fit; or what is wrong, and if that is a mistake."""

    group: TokenGroup | None = None
    cut: tuple[str, ...] = ()
    error: str = ""
    stops: bool = False


def read_prompt(raw: RawRow, html_entities: str) -> tuple[Message, ...]:
    """The conversation of a row: its `messages`, or the `context` of HelpSteer3's schema.

    Raises:
        BadRowError: there is none, or it is not as it should be.
    """
    if isinstance(raw.content, BadRowError):
        raise raw.content
    if "context" in raw.content and "messages" not in raw.content:
        return read_context(raw, html_entities)
    return FieldReader(raw).turns(raw.content, "messages")


@dataclass(frozen=True)
class Results:
    """A `.jsonl` file of rows, each with what was computed of it.

    `added` names the fields that are computed, the one first that is null where nothing could be; what a row has under
    these names is not written again. `lack` says of such a row what it is without, and `task` what is done with rows.
    """

    source: Path
    target: Path
    added: tuple[str, ...]
    lack: str
    task: str

    def begin(self, asked: Mapping[str, Any]) -> None:
        """Say beside the output what it is of; refuse one that is of something else.

        Raises:
            ValueError: there is no input, no file can be written, or the output was not begun by this command, or with
                something else asked.
        """
        if not self.source.is_file():
            raise ValueError(f"--input {self.source}: no such file.")
        require_writable(self.target, "--output")
        if self.target.exists():
            require_file(self.target)  # what is there is read, and gone on with
        beside = self.target.with_name(f"{self.target.name}.of.json")
        advice = f"delete it and {self.target}, or give another --output."  # which without it is nobody's
        found, begun = read_json(beside, advice), self.target.exists() and self.target.stat().st_size > 0
        if begun and found is None:
            raise ValueError(f"--output {self.target} is there, and this command did not begin it; give another name.")
        if begun and found is not None and found != asked:
            names = [name for name in {**asked, **found} if asked.get(name) != found.get(name)]
            other = " and ".join(name.replace("_", " ") for name in names)
            raise ValueError(f"--output {self.target} was begun with another {other} ({beside}); give another name.")
        write_json(beside, asked)

    def rest(self, seen: Callable[[Mapping[str, Any]], None]) -> Iterator[RawRow]:
        """The rows that are not in the output yet; a part of a line at its end is cut off.

        Args:
            seen: Called with the added fields of every row that is there.

        Raises:
            ValueError: the output has other rows, or the input cannot be read.
        """
        rows = iter(read_rows(RowFile(self.source, None)))
        if self.target.exists():
            with self.target.open("r+b") as file:
                whole = 0
                for number, line in enumerate(file, start=1):
                    if not line.endswith(b"\n"):
                        break
                    raw, added = next(rows, None), self._added_before(line)
                    if raw is None or added is None or self.line(raw, added).encode() + b"\n" != line:
                        raise ValueError(
                            f"--output {self.target}, line {number}: is not of this input; give another name."
                        )
                    seen(added)
                    whole += len(line)
                file.truncate(whole)
        return rows

    def write(
        self,
        rows: Iterator[RawRow],
        read: Callable[[RawRow], Read],
        compute: Compute,
        seen: Callable[[Mapping[str, Any]], None],
        *,
        at_once: int = ROWS_AT_ONCE,
        skip_bad_rows: bool,
    ) -> None:
        """Append rows with what is computed of them, `at_once` together.

        Raises:
            ValueError: a row is not as it should be, unless `skip_bad_rows`.
        """
        done = self._rows_before()
        task = Task(self.task, row_count(RowFile(self.source, None)), done, unit="rows")
        try:
            with self.target.open("a", encoding="utf-8") as output:
                while part := list(itertools.islice(rows, at_once)):
                    found = [self._explained(raw, read) for raw in part]
                    for one in found:
                        if one.stops and not skip_bad_rows:
                            raise ValueError(
                                f"{one.error}\nMend the row and give the command again, or --skip_bad_rows."
                            )
                    for raw, added in self._added(part, found, compute):
                        seen(added)
                        output.write(self.line(raw, added) + "\n")
                        output.flush()
                        done += 1
                        task.reach(done)
        finally:
            task.end()

    def _added(
        self, part: Sequence[RawRow], found: Sequence[Read], compute: Compute
    ) -> Iterator[tuple[RawRow, dict[str, Any]]]:
        """The rows of a part, each with what is added to it."""
        good = [(raw, one.group) for raw, one in zip(part, found, strict=True) if one.group is not None]
        computed = iter(compute(good) if good else ())
        for raw, one in zip(part, found, strict=True):
            if one.group is None:
                yield raw, {self.added[0]: None, "error": one.error}
            else:
                yield raw, {**next(computed), **({"cut": list(one.cut)} if one.cut else {})}

    def _rows_before(self) -> int:
        """Rows that are in the output."""
        if not self.target.exists():
            return 0
        with self.target.open("rb") as file:
            return sum(1 for _ in file)

    def count(self, added: Mapping[str, Any], counts: Counter[str]) -> None:
        """Count a row by what came of it."""
        counts["rows"] += 1
        counts.update(f"{what} cut" for what in added.get("cut", ()))
        if added[self.added[0]] is None:
            counts[f"without {self.lack}"] += 1

    def line(self, raw: RawRow, added: Mapping[str, Any]) -> str:
        """A row as it is written.

        Raises:
            ValueError, TypeError: it holds what JSON does not.
        """
        content = raw.content if isinstance(raw.content, dict) else {"line": raw.line}
        kept = {name: value for name, value in content.items() if name not in self._names}
        try:
            return json.dumps({**kept, **added}, allow_nan=False)
        except (ValueError, TypeError):
            if "error" in added:
                return json.dumps({"line": raw.line, **added}, allow_nan=False)
            raise

    @property
    def _names(self) -> tuple[str, ...]:
        return (*self.added, "cut", "error")

    def _explained(self, raw: RawRow, read: Callable[[RawRow], Read]) -> Read:
        """What is computed on of a row, or what is wrong with it."""
        try:
            found = read(raw)
            self.line(raw, {})  # what cannot be written again
        except BadRowError as error:
            return Read(error=str(error), stops=True)
        except (ValueError, TypeError) as error:  # of the renderer, about the turns, or of JSON
            return Read(error=f"{raw.file.path}, line {raw.line}: {error}", stops=True)
        return found

    def _added_before(self, line: bytes) -> dict[str, Any] | None:
        """What was written beside a row; none if this is no line of this command's."""
        try:
            done = json.loads(line)
        except ValueError:
            return None
        if not isinstance(done, dict) or self.added[0] not in done:
            return None
        return {name: value for name, value in done.items() if name in self._names}


def check_output(source: str, target: str) -> None:
    """Check the names of the files that are read and written.

    Raises:
        ValueError: they are the same, or what is written has another ending.
    """
    if not target.endswith(".jsonl"):
        raise ValueError(f"--output {target}: expected a name that ends in .jsonl.")
    if Path(target).resolve() == Path(source).resolve():
        raise ValueError(f"--output {target} is the file that is read; give another one.")


def check_finite(raw: RawRow, scores: Sequence[float]) -> None:
    """Raise where a score is no number.

    Raises:
        ValueError: one is not finite.
    """
    if not all(map(math.isfinite, scores)):
        raise ValueError(f"{raw.file.path}, line {raw.line}: a score is not finite: the reward model is damaged.")
