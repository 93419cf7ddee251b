"""What clients send, in the formats that they know, and how it becomes prompts with continuations.

`/v1/score` is this project's own: a conversation and responses to it. `/get_reward` is OpenRLHF's remote reward model,
`/classify` and `/pooling` are vLLM's, all three of text that the client has rendered by the chat template already.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    FailFast,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    model_validator,
)

from helpsteer_rloo.data.fields import NOT_TEXT
from helpsteer_rloo.groups import Message, TokenGroup
from helpsteer_rloo.rendering import Renderer

MOST_ENTRIES = 8192
"""Entries of a list in a request."""
_CHANGES_SCORES = ("truncate_prompt_tokens", "add_special_tokens", "chat_template", "chat_template_kwargs")
"""Options of vLLM's that are not there, and without which its scores would be others."""


@dataclass(frozen=True)
class Reader:
    """Makes ids of what a request holds, unless it is too long to be worth it."""

    renderer: Renderer
    max_length: int

    def conversation(self, turns: "list[ChatMessage]") -> tuple[int, ...]:
        """Ids of a prompt.

        Raises:
            ValueError: it cannot be rendered, or is too long.
        """
        for turn in turns:
            self._refuse_long(turn.content)
        return self.renderer.prompt_ids([Message(turn.role, turn.content) for turn in turns])

    def response(self, text: str, *, ended: bool) -> tuple[int, ...]:
        """Ids of a response.

        Raises:
            ValueError: it has none, or too many.
        """
        self._refuse_long(text)
        ids = self.renderer.continuation_ids(text, ended=ended)
        if not ids:
            raise ValueError("A response is empty and did not end, so that there is nothing to score.")
        return ids

    def rendered(self, text: str) -> TokenGroup:
        """Rendered text.

        Raises:
            ValueError: it is too long, or rendered otherwise than in training.
        """
        self._refuse_long(text)
        prompt, continuation = self.renderer.split_rendered(text)
        return TokenGroup((), prompt, (continuation,))

    def ids(self, ids: list[int]) -> TokenGroup:
        """Ids of rendered text.

        Raises:
            ValueError: as `rendered`, or an id is none.
        """
        self._refuse(len(ids))
        prompt, continuation = self.renderer.split_ids(ids)
        return TokenGroup((), prompt, (continuation,))

    def _refuse_long(self, text: str) -> None:
        self._refuse(self.renderer.least_tokens(text))

    def _refuse(self, tokens: int) -> None:
        if tokens > 2 * self.max_length:  # padding may stand behind it
            limit = f"the reward model was trained on at most {self.max_length}"
            raise ValueError(f"A text has {tokens} tokens or more; {limit}.")


def _is_text(value: str) -> str:
    if NOT_TEXT.search(value):
        raise ValueError("holds a NUL or an unpaired surrogate, which is not text")
    return value


Text = Annotated[StrictStr, AfterValidator(_is_text)]


class _FirstError(FailFast):
    """pydantic's, which a union of types can hold."""

    def __hash__(self) -> int:
        return hash(_FirstError)


_List = (_FirstError(), Field(min_length=1, max_length=MOST_ENTRIES))
"""Of every list: the first wrong entry is enough, since there may be a million."""


class _Request(BaseModel):
    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, given: Any) -> Any:
        if isinstance(given, dict) and (unknown := [name for name in given if name not in cls.model_fields]):
            raise ValueError(f"there is no field {str(unknown[0])[:80]!r} here")
        return given


class ChatMessage(_Request):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: Text


class ScoreRequest(_Request):
    """A conversation that ends with a user's turn, and responses to it; `ended` of a response that was cut off: false.

    `ended` is for all responses, or one a response.
    """

    messages: Annotated[list[ChatMessage], *_List]
    responses: Annotated[list[Text], *_List]
    ended: StrictBool | Annotated[list[StrictBool], *_List] = True
    model: Text | None = None

    def groups(self, reader: Reader) -> list[TokenGroup]:
        """One group.

        Raises:
            ValueError: the conversation cannot be rendered, or `ended` is of another number of responses.
        """
        count = len(self.responses)
        ended = [self.ended] * count if isinstance(self.ended, bool) else self.ended
        if len(ended) != count:
            raise ValueError(f"'ended' has {len(ended)} entries, 'responses' {count}.")
        ids = [reader.response(text, ended=end) for text, end in zip(self.responses, ended, strict=True)]
        return [TokenGroup((), reader.conversation(self.messages), tuple(ids))]


class RewardRequest(BaseModel):
    """OpenRLHF's: `query` is prompt and response together, as the chat template renders them; other keys are ignored.

    Where `prompts` are given, each has to begin its query.
    """

    query: Annotated[list[Text], *_List]
    prompts: Annotated[list[Text], _FirstError(), Field(max_length=MOST_ENTRIES)] | None = None

    def groups(self, reader: Reader) -> list[TokenGroup]:
        """One group a query. A query whose end of turn is missing was cut off, and gains none.

        Raises:
            ValueError: a prompt does not belong to its query, or one was rendered otherwise than in training.
        """
        for place, prompt in enumerate(self.prompts or ()):
            if len(self.prompts or ()) != len(self.query) or not self.query[place].startswith(prompt):
                raise ValueError("'prompts' must have one entry a query, each of which begins its query.")
        return [reader.rendered(query) for query in self.query]


class PoolingRequest(BaseModel):
    """vLLM's: `input` is rendered text or ids, one or several; or `messages`, whose last one is the response.

    With `activation` (also `use_activation`, or `softmax`) false, `/classify` gives the score instead of its sigmoid.
    """

    input: (
        Text
        | Annotated[list[Text], *_List]
        | Annotated[list[StrictInt], *_List]
        | Annotated[list[Annotated[list[StrictInt], *_List]], *_List]
        | None
    ) = None
    messages: Annotated[list[ChatMessage], *_List] | None = None
    model: Text | None = None
    encoding_format: Literal["float"] = "float"
    activation: bool | None = None
    use_activation: bool | None = None
    softmax: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_changes_scores(cls, given: Any) -> Any:
        found = [name for name in _CHANGES_SCORES if isinstance(given, dict) and given.get(name) is not None]
        if found:
            raise ValueError(f"{found[0]} is not supported here")
        return given

    @property
    def activated(self) -> bool:
        """Whether a probability is asked for."""
        return False not in (self.activation, self.use_activation, self.softmax)

    def groups(self, reader: Reader) -> list[TokenGroup]:
        """One group an input.

        Raises:
            ValueError: there is nothing to score, or both of the ways to say what.
        """
        if (self.input is None) == (self.messages is None):
            raise ValueError("Give either 'input' or 'messages'.")
        if self.messages is not None:
            *prompt, response = self.messages
            if response.role != "assistant":
                raise ValueError("The last of 'messages' must be the assistant's: it is what is scored.")
            return [TokenGroup((), reader.conversation(prompt), (reader.response(response.content, ended=True),))]
        inputs: list[Any] = self.input if isinstance(self.input, list) else [self.input]
        if isinstance(inputs[0], int):
            inputs = [inputs]
        return [reader.rendered(one) if isinstance(one, str) else reader.ids(one) for one in inputs]
