"""The one rendering: messages and responses become token ids here and nowhere else.

A prompt is the chat template with its generation prompt; thinking is off unless asked for. A continuation is the
response's ids, followed by the end-of-turn id if, and only if, the response really ended. Text from data never becomes
a control token: where it spells one (`<|im_end|>`, `<think>`), it is tokenized as plain text. Reward training,
evaluation and RLOO all use this module, so a reward model sees at RLOO time exactly what it saw in training.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from helpsteer_rloo.groups import Message
from helpsteer_rloo.settings.checks import MINIMUM_ROOM

_PRIVATE_USE = range(0xE000, 0xF8FF)
"""Code points without a meaning of their own; one that a text does not use marks places in it."""


class Renderer:
    """Turns messages and responses into token ids with one tokenizer, chat template and thinking mode."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        thinking: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Bind the rendering to a tokenizer; `template_kwargs` replaces the keyword that `thinking` stands for.

        Raises:
            ValueError: the tokenizer has no chat template, or no token that ends a turn.
        """
        if not tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer of {tokenizer.name_or_path!r} has no chat template; "
                "use the chat version of the model, or set one with tokenizer.chat_template."
            )
        self.tokenizer = tokenizer
        self.thinking = thinking
        self.template_kwargs: dict[str, Any] = (
            {"enable_thinking": thinking} if template_kwargs is None else dict(template_kwargs)
        )
        controls = {
            token.content: token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if len(token.content) > 1 and not token.content.isspace()
        }
        self._control_ids = frozenset(controls.values())
        spelled = "|".join(re.escape(name) for name in sorted(controls, key=len, reverse=True))
        self._control = re.compile(f"(?=({spelled}))" if spelled else r"(?!)")
        self.end_of_turn_id = self._find_end_of_turn()
        self._longest = max(map(len, tokenizer.get_vocab()))

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of a conversation up to and including the generation prompt of the next assistant turn.

        Raises:
            ValueError: the conversation is empty, does not end with a user turn, or the template refuses it.
        """
        if not messages or messages[-1].role != "user":
            last = f"ends with a turn of the {messages[-1].role}" if messages else "is empty"
            raise ValueError(f"The prompt {last}; it must end with the user turn that is to be answered.")
        sentinel = _unused_character("".join(message.content for message in messages))
        turns: list[dict[str, str]] = [
            {"role": m.role, "content": self._split_controls(m.content, sentinel)} for m in messages
        ]
        text = self._apply_template(turns, add_generation_prompt=True)
        ids = self._encode(text.split(sentinel))
        self._check_controls(ids, expected=len(self._control.findall(text)))
        return tuple(ids)

    def continuation_ids(self, text: str, *, ended: bool) -> tuple[int, ...]:
        """Ids of a response; the end-of-turn id is appended if, and only if, the response really ended."""
        sentinel = _unused_character(text)
        ids = self._encode(self._split_controls(text, sentinel).split(sentinel))
        self._check_controls(ids, expected=0)
        return tuple(ids) + ((self.end_of_turn_id,) if ended else ())

    @property
    def generation_prompt(self) -> str:
        """What the template puts between a user's turn and the answer to it; Qwen3's holds an empty thinking block."""
        turns = [{"role": "user", "content": "x"}]
        return self._apply_template(turns, add_generation_prompt=True).removeprefix(self._apply_template(turns))

    def split_rendered(self, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Prompt and continuation ids of text that this very template has rendered, as training makes them.

        What spells a control token in it is one: only for text whose author may write them. Padding behind it is left
        out, and blanks behind an end of turn, which templates put there; an end of turn that is missing is not added.

        Raises:
            ValueError: the text does not hold the template's generation prompt, or nothing behind it.
        """
        before, begin, answer = text.rpartition(self.generation_prompt)
        if not begin:
            raise ValueError(
                f"The text does not hold {self.generation_prompt!r}, by which an answer begins in the reward model's "
                "training: render the prompt with add_generation_prompt, and with thinking as in training."
            )
        continuation = self.until_end(self._encode([answer]))
        if not continuation:
            raise ValueError("There is no answer behind the prompt.")
        return tuple(self._encode([before + begin])), continuation

    def split_ids(self, ids: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The same of ids that this tokenizer made.

        Raises:
            ValueError: an id is none of the vocabulary's, or as `split_rendered`.
        """
        known = max(self.tokenizer.get_vocab().values())
        if not all(0 <= token <= known for token in ids):
            raise ValueError(f"An id is outside of 0 to {known}.")
        begin = self._encode([self.generation_prompt])
        found = [end for end in range(len(begin), len(ids)) if list(ids[end - len(begin) : end]) == begin]
        continuation = self.until_end(ids[found[-1] :]) if found else ()
        if not continuation:
            raise ValueError(f"The ids do not hold those of {self.generation_prompt!r} with an answer behind them.")
        return tuple(ids[: found[-1]]), continuation

    def until_end(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Ids up to the first end of turn that only padding and blanks follow; without one, without the padding."""
        pad, end = self.tokenizer.pad_token_id, self.end_of_turn_id
        kept = len(ids)
        while kept and ids[kept - 1] != end and (ids[kept - 1] == pad or self._is_blank(ids[kept - 1])):
            kept -= 1
        if not kept or ids[kept - 1] != end:
            kept = len(ids)
            while kept and ids[kept - 1] == pad:
                kept -= 1
            return tuple(ids[:kept])
        while kept > 1 and ids[kept - 2] in (end, pad):
            kept -= 1
        return (*ids[: kept - 1], end)

    def _is_blank(self, token: int) -> bool:
        return not str(self.tokenizer.decode([token])).strip()

    def least_tokens(self, text: str) -> int:
        """A number of tokens that a text has at the least, without tokenizing it."""
        return max(-(-len(text) // self._longest), sum(1 for _ in self._control.finditer(text)))

    def text_of(self, continuation_ids: Sequence[int]) -> str:
        """The text of a continuation, without its end of turn; stray control tokens are spelled out."""
        ended = bool(continuation_ids) and continuation_ids[-1] == self.end_of_turn_id
        body = list(continuation_ids[:-1] if ended else continuation_ids)
        return str(self.tokenizer.decode(body, skip_special_tokens=False))

    def fit_prompt(
        self, messages: Sequence[Message], response_tokens: int, max_length: int
    ) -> tuple[tuple[Message, ...], tuple[int, ...]] | None:
        """Cut a prompt from the left, at turn boundaries, until it and a response fit into `max_length` tokens.

        The system turn and the last user turn always stay. If they and the response are still too long together, the
        shortest prompt is returned, and the response is to be cut. `None` means that even the shortest prompt leaves
        less than a `MINIMUM_ROOM`-th of the limit for the response.

        Returns:
            The messages that are left and their ids, or `None`.
        """
        shortened, ids = tuple(messages), self.prompt_ids(messages)
        for candidate in _cuts(messages):
            if len(ids) + response_tokens <= max_length:
                return shortened, ids
            shortened, ids = candidate, self.prompt_ids(candidate)
        room = max_length - len(ids)
        needed = min(response_tokens, max(1, max_length // MINIMUM_ROOM))
        return (shortened, ids) if room >= needed else None

    def fingerprint(self, max_length: int) -> dict[str, str | int | bool]:
        """What decides how text becomes ids, one entry an ingredient, so that a mismatch can be named."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            state: Any = {"class": type(self.tokenizer).__name__, "vocabulary": self.tokenizer.get_vocab()}
        else:
            state = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("truncation", "padding")}
        return {
            "chat_template": _digest(str(self.tokenizer.chat_template)),
            "tokenizer": _digest(json.dumps(state, sort_keys=True)),
            "template_kwargs": json.dumps(self.template_kwargs, sort_keys=True),
            "end_of_turn_id": self.end_of_turn_id,
            "max_length": max_length,
        }

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """The ingredients of a stored `fingerprint` that are others here."""
        current = self.fingerprint(stored["max_length"])
        return [name for name in stored if stored[name] != current.get(name)]

    def _find_end_of_turn(self) -> int:
        """The control token that the template puts behind an assistant turn, or the tokenizer's end of sequence."""
        answer = chr(_PRIVATE_USE[0])
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": answer}]
        text = self._apply_template(turns)
        after = self._encode([text.rpartition(answer)[2]])
        candidates = [token_id for token_id in after if token_id in self._control_ids]
        end = candidates[0] if candidates else self.tokenizer.eos_token_id
        if not isinstance(end, int):
            raise ValueError(f"The tokenizer of {self.tokenizer.name_or_path!r} has no token that ends a turn.")
        return end

    def _apply_template(self, turns: list[dict[str, str]], **kwargs: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **self.template_kwargs, **kwargs))
        except TemplateError as error:
            raise ValueError(
                f"The chat template of {self.tokenizer.name_or_path!r} cannot be used for these turns "
                f"({', '.join(turn['role'] for turn in turns)}): {error}"
            ) from None

    def _split_controls(self, text: str, sentinel: str) -> str:
        """Put the sentinel behind the first character of every spelled-out control token."""
        starts = [match.start() for match in self._control.finditer(text)]
        pieces = [
            text[a:b] for a, b in zip([0, *(s + 1 for s in starts)], [*(s + 1 for s in starts), None], strict=True)
        ]
        return sentinel.join(pieces)

    def _encode(self, pieces: Sequence[str]) -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if piece:
                ids += self.tokenizer(piece, add_special_tokens=False)["input_ids"]
        return ids

    def _check_controls(self, ids: Sequence[int], expected: int) -> None:
        found = sum(token_id in self._control_ids for token_id in ids)
        if found != expected:
            raise ValueError(
                f"The text would become {found} control tokens where the chat template has {expected}; "
                "this tokenizer normalizes the text into control tokens and cannot be used safely."
            )


def _cuts(messages: Sequence[Message]) -> Iterator[tuple[Message, ...]]:
    """Ever shorter versions of a conversation: the oldest exchange goes first, system and last user turns stay."""
    head = tuple(messages[:1]) if messages[0].role == "system" else ()
    body = messages[len(head) :]
    for start in range(1, len(body)):
        if body[start].role == "user":
            yield head + tuple(body[start:])
    yield head + tuple(body[-1:])


def _unused_character(text: str) -> str:
    used = set(text)
    free = next((chr(code) for code in _PRIVATE_USE if chr(code) not in used), None)
    if free is None:
        raise ValueError("The text holds every private-use character there is, so no place in it can be marked.")
    return free


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
