"""A conversation on a terminal, or as lines of JSON. What a model wrote is shown as text and never obeyed."""

import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from helpsteer_rloo.chat.session import Answer, Session, Side, Turn
from helpsteer_rloo.display.console import printable

WIDE = 100
"""Columns from which on answers stand side by side."""
_NAMES: dict[Side, str] = {"after": "trained", "before": "untrained"}
_ENDINGS = {"length": "cut off at the limit", "interrupted": "stopped"}


class Screen(Protocol):
    """Where a conversation is shown."""

    def say(self, message: str) -> None:
        """Say what is no answer."""
        ...

    def show(self, turn: Turn) -> None:
        """Show the answers to a turn."""
        ...

    def hear(self, side: Side, text: str) -> None:
        """Hear what there is of an answer so far."""
        ...

    @contextmanager
    def answering(self) -> Generator[None]:
        """Within, answers are heard."""
        ...


class JsonScreen:
    """One line of JSON a turn on standard output; everything else on standard error."""

    def say(self, message: str) -> None:
        """Say what is no answer."""
        print(printable(message), file=sys.stderr)

    def show(self, turn: Turn) -> None:
        """Print the turn."""
        print(turn.to_line(), flush=True)

    def hear(self, side: Side, text: str) -> None:
        """Pass over what is not finished."""

    @contextmanager
    def answering(self) -> Generator[None]:
        """Nothing is shown before it is finished."""
        yield


class TextScreen:
    """Answers as text, side by side where there is room; on a terminal they are shown while they are drawn."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._heard: dict[Side, str] = {}
        self._live: Live | None = None

    def say(self, message: str) -> None:
        """Say what is no answer."""
        self._console.print(Text(printable(message), style="dim"))

    def show(self, turn: Turn) -> None:
        """Print the answers with their scores, and by how much they differ."""
        if turn.left_out:
            self.say(f"The conversation is too long for the model: its oldest {turn.left_out} turns were left out.")
        both = [_panel(_NAMES[side], answer.text, _about(answer)) for side, answer in turn.answers.items()]
        self._console.print(self._beside(both))
        if turn.differences:
            listed = ", ".join(f"{name} {value:+.3f}" for name, value in turn.differences.items())
            self.say(f"trained less untrained: {listed}")

    def hear(self, side: Side, text: str) -> None:
        """Show what there is of an answer; of a long one the end."""
        if self._live is not None:
            self._heard[side] = text
            self._live.start()  # not before, for a command is not answered
            self._live.update(self._beside([_panel(_NAMES[s], self._end(t), "…") for s, t in self._heard.items()]))

    @contextmanager
    def answering(self) -> Generator[None]:
        """Within, answers are shown as they are drawn, and taken away at the end."""
        self._heard.clear()
        if not self._console.is_terminal:
            yield
            return
        self._live = Live(console=self._console, transient=True, refresh_per_second=8, redirect_stderr=False)
        try:
            yield
        finally:
            self._live.stop()
            self._live = None

    def _end(self, text: str) -> str:
        """The last lines of a text, so that what is drawn stays in sight."""
        lines = max(4, self._console.height // 2 - 4)
        return "\n".join(text[-lines * self._console.width // 4 :].splitlines()[-lines:])

    def _beside(self, parts: list[Panel]) -> RenderableType:
        if self._console.width < WIDE or len(parts) < 2:
            return Group(*parts)
        table = Table.grid(expand=True)
        for _ in parts:
            table.add_column(ratio=1)
        table.add_row(*parts)
        return table


def _panel(title: str, text: str, about: str) -> Panel:
    return Panel(Text(printable(text)), title=title, title_align="left", subtitle=Text(about), subtitle_align="right")


def _about(answer: Answer) -> str:
    """What is known of an answer, in a line."""
    scores = [f"{name} {score:+.3f}" for name, score in answer.scores.items()]
    ending = [_ENDINGS[answer.finish_reason]] if answer.finish_reason in _ENDINGS else []
    return ", ".join([*scores, f"{answer.tokens} tokens", *ending])


def typed_lines(screen: Screen) -> Iterator[str]:
    """Lines as they are typed, up to Ctrl-D. Ctrl-C forgets a line."""
    import readline  # noqa: F401  # pyright: ignore[reportUnusedImport] - gives input() editing and a history

    while True:
        try:
            yield input("you> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            screen.say("Ctrl-D or /quit ends.")
        except UnicodeDecodeError:
            screen.say("That is not UTF-8.")


def read_lines() -> Iterator[str]:
    """Lines of standard input; bytes that are not UTF-8 become what is no text."""
    for line in sys.stdin.buffer:
        yield line.decode("utf-8", "surrogateescape").rstrip("\r\n")


def converse(session: Session, screen: Screen, lines: Iterator[str], *, forgiving: bool) -> None:
    """Take lines until they or the conversation end.

    Args:
        session: The conversation.
        screen: Where it is shown.
        lines: Turns and commands; empty ones are passed over.
        forgiving: Whether a mistake is said and the conversation goes on.

    Raises:
        ValueError: a line is a mistake, unless `forgiving`.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            with screen.answering():
                found = session.take(line)
        except ValueError as error:
            if not forgiving:
                raise ValueError(f"Standard input, line {number}: {error}") from None
            screen.say(str(error))
            continue
        if isinstance(found, Turn):
            screen.show(found)
        elif found:
            screen.say(found)
        if session.ended:
            return
