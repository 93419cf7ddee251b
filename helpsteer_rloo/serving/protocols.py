"""What clients send, in the formats that they know, and how it becomes prompts with continuations.

`/v1/score` is this project's own: a conversation and responses to it. `/get_reward` is OpenRLHF's remote reward model,
`/classify` and `/pooling` are vLLM's, all three of text that the client has rendered by the chat template already.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr

from helpsteer_rloo.data.fields import NOT_TEXT
from helpsteer_rloo.groups import Message, TokenGroup
from helpsteer_rloo.rendering import Renderer


def _is_text(value: str) -> str:
    if NOT_TEXT.search(value):
        raise ValueError("holds a NUL or an unpaired surrogate, which is not text")
    return value


Text = Annotated[StrictStr, AfterValidator(_is_text)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ChatMessage(_Request):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: Text


class ScoreRequest(_Request):
    """A conversation that ends with a user's turn, and responses to it; `ended` of a response that was cut off: false.

    `ended` is for all responses, or one a response.
    """

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    responses: Annotated[list[Text], Field(min_length=1)]
    ended: StrictBool | list[StrictBool] = True
    model: Text | None = None

    def groups(self, renderer: Renderer) -> list[TokenGroup]:
        """One group.

        Raises:
            ValueError: the conversation cannot be rendered, or `ended` is of another number of responses.
        """
        count = len(self.responses)
        ended = [self.ended] * count if isinstance(self.ended, bool) else self.ended
        if len(ended) != count:
            raise ValueError(f"'ended' has {len(ended)} entries, 'responses' {count}.")
        prompt = renderer.prompt_ids([Message(turn.role, turn.content) for turn in self.messages])
        ids = [renderer.continuation_ids(text, ended=end) for text, end in zip(self.responses, ended, strict=True)]
        return [TokenGroup((), prompt, tuple(ids))]


class RewardRequest(BaseModel):
    """OpenRLHF's: `query` is prompt and response together, as the chat template renders them; other keys are ignored.

    Where `prompts` are given, each begins its query, and they are computed once for all of their queries.
    """

    query: Annotated[list[Text], Field(min_length=1)]
    prompts: list[Text] | None = None

    def groups(self, renderer: Renderer) -> list[TokenGroup]:
        """One group a query. A query whose end of turn is missing was cut off, and gains none.

        Raises:
            ValueError: there is another number of prompts than of queries, or a query is empty.
        """
        if self.prompts and len(self.prompts) != len(self.query):
            raise ValueError(f"'prompts' has {len(self.prompts)} entries, 'query' {len(self.query)}.")
        prompts = self.prompts or [""] * len(self.query)
        return [_rendered(query, prompt, renderer) for query, prompt in zip(self.query, prompts, strict=True)]


class PoolingRequest(BaseModel):
    """vLLM's: `input` is rendered text or ids, one or several; or `messages`, whose last one is the response.

    With `activation` (also `use_activation`, or `softmax`) false, `/classify` gives the score instead of its sigmoid.
    """

    input: Text | list[Text] | list[StrictInt] | list[list[StrictInt]] | None = None
    messages: list[ChatMessage] | None = None
    model: Text | None = None
    encoding_format: Literal["float"] = "float"
    activation: bool | None = None
    use_activation: bool | None = None
    softmax: bool | None = None

    @property
    def activated(self) -> bool:
        """Whether a probability is asked for."""
        return False not in (self.activation, self.use_activation, self.softmax)

    def groups(self, renderer: Renderer) -> list[TokenGroup]:
        """One group an input.

        Raises:
            ValueError: there is nothing to score, or both of the ways to say what.
        """
        if (self.input is None) == (self.messages is None):
            raise ValueError("Give either 'input' or 'messages'.")
        if self.messages is not None:
            *prompt, response = [Message(turn.role, turn.content) for turn in self.messages]
            if response.role != "assistant":
                raise ValueError("The last of 'messages' must be the assistant's: it is what is scored.")
            ids = renderer.continuation_ids(response.content, ended=True)
            return [TokenGroup((), renderer.prompt_ids(prompt), (ids,))]
        inputs: list[Any] = self.input if isinstance(self.input, list) else [self.input]
        if inputs and isinstance(inputs[0], int):
            inputs = [inputs]
        if not inputs:
            raise ValueError("'input' is empty.")
        return [_rendered(one, "", renderer) if isinstance(one, str) else _of_ids(one, renderer) for one in inputs]


def _rendered(query: str, prompt: str, renderer: Renderer) -> TokenGroup:
    """Rendered text, split behind its prompt as training splits it, if that begins it."""
    if prompt and query.startswith(prompt) and len(query) > len(prompt):
        rest = renderer.until_end(renderer.rendered_ids(query[len(prompt) :]))
        if rest:
            return TokenGroup((), renderer.rendered_ids(prompt), (rest,))
    return _of_ids(renderer.rendered_ids(query), renderer)


def _of_ids(ids: Sequence[int], renderer: Renderer) -> TokenGroup:
    """Ids of one sequence, of which no part is known to be the prompt."""
    size = len(renderer.tokenizer)
    if not all(0 <= token < size for token in ids):
        raise ValueError(f"An input has an id outside of 0 to {size - 1}.")
    kept = renderer.until_end(ids)
    if len(kept) < 2:
        raise ValueError("An input is empty, or a single token.")
    return TokenGroup((), kept[:-1], (kept[-1:],))
