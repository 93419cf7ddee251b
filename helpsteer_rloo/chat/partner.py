"""Who answers in a chat: the trained policy, what it was before, and the reward models that judge their answers."""

import dataclasses
import math
import signal
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Protocol

from helpsteer_rloo.chat.playing import Play
from helpsteer_rloo.chat.session import Answer, Draw, Side
from helpsteer_rloo.groups import Message, TokenGroup
from helpsteer_rloo.model.roles import RewardRole
from helpsteer_rloo.model.rollout import Completion, sequence_seed
from helpsteer_rloo.model.voices import Voice

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a character decodes to whose last bytes are not there yet."""


class Listener(Protocol):
    """Hears answers while they are drawn."""

    def hear(self, side: Side, text: str) -> None:
        """What there is of an answer so far."""
        ...


class Interrupt:
    """Whether Ctrl-C was pressed; a second time it ends the program as ever."""

    def __init__(self) -> None:
        self.pressed = False

    @contextmanager
    def watched(self) -> Generator[None]:
        """Within, the first Ctrl-C is only remembered, so that it stops an answer between two tokens."""
        self.pressed, before = False, signal.getsignal(signal.SIGINT)

        def press(number: int, frame: FrameType | None) -> None:
            self.pressed = True
            signal.signal(signal.SIGINT, before)

        signal.signal(signal.SIGINT, press)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@dataclass(frozen=True)
class ModelPartner:
    """Models that answer and score, the scores of the very ids that were drawn."""

    play: Play
    voices: Mapping[Side, Voice]
    judges: Mapping[str, RewardRole]
    listener: Listener

    def answer(self, messages: Sequence[Message], draw: Draw) -> tuple[int, Mapping[Side, Answer]]:
        """Answer a conversation, cut from the left at turn boundaries as in training.

        Ctrl-C ends the answer that is being drawn, and none is begun behind that.

        Raises:
            ValueError: the last turn alone is too long, or a score is not finite.
        """
        found = self.play.renderer.fit_prompt(messages, 0, self.play.room)
        if found is None:
            raise ValueError(
                f"That turn alone has more than the {self.play.room} tokens that a prompt may have beside an answer of "
                f"{self.play.max_new_tokens} (--max_new_tokens)."
            )
        kept, prompt = found
        interrupt, drawn = Interrupt(), dict[Side, Completion]()
        with interrupt.watched():
            for side in self.voices:
                if not interrupt.pressed:
                    drawn[side] = self._draw(side, prompt, draw, interrupt)
            scores = self._scores(prompt, list(drawn.values()))
        answers: dict[Side, Answer] = {
            side: self._answer(one, {name: own[place] for name, own in scores.items()})
            for place, (side, one) in enumerate(drawn.items())
        }
        return len(messages) - len(kept), answers

    def _draw(self, side: Side, prompt: tuple[int, ...], draw: Draw, interrupt: Interrupt) -> Completion:
        voice, ids = self.voices[side], list[int]()
        sampling = dataclasses.replace(self.play.sampling(voice.ends), temperature=draw.temperature)

        def goes_on(token: int) -> bool:
            ids.append(token)
            self.listener.hear(side, self._text(ids).rstrip(_UNFINISHED))
            return not interrupt.pressed

        return voice.tell(prompt, sequence_seed(draw.seed, draw.number), sampling, goes_on)

    def _scores(self, prompt: tuple[int, ...], drawn: Sequence[Completion]) -> dict[str, list[float]]:
        """By judge the scores of answers to one prompt.

        Raises:
            ValueError: one is not finite.
        """
        group = TokenGroup((), prompt, tuple(one.ids for one in drawn))
        scores = {name: judge.score([group], len(drawn))[0] for name, judge in self.judges.items()}
        for name, own in scores.items():
            if not all(map(math.isfinite, own)):
                raise ValueError(f"The scores of {self.play.judges[name]} are not finite: it is damaged.")
        return scores

    def _answer(self, drawn: Completion, scores: Mapping[str, float]) -> Answer:
        cut = "length" if len(drawn.ids) == self.play.max_new_tokens else "interrupted"
        return Answer(self._text(drawn.body), "stop" if drawn.ended else cut, len(drawn.ids), scores)

    def _text(self, ids: Sequence[int]) -> str:
        return str(self.play.renderer.tokenizer.decode(list(ids)))
