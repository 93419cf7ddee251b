"""Another forward for some modules of a model; modules, parameters and what is saved stay as they are."""

from collections.abc import Callable
from typing import Any, cast

from torch import nn


def is_hooked(module: nn.Module) -> bool:
    """Whether something hangs on a module's forward pass, which whoever computes in its place would leave out."""
    hooks: Any = (module._forward_hooks, module._forward_pre_hooks)  # pyright: ignore[reportPrivateUsage]
    return any(hooks)


def shadow(model: nn.Module, kinds: tuple[type[nn.Module], ...], forward: Callable[[nn.Module], Any]) -> int:
    """Give modules of exactly these classes the forward that is made of them, once; how many there were without one."""
    found = [module for module in model.modules() if type(module) in kinds and "forward" not in module.__dict__]
    for module in found:
        cast(Any, module).forward = forward(module)
    return len(found)
