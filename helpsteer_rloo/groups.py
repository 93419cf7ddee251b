"""The records that flow through the program, and the legend of tensor axes.

One record carries both halves of the program: a **prompt group** is one prompt and its N continuations. A preference
pair is N = 2; all labelled pairs on one prompt are one group with more continuations and more preferences; the K
samples that RLOO draws for a prompt are a group with N = K and no preferences. The same group exists twice, as text
(`PromptGroup`) and as token ids (`TokenGroup`); `helpsteer_rloo.rendering` is the only way from one to the other.

Axes of tensors, used as suffixes of their names (`rewards_PN`):

    P   prompts (groups) of a batch
    N   continuations of a prompt (K in RLOO)
    B   sequences of a batch, P·N of them when every group has N continuations
    T   tokens of a sequence or of a packed row
    C   tokens of a continuation
    D   hidden size
    V   vocabulary
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]
Split = Literal["train", "validation"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    >>> Message("user", "Name two trees.")
    Message(role='user', content='Name two trees.')
    """

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Continuation:
    """An answer to a prompt, as text; `ended` is false for one that was cut off and so has no end of turn.

    >>> Continuation("oak, elm")
    Continuation(text='oak, elm', ended=True)
    """

    text: str
    ended: bool = True


@dataclass(frozen=True, slots=True)
class Preference:
    """One label: continuation `chosen` of the group was preferred to continuation `rejected`.

    `strength` is 1 (slightly), 2 (better) or 3 (much better); `row` is the 0-based index of the labelled row in the
    data set, so that a number can be traced to its source; `domain` and `language` are that row's, and
    `chosen_response` says which of its responses, 1 or 2, is the chosen one. `annotators` holds the scores of the
    single annotators, from 3 (the chosen one is much better) to -3 (the rejected one is), where the data set has them.
    `first_row` is the first row on the same prompt, which groups pairs whose prompts were cut differently.

    >>> Preference(chosen=0, rejected=1, strength=2, row=17, domain="general", language="english").strength
    2
    """

    chosen: int
    rejected: int
    strength: int
    row: int
    domain: str
    language: str
    chosen_response: int = 1
    annotators: tuple[int, ...] = ()
    first_row: int | None = None


@dataclass(frozen=True, slots=True)
class PromptGroup:
    """One prompt with its continuations, as text.

    >>> group = PromptGroup(
    ...     prompt=(Message("user", "Name two trees."),),
    ...     continuations=(Continuation("oak, elm"), Continuation("oak")),
    ...     preferences=(Preference(chosen=0, rejected=1, strength=3, row=0, domain="general", language="english"),),
    ... )
    >>> len(group.continuations)
    2
    """

    prompt: tuple[Message, ...]
    continuations: tuple[Continuation, ...]
    preferences: tuple[Preference, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenGroup:
    """One prompt with its continuations, as token ids, ready for a forward pass.

    `prompt_ids` ends with the generation prompt. `continuation_ids[i]` ends with the end-of-turn id if, and only if,
    that continuation really ended. `prompt` is the conversation that was rendered, after any cut.

    >>> group = TokenGroup(prompt=(), prompt_ids=(7, 8), continuation_ids=((1, 2, 99), (3,)))
    >>> group.sequence(0)
    (7, 8, 1, 2, 99)
    """

    prompt: tuple[Message, ...]
    prompt_ids: tuple[int, ...]
    continuation_ids: tuple[tuple[int, ...], ...]
    preferences: tuple[Preference, ...] = ()

    def sequence(self, index: int) -> tuple[int, ...]:
        """Prompt and continuation `index` as one sequence of ids."""
        return self.prompt_ids + self.continuation_ids[index]
