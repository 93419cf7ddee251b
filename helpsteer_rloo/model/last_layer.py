"""The last layer's feed-forward network only where its result is read.

Of a packed row's final hidden states only some are read: those that predict completion tokens, or each continuation's
last. In every layer but the last, the others are needed as keys and values of the next.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from helpsteer_rloo.model.fused_gates import FusedNetwork


def narrow_last_layer(body: nn.Module) -> None:
    """Let a decoder take the keyword `read`, `[C]` different positions in a row; final states elsewhere are of no use.

    Modules, parameters and what is saved stay as they are: only `forward` is shadowed.
    """
    layer = cast(Any, body).layers[-1]
    if "forward" not in layer.__dict__ and isinstance(layer.mlp.__dict__.get("forward"), FusedNetwork | None):
        network = NarrowNetwork(layer.mlp)
        layer.mlp.forward, layer.forward = network, NarrowLayer(layer, network)


@dataclass
class NarrowNetwork:
    """The forward of a feed-forward network, at the positions `read` only if there are any; zero elsewhere."""

    module: nn.Module
    read: Tensor | None = None

    def __call__(self, hidden_1TD: Tensor) -> Tensor:
        """As transformers', `[1, T, D]` to `[1, T, D]`."""
        network = FusedNetwork(self.module)
        if self.read is None:
            return network(hidden_1TD)
        result_1CD = network(hidden_1TD.index_select(1, self.read))
        return torch.zeros_like(hidden_1TD, dtype=result_1CD.dtype).index_copy(1, self.read, result_1CD)


@dataclass(frozen=True)
class NarrowLayer:
    """The forward of the last layer.

    Under checkpointing it computes everything: what is computed again in the backward pass does not come by here.
    """

    module: nn.Module
    network: NarrowNetwork

    def __call__(self, *args: Any, read: Tensor | None = None, **kwargs: Any) -> Any:
        """As transformers', with one keyword more."""
        module = cast(Any, self.module)
        self.network.read = None if module.gradient_checkpointing and module.training else read
        try:
            return type(module).forward(module, *args, **kwargs)
        finally:
            self.network.read = None
