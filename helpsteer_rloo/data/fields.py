"""Fields of a row of data, read and checked; what is wrong with one is said with file, line and field."""

import re
import reprlib
from dataclasses import dataclass
from typing import Any, cast, get_args

from helpsteer_rloo.data.sources import BadRowError, RawRow
from helpsteer_rloo.groups import Message, Role

NOT_TEXT = re.compile("[\x00\ud800-\udfff]")
"""What no tokenizer should meet: NUL and unpaired surrogates."""
_LONGEST_VALUE = 40
LONGEST_TEXT = 10_000_000
"""Characters of the longest text that is taken: about 2.5 million tokens, which no model reads; more is damage."""


@dataclass(frozen=True, slots=True)
class FieldReader:
    """Reads the fields of one row. All of its methods raise `BadRowError` for what is not as it should be."""

    raw: RawRow

    def bad(self, name: str, reason: str) -> BadRowError:
        """The error of a field, for the caller to raise."""
        return BadRowError(str(self.raw.file.path), self.raw.line, name, reason)

    def value(self, record: Any, name: str, path: str = "") -> Any:
        """A field of an object, which stands at `path` in the row."""
        if not isinstance(record, dict):
            raise self.bad(path.rstrip("."), f"expected an object, got {type(record).__name__}")
        if name not in record:
            raise self.bad(path + name, "missing")
        return record[name]

    def text(self, record: Any, name: str, path: str = "") -> str:
        """A field that is a text."""
        return self._checked_text(self.value(record, name, path), path + name)

    def texts(self, record: Any, name: str) -> tuple[str, ...]:
        """A field that is a list of texts."""
        values = self.value(record, name)
        if not isinstance(values, list):
            raise self.bad(name, f"expected a list, got {type(values).__name__}")
        return tuple(self._checked_text(value, f"{name}[{number}]") for number, value in enumerate(values))

    def turns(self, record: Any, name: str) -> tuple[Message, ...]:
        """A field that is a conversation: a list of turns with role and content."""
        turns = self.value(record, name)
        if not isinstance(turns, list) or not turns:
            raise self.bad(name, "expected a list of turns with at least one in it")
        messages: list[Message] = []
        for number, turn in enumerate(turns):
            path = f"{name}[{number}]."
            role = self.text(turn, "role", path)
            if role not in get_args(Role):
                raise self.bad(f"{path}role", f"expected one of {', '.join(get_args(Role))}, got {shown(role)}")
            messages.append(Message(cast(Role, role), self.text(turn, "content", path)))
        return tuple(messages)

    def _checked_text(self, value: Any, place: str) -> str:
        if not isinstance(value, str):
            raise self.bad(place, f"expected a string, got {type(value).__name__}")
        if len(value) > LONGEST_TEXT:
            raise self.bad(place, f"holds {len(value)} characters; expected at most {LONGEST_TEXT}")
        if NOT_TEXT.search(value):
            raise self.bad(place, "holds a NUL or an unpaired surrogate, which is not text")
        return value


def shown(value: Any) -> str:
    """A value of data in a message, in one short line."""
    text = reprlib.repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"
