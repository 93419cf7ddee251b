"""A conversation: its turns, what is said about it, and the commands that change it. No model and no terminal in it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from helpsteer_rloo.chat.playing import check_temperature
from helpsteer_rloo.data.fields import NOT_TEXT
from helpsteer_rloo.groups import Message
from helpsteer_rloo.run_dir import require_writable, write_text

Side = Literal["after", "before"]
"""The trained policy, and what it was before."""

HELP = """\
/help              this
/retry             answer the last turn again, by another draw
/before, /after    go on with the untrained policy's last answer, or with the trained one's
/undo              take the last turn back
/reset             begin a new conversation
/system TEXT       set the system turn; without a text there is none
/temperature T     divide the logits by T from now on
/seed N            count draws anew, from seed N
/save FILE         write the conversation, one JSON line a turn with answers and scores
/quit              end, as Ctrl-D does
Ctrl-C stops an answer; it then counts as cut off. A turn that begins with a slash is written with two."""


@dataclass(frozen=True)
class Answer:
    """What a model answered, why it ended ("stop", "length", or "interrupted"), and its scores by reward model."""

    text: str
    finish_reason: str
    tokens: int
    scores: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The answer as it is written; as one of a run's `samples.jsonl`, with more fields."""
        ended = self.finish_reason == "stop"
        return {
            "text": self.text, "ended": ended, "finish_reason": self.finish_reason, "tokens": self.tokens, **self.scores
        }  # fmt: skip


@dataclass(frozen=True)
class Draw:
    """What an answer depends on besides the conversation: the `number`-th draw of a seed, at a temperature."""

    seed: int
    number: int
    temperature: float


@dataclass(frozen=True)
class Turn:
    """A user's turn, the conversation that it ends, the answers to it, and how many turns of it did not fit.

    `taken` is the answer that the conversation goes on with.
    """

    prompt: tuple[Message, ...]
    left_out: int
    draw: Draw
    answers: Mapping[Side, Answer]
    taken: Side = "after"

    @property
    def differences(self) -> dict[str, float]:
        """By reward model the score of the trained policy's answer less the other's, where there are both."""
        if "before" not in self.answers:
            return {}
        after, before = self.answers["after"].scores, self.answers["before"].scores
        return {name: after[name] - before[name] for name in after}

    def to_json(self) -> dict[str, Any]:
        """The turn as it is written."""
        return {
            "prompt": [{"role": message.role, "content": message.content} for message in self.prompt],
            "left_out": self.left_out,
            "seed": self.draw.seed,
            "number": self.draw.number,
            "temperature": self.draw.temperature,
            **{side: answer.to_json() for side, answer in self.answers.items()},
            "differences": self.differences,
            "taken": self.taken,
        }

    def to_line(self) -> str:
        """The same as one line, in ASCII, so that whatever a model wrote is shown by a terminal as it is."""
        return json.dumps(self.to_json(), allow_nan=False)


class Partner(Protocol):
    """Who answers."""

    def answer(self, messages: Sequence[Message], draw: Draw) -> tuple[int, Mapping[Side, Answer]]:
        """How many turns did not fit and were left out, and the answers.

        Raises:
            ValueError: not even the last turn fits.
        """
        ...


class Session:
    """A conversation and its commands.

    The n-th draw since the start, or since /seed, is the draw that an evaluation makes for its n-th prompt.
    """

    def __init__(self, partner: Partner, system: str | None, seed: int, temperature: float) -> None:
        self.turns: list[Turn] = []
        self.ended = False
        self._partner = partner
        self._system = system
        self._next = Draw(seed, 0, temperature)
        self._commands: dict[str, Callable[[str], str | Turn]] = {
            "help": lambda _: HELP,
            "retry": self._retry,
            "before": lambda _: self._take("before"),
            "after": lambda _: self._take("after"),
            "undo": self._undo,
            "reset": self._reset,
            "system": self._set_system,
            "temperature": self._set_temperature,
            "seed": self._set_seed,
            "save": self._save,
            "quit": self._quit,
        }

    def take(self, line: str) -> str | Turn:
        """Take a line: a turn, which is answered, or a command, which says what it did or answers.

        Raises:
            ValueError: it is no text, no command, or one that cannot be carried out now.
        """
        if NOT_TEXT.search(line):
            raise ValueError("That holds a NUL, or bytes that are not UTF-8, and is not text.")
        if not line.startswith("/") or line.startswith("//"):
            return self._ask(line[1:] if line.startswith("//") else line)
        name, _, rest = line[1:].partition(" ")
        if name not in self._commands:
            raise ValueError(f"There is no command /{name} (see /help); a turn that begins so is written //{name}.")
        return self._commands[name](rest.strip())

    def _messages(self, turns: Sequence[Turn]) -> list[Message]:
        """The conversation so far, with the answers that were taken."""
        messages = [Message("system", self._system)] if self._system else []
        for turn in turns:
            messages += [turn.prompt[-1], Message("assistant", turn.answers[turn.taken].text)]
        return messages

    def _ask(self, text: str) -> Turn:
        prompt = (*self._messages(self.turns), Message("user", text))
        left_out, answers = self._partner.answer(prompt, self._next)
        turn = Turn(prompt, left_out, self._next, answers)
        self._next = replace(self._next, number=self._next.number + 1)
        self.turns.append(turn)
        return turn

    def _retry(self, _: str) -> Turn:
        last = self._last()
        self.turns.pop()
        try:
            return self._ask(last.prompt[-1].content)
        except BaseException:
            self.turns.append(last)
            raise

    def _take(self, side: Side) -> str:
        last = self._last()
        if side not in last.answers:
            raise ValueError("There is no such answer to the last turn.")
        self.turns[-1] = replace(last, taken=side)
        return f"The conversation goes on with the {'trained' if side == 'after' else 'untrained'} policy's answer."

    def _undo(self, _: str) -> str:
        self._last()
        self.turns.pop()
        return "The last turn is taken back."

    def _reset(self, _: str) -> str:
        self.turns.clear()
        return "A new conversation."

    def _set_system(self, text: str) -> str:
        self._system = text or None
        return "The system turn is set." if text else "There is no system turn now."

    def _set_temperature(self, text: str) -> str:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(f"/temperature takes a number, not {text!r}.") from None
        check_temperature(value, "/temperature")
        self._next = replace(self._next, temperature=value)
        return f"The temperature is {value:g}."

    def _set_seed(self, text: str) -> str:
        if not (text.isascii() and text.isdigit()):
            raise ValueError(f"/seed takes a whole number from 0 on, not {text!r}.")
        self._next = Draw(int(text), 0, self._next.temperature)
        return f"The seed is {text}."

    def _save(self, name: str) -> str:
        if not name:
            raise ValueError("/save takes the name of a file.")
        path = Path(name).expanduser()
        if not path.parent.is_dir():
            raise ValueError(f"/save {name}: there is no directory {path.parent}.")
        require_writable(path, "/save")
        if path.exists():
            raise ValueError(f"/save {path}: is there already; give another name.")
        write_text(path, "".join(turn.to_line() + "\n" for turn in self.turns))
        return f"{len(self.turns)} turns are in {path}." if len(self.turns) != 1 else f"1 turn is in {path}."

    def _quit(self, _: str) -> str:
        self.ended = True
        return ""

    def _last(self) -> Turn:
        if not self.turns:
            raise ValueError("There is no turn yet.")
        return self.turns[-1]
