"""What `chat` and `best-of` share: flags of sampling, and a policy with its rendering, its judges and its limits."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_rloo.records.places import doubt_of_base
from helpsteer_rloo.records.policy import PolicySource, read_policy_or_model
from helpsteer_rloo.records.reward_model import check_reward_model
from helpsteer_rloo.settings.checks import prompt_room
from helpsteer_rloo.settings.config import DEFAULT_SEED

if TYPE_CHECKING:
    from helpsteer_rloo.model.rollout import Sampling
    from helpsteer_rloo.rendering import Renderer

LONGEST = 2**20
"""Tokens of the longest conversation, where neither a reward model nor the tokenizer sets a limit."""
NEW_TOKENS = 512
"""Longest answer of a plain model, in tokens, if nothing else is said."""


@dataclass(frozen=True, kw_only=True)
class PlayKnobs:
    """Which policy answers, how it is sampled, and which reward model judges."""

    policy_dir: str = field(
        default="", metadata={"help": "Directory of the policy, or of a plain model that was not trained here."}
    )
    reward_model_dir: str | None = field(
        default=None,
        metadata={"help": "Directory of the reward model (default: the one that the policy was trained against)."},
    )
    max_new_tokens: int | None = field(
        default=None, metadata={"help": "Longest answer in tokens (default: that of the policy's training)."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": "Divides the logits (default: as in the policy's training)."}
    )
    top_p: float | None = field(
        default=None, metadata={"help": "Share of the probability to draw from (default: as in the policy's training)."}
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Tokens to draw from, 0 for all (default: as in the policy's training)."}
    )
    seed: int | None = field(default=None, metadata={"help": "Of all draws (default: that of the policy's training)."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with a model."})


def check_play(own: PlayKnobs) -> None:
    """Check the flags.

    Raises:
        ValueError: one is missing or out of range.
    """
    if not own.policy_dir:
        raise ValueError("--policy_dir is missing.")
    if own.max_new_tokens is not None and own.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens is {own.max_new_tokens}; expected at least 1.")
    if own.temperature is not None:
        check_temperature(own.temperature, "--temperature")
    if own.top_p is not None and not 0 < own.top_p <= 1:
        raise ValueError(f"--top_p is {own.top_p}; expected more than 0 and at most 1.")
    for name in ("top_k", "seed"):
        value = getattr(own, name)
        if value is not None and value < 0:
            raise ValueError(f"--{name} is {value}; expected 0 or more.")


def check_temperature(value: float, name: str) -> None:
    """Check a temperature.

    Raises:
        ValueError: it is not a positive number.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value:g}; expected more than 0, and finite.")


@dataclass(frozen=True)
class Play:
    """A policy as it is played: rendering, reward models by role, limits in tokens, and what a draw depends on.

    A prompt has at most `max_length` tokens less those of the longest answer.
    """

    source: PolicySource
    renderer: "Renderer"
    judges: Mapping[str, Path]
    records: Mapping[str, Mapping[str, Any]]
    max_length: int
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    doubts: Sequence[str] = ()
    """What is to be said first: that something is not what it was in training."""

    @property
    def room(self) -> int:
        """Most tokens of a prompt."""
        return self.max_length - self.max_new_tokens

    def sampling(self, ends: tuple[int, ...]) -> "Sampling":
        """How answers are drawn that end with one of some ids."""
        from helpsteer_rloo.model.rollout import Sampling

        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k, ends)


def policy_of(own: PlayKnobs) -> PolicySource:
    """The policy that the flags name, or the plain model.

    Raises:
        ValueError: as `read_policy_or_model`.
    """
    return read_policy_or_model(own.policy_dir, "--policy_dir", trusted=own.trust_remote_code)


def open_play(own: PlayKnobs, source: PolicySource, judges: Mapping[str, tuple[str, Path | None]]) -> Play:
    """Read what a policy and its judges are, and see whether they fit; no weights are loaded.

    Args:
        own: The flags.
        source: The policy that they name.
        judges: By role the flag that names a reward model, and its directory if there is one.

    Raises:
        ValueError: a directory is not what it should be, a reward model reads text otherwise than the policy, or no
            room is left for a prompt.
    """
    from helpsteer_rloo.model.loading import load_tokenizer
    from helpsteer_rloo.rendering import Renderer

    found = {role: directory for role, (_, directory) in judges.items() if directory is not None}
    records = {
        role: check_reward_model(directory, judges[role][0], trusted=own.trust_remote_code)
        for role, directory in found.items()
    }
    tokenizer = load_tokenizer(own.policy_dir, trust_remote_code=own.trust_remote_code)
    thinking = source.settings.get("thinking", any(record["thinking"] for record in records.values()))
    renderer = Renderer(tokenizer, thinking=bool(thinking))
    for role, record in records.items():
        if different := renderer.differences(record["rendering"]):
            raise ValueError(
                f"{judges[role][0]} {found[role]}: was trained with another rendering than the policy's: "
                f"{', '.join(different)} differ. Give a reward model of the policy's family."
            )
    limits = [record["rendering"]["max_length"] for record in records.values()]
    own_limit = int(_number(source, "max_length", min(tokenizer.model_max_length, LONGEST)))
    max_length = min(limits, default=own_limit)
    most = own.max_new_tokens or int(_number(source, "response_length", min(NEW_TOKENS, max_length // 2)))
    prompt_room(max_length, most, "--max_new_tokens")
    return Play(
        source,
        renderer,
        found,
        records,
        max_length,
        most,
        temperature=float(_given(own.temperature, _number(source, "temperature", 1.0))),
        top_p=float(_given(own.top_p, _number(source, "top_p", 1.0))),
        top_k=int(_given(own.top_k, _number(source, "top_k", 0))),
        seed=int(_given(own.seed, _number(source, "seed", DEFAULT_SEED))),
        doubts=_doubts(source, found, records),
    )


def _doubts(
    source: PolicySource, judges: Mapping[str, Path], records: Mapping[str, Mapping[str, Any]]
) -> Sequence[str]:
    of_judges = (doubt_of_base(records[role], directory) for role, directory in judges.items())
    return [*source.doubts(judges.values()), *(one for one in of_judges if one is not None)]


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _number(source: PolicySource, name: str, default: float) -> float:
    """A number of the settings of a policy's training, which may lack it."""
    value = source.settings.get(name)
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else default
