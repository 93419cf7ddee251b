"""Fields of a JSON file, read with their types; what is missing or of another type is named with its file."""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from helpsteer_rloo.statistics import Estimate

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Node:
    """An object in a JSON file: `file` is what the user calls the file, `place` where in it the object stands.

    >>> Node({"a": {"b": 1}}, "x.json").inside("a").number("b")
    1.0
    """

    content: Mapping[str, Any]
    file: str
    place: str = ""

    def _wrong(self, name: str, expected: str) -> ValueError:
        path = f"{self.place}.{name}" if self.place else name
        return ValueError(f"{self.file}: field {path!r}: expected {expected}.")

    def has(self, name: str) -> bool:
        """Whether there is something in a field."""
        return self.content.get(name) is not None

    def inside(self, name: str) -> "Node":
        """The object in a field."""
        value = self.content.get(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object")
        return Node(cast(dict[str, Any], value), self.file, f"{self.place}.{name}" if self.place else name)

    def maybe(self, name: str) -> "Node | None":
        """The object in a field, if there is one."""
        return self.inside(name) if self.has(name) else None

    def each(self, name: str) -> "Iterator[Node]":
        """The objects of the list in a field."""
        value = self.content.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list")
        for number, one in enumerate(cast(list[Any], value)):
            if not isinstance(one, dict):
                raise self._wrong(f"{name}[{number}]", "an object")
            yield Node(cast(dict[str, Any], one), self.file, f"{self.place}.{name}[{number}]".lstrip("."))

    def names(self) -> list[str]:
        """The fields that hold something."""
        return [name for name in self.content if self.has(name)]

    def _of(self, name: str, kinds: tuple[type[T], ...], expected: str) -> T:
        value = self.content.get(name)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self._wrong(name, expected)
        return value

    def number(self, name: str) -> float:
        """The number in a field."""
        value = self._of(name, (int, float), "a number")
        if not abs(value) <= sys.float_info.max:  # whole numbers may be larger than that
            raise self._wrong(name, "a finite number")
        return float(value)

    def count(self, name: str) -> int:
        """The whole number in a field."""
        return self._of(name, (int,), "a whole number")

    def text(self, name: str, default: str | None = None) -> str:
        """The text in a field."""
        if default is not None and not self.has(name):
            return default
        return self._of(name, (str,), "a text")

    def flag(self, name: str) -> bool:
        """The truth in a field."""
        return self._of(name, (bool,), "true or false")

    def counts(self, name: str) -> dict[str, int]:
        """The object in a field, whose fields are all whole numbers."""
        inner = self.inside(name)
        return {key: inner.count(key) for key in inner.content}

    def numbers(self, name: str) -> list[float]:
        """The list of numbers in a field."""
        value = self.content.get(name)
        if not isinstance(value, list):
            raise self._wrong(name, "a list of numbers")
        inner = Node({str(place): one for place, one in enumerate(cast(list[Any], value))}, self.file, name)
        return [inner.number(str(place)) for place in range(len(inner.content))]

    def estimate(self, name: str) -> Estimate:
        """The estimate in a field: a value, both ends of its interval (null where undefined) and a count."""
        inner = self.inside(name)
        return Estimate(inner.number("value"), *inner.interval("interval"), inner.count("count"))

    def interval(self, name: str) -> tuple[float, float]:
        """Both ends of an interval; NaN for one that is null."""
        value = self.content.get(name)
        ends = cast(list[Any], value) if isinstance(value, list) else []
        usable = (end is None or (type(end) in (int, float) and not abs(end) > sys.float_info.max) for end in ends)
        if len(ends) != 2 or not all(usable):
            raise self._wrong(name, "both ends of an interval")
        return tuple(math.nan if end is None else float(end) for end in ends)  # pyright: ignore[reportReturnType]
