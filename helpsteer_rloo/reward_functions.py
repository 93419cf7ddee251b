"""Reward functions of the user's own, named `package.module:function`, beside the trained reward model.

They are called as TRL calls its reward functions: with the keywords `prompts`, `completions`, `completion_ids`,
`prompt_ids` and more, for a list with one number a completion, or None where a function has nothing to say of one.
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

RewardFunction = Callable[..., Sequence[float | None]]
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
    return functions


def reward_functions_digest(names: str | None) -> str | None:
    """Identity of reward functions: their names and the source of their modules; None if there are none."""
    if not _split(names):
        return None
    digest = hashlib.sha256()
    for name, function in zip(_split(names), load_reward_functions(names), strict=True):
        source = inspect.getsourcefile(inspect.unwrap(function))
        digest.update(name.encode() + (Path(source).read_bytes() if source else b""))
    return digest.hexdigest()[:16]


def check_reward_weights(names: str | None, weights: Sequence[float] | None) -> None:
    """Check that there is one weight for the reward model and one for each function, if there are any.

    Raises:
        ValueError: there are more or fewer.
    """
    sources = [MODEL_REWARD, *_split(names)]
    if weights is not None and len(weights) != len(sources):
        raise ValueError(
            f"--reward_weights has {len(weights)} weights for {len(sources)} rewards: {', '.join(sources)}, in this "
            "order."
        )


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
    except Exception as error:
        raise ValueError(
            f"--reward_functions: the module of {name} cannot be imported ({type(error).__name__}: {error}); it is "
            f"looked for among the installed packages and in {here}."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ValueError(f"--reward_functions: {module_name} has no function {attribute!r}.")
    return function
