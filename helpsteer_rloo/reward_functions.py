"""Reward functions of the user's own, named `package.module:function`, beside the trained reward model.

They are called as TRL calls its reward functions: with the keywords `prompts`, `completions`, `completion_ids`,
`prompt_ids` and more, for a list with one number a completion, or None where a function has nothing to say of one.
"""

import functools
import hashlib
import importlib
import inspect
import math
import reprlib
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

RewardFunction = Callable[..., Sequence[float | None]]


class RewardError(ValueError):
    """A reward function of the user's failed; the message names it."""


MODEL_REWARD = "reward_model"
"""The name under which the scores of the trained reward model are recorded."""


def load_reward_functions(names: str | None) -> list[RewardFunction]:
    """Import reward functions; modules in the current directory are found as well.

    Args:
        names: Separated by commas; none if empty.

    Raises:
        ValueError: one cannot be found or called, or two have the same name.
    """
    functions = [_load(name) for name in _split(names)]
    known = [MODEL_REWARD]
    for name, function in zip(_split(names), functions, strict=True):
        own = getattr(function, "__name__", None)
        if not isinstance(own, str):
            raise ValueError(f"--reward_functions: {name} has no __name__ to record its rewards under.")
        if own in known:
            raise ValueError(f"--reward_functions: two rewards are called {own!r}; give {name} another __name__.")
        known.append(own)
    return [_checked(function, name) for name, function in zip(_split(names), functions, strict=True)]


def reward_functions_digest(names: str | None) -> str | None:
    """Identity of reward functions: their names and the source of their modules; None if there are none."""
    if not _split(names):
        return None
    digest = hashlib.sha256()
    for name, function in zip(_split(names), load_reward_functions(names), strict=True):
        source = _source_of(inspect.unwrap(function))
        digest.update(name.encode() + (Path(source).read_bytes() if source else b""))
    return digest.hexdigest()[:16]


def _source_of(function: Any) -> str | None:
    """The file of a function, or of the class of an object that can be called; None if it is not written in Python."""
    own = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
    return None if inspect.isbuiltin(own) else inspect.getsourcefile(own)


def check_reward_weights(names: str | None, weights: Sequence[float] | None) -> None:
    """Check that there is one finite weight for the reward model and one for each function, if there are any.

    Raises:
        ValueError: there are more or fewer, or one is not finite.
    """
    sources = [MODEL_REWARD, *_split(names)]
    if weights is not None and len(weights) != len(sources):
        raise ValueError(
            f"--reward_weights has {len(weights)} weights for {len(sources)} rewards: {', '.join(sources)}, in this "
            "order."
        )
    if not all(map(math.isfinite, weights or ())):
        raise ValueError(f"--reward_weights is {' '.join(map(str, weights or ()))}; expected finite numbers.")


def _split(names: str | None) -> list[str]:
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _load(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if not (module_name and attribute):
        raise ValueError(f"--reward_functions: {name!r} is not of the form package.module:function.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # anything can happen in a module of the user's, an exit() among it
        raise ValueError(
            f"--reward_functions: the module of {name} cannot be imported ({type(error).__name__}: {error}); it is "
            f"looked for among the installed packages and in {here}."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"--reward_functions: {module_name} has no function {attribute!r}.")
    return function


def _checked(function: RewardFunction, name: str) -> RewardFunction:
    """The function itself, with a message that names it for whatever goes wrong in it."""
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def checked_later(**keywords: Any) -> list[float | None]:
            with _named(name):
                return _rewards(await function(**keywords), keywords, name)

        return cast(RewardFunction, checked_later)

    @functools.wraps(function)
    def checked(**keywords: Any) -> list[float | None]:
        with _named(name):
            return _rewards(function(**keywords), keywords, name)

    return checked


@contextmanager
def _named(name: str) -> Generator[None]:
    """Tell which function failed; an error of ours is left as it is.

    Raises:
        ValueError: the function raised something, or tried to end the program.
    """
    try:
        yield
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"--reward_functions: {name} failed ({type(error).__name__}: {error}). Mend it and give the same command "
            "again; HELPSTEER_RLOO_DEBUG=1 shows where it happened."
        ) from error


def _rewards(returned: Any, keywords: Mapping[str, Any], name: str) -> list[float | None]:
    """What a function returned, if it is one finite number, or None, a completion."""
    if isinstance(returned, str) or not isinstance(returned, Iterable):
        raise RewardError(f"--reward_functions: {name} returned {type(returned).__name__}; expected a list of numbers.")
    rewards = list(cast("Iterable[Any]", returned))
    completions = keywords.get("completions", keywords.get("completion_ids", ()))
    if len(rewards) != len(completions):
        raise RewardError(
            f"--reward_functions: {name} returned {len(rewards)} rewards for {len(completions)} completions."
        )
    for reward in rewards:
        if reward is not None and not _is_finite(reward):
            shown = reprlib.repr(reward)
            raise RewardError(
                f"--reward_functions: {name} gave {shown} for a completion; expected a finite number or None."
            )
    return rewards


def _is_finite(reward: Any) -> bool:
    try:
        return not isinstance(reward, (str, bytes)) and math.isfinite(reward)
    except (TypeError, OverflowError):
        return False
