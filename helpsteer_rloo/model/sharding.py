"""Models whose weights are shared out over processes by FSDP2, `torch.distributed.fsdp.fully_shard`.

FSDP gathers the weights of a module for as long as its forward or backward pass takes, by hooks that all processes
must come by equally often. Passes without a gradient need no such order: within `whole_weights`, a model is whole on
every process, and ordinary.
"""

from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import nn
from torch.distributed.fsdp import FSDPModule

_FSDP = FSDPModule.__module__.rpartition(".")[0]
"""The package that FSDP's hooks come from."""


def is_sharded(model: nn.Module | None) -> bool:
    """Whether FSDP2 holds the weights of a model, or of a part of it."""
    return model is not None and any(isinstance(module, FSDPModule) for module in model.modules())


def stock_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module without what FSDP2 mixes into it."""
    return next(base for base in type(module).__mro__ if not issubclass(base, FSDPModule))


@contextmanager
def whole_weights(model: nn.Module | None) -> Generator[None]:
    """Within, all weights of a model are on every process, and its modules are of their own classes, without FSDP.

    Processes may then do different work. There is to be no backward pass, and what is written into weights is lost: on
    leaving they are shared out again as they were. A model that is not sharded, or none, is left as it is.

    Every process must enter, since the weights are exchanged there.
    """
    shards = [module for module in model.modules() if isinstance(module, FSDPModule)] if model is not None else []
    modules = [cast(Any, shard) for shard in shards]
    kept = [(module, type(module), module._forward_hooks, module._forward_pre_hooks) for module in modules]
    try:
        for shard in shards:
            shard.unshard()
        for module, _, hooks, pre_hooks in kept:
            module.__class__ = stock_type(module)
            module._forward_hooks, module._forward_pre_hooks = _without_fsdp(hooks), _without_fsdp(pre_hooks)
        yield
    finally:
        for module, sharded_type, hooks, pre_hooks in kept:
            module.__class__, module._forward_hooks, module._forward_pre_hooks = sharded_type, hooks, pre_hooks
        for shard in shards:
            shard.reshard()


def _without_fsdp(hooks: Mapping[int, Callable[..., Any]]) -> OrderedDict[int, Callable[..., Any]]:
    """The hooks that others have attached."""
    return OrderedDict((key, hook) for key, hook in hooks.items() if not hook.__module__.startswith(_FSDP))
