"""The vocabulary head on chosen positions: log-probabilities and entropies in chunks, never `[tokens, V]` at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from helpsteer_rloo.model.exponentials import exp
from helpsteer_rloo.model.products import product
from helpsteer_rloo.model.shadowing import is_hooked
from helpsteer_rloo.model.sharding import stock_type
from helpsteer_rloo.sizes import CHUNK


@dataclass(frozen=True, slots=True)
class TokenLogProbs:
    """Log-probabilities of given tokens, in nats, and entropies of the distributions they come from; `[C]` each.

    Entropies carry no gradient.
    """

    log_probs: Tensor
    entropies: Tensor


def token_log_probs(hidden_CD: Tensor, head: nn.Module, targets_C: Tensor, temperature: float = 1.0) -> TokenLogProbs:
    """Log-probability of each target under softmax(head(hidden) / temperature), in float32 at least.

    Memory beyond inputs and outputs is that of `CHUNK` rows of logits, whatever C. A plain frozen head multiplies twice
    with its weights for value and gradient together: its gradient is computed along with the value, as long as the
    logits exist. Any other head is run again in the backward pass.

    Args:
        hidden_CD: Final hidden states that predict the targets.
        head: Output embeddings: any module from `[C, D]` to `[C, V]`.
        targets_C: Ids of the tokens predicted.
        temperature: Divides the logits.
    """
    if len(targets_C) == 0:
        empty = hidden_CD.sum() * hidden_CD.new_zeros(0)
        return TokenLogProbs(empty, empty.detach())
    if _is_plain(head):
        weight = cast(Tensor, head.weight)
        weight = weight.to(_type_in_training(weight))
        with torch.autocast(hidden_CD.device.type, enabled=False):
            values, entropies = _FrozenHead.apply(hidden_CD.to(weight.dtype), weight, targets_C, temperature)
        return TokenLogProbs(values, entropies)
    # A head that FSDP shards on its own is gathered by its hooks; here it is whole, as `packed_log_probs` sees to.
    multiply = head.forward if isinstance(head, FSDPModule) else head
    parts = [
        checkpoint(_chunk_log_probs, part_CD, multiply, part_C, temperature, use_reentrant=False)
        for part_CD, part_C in zip(hidden_CD.split(CHUNK), targets_C.split(CHUNK), strict=True)
    ]
    return TokenLogProbs(torch.cat([values for values, _ in parts]), torch.cat([entropies for _, entropies in parts]))


def _is_plain(head: nn.Module) -> bool:
    """Whether a head is nothing but a frozen matrix, or no gradient is asked for."""
    if is_hooked(head) and not isinstance(head, FSDPModule):  # whose hooks are gathering, which is seen to
        return False
    if stock_type(head) is not nn.Linear or cast(Tensor | None, head.bias) is not None:
        return False
    return not (head.weight.requires_grad and torch.is_grad_enabled())


def _type_in_training(weight: Tensor) -> torch.dtype:
    """The type of a head's products where it is trained: else a ratio of old and new probabilities would never be 1."""
    device = weight.device.type
    autocast = weight.requires_grad and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else weight.dtype


def _chunk_log_probs(
    hidden_CD: Tensor, head: Callable[[Tensor], Tensor], targets_C: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits_CV = at_least_float32(head(hidden_CD)) / temperature
    log_probs_CV = logits_CV.log_softmax(-1)
    with torch.no_grad():
        entropies_C = -(log_probs_CV.exp() * log_probs_CV).sum(-1)
    return log_probs_CV.gather(-1, targets_C[:, None])[:, 0], entropies_C


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor in float32, unless it is in float64."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class _FrozenHead(torch.autograd.Function):
    """Value, entropy and gradient for hidden states h under a frozen head W, with p = softmax(hW'/t).

    log p(y) = z_y - logsumexp(z) with z = hW'/t;  d log p(y) / dh = (W_y - p W) / t;  H = logsumexp(z) - p . z
    """

    @staticmethod
    def forward(ctx: Any, hidden_CD: Tensor, weight_VD: Tensor, targets_C: Tensor, temperature: float) -> Any:
        wide = torch.float64 if hidden_CD.dtype == torch.float64 else torch.float32
        values_C = hidden_CD.new_empty(len(hidden_CD), dtype=wide)
        entropies_C = torch.empty_like(values_C)
        gradient_CD = torch.empty_like(hidden_CD) if ctx.needs_input_grad[0] else None
        # Two buffers of a chunk's logits exist at one time: this one, and the product.
        buffer_CV = values_C.new_empty(min(CHUNK, len(hidden_CD)), len(weight_VD))
        for start in range(0, len(hidden_CD), CHUNK):
            part = slice(start, start + CHUNK)
            hidden, targets_C1 = hidden_CD[part], targets_C[part, None]
            z_CV, p_CV = product(hidden, weight_VD).to(wide), buffer_CV[: len(hidden)]
            if temperature != 1.0:
                z_CV /= temperature
            z_CV -= z_CV.amax(-1, keepdim=True)
            exp(z_CV, out=p_CV)
            total_C1 = p_CV.sum(-1, keepdim=True)
            log_total_C1 = total_C1.log()
            values_C[part] = (z_CV.gather(-1, targets_C1) - log_total_C1)[:, 0]
            entropies_C[part] = log_total_C1[:, 0] - z_CV.mul_(p_CV).sum(-1) / total_C1[:, 0]
            if gradient_CD is not None:
                # (W_y - p W / total) / t, with the row of W that is meant taken out of the product: p_y - total.
                p_CV.scatter_add_(-1, targets_C1, -total_C1)
                scale_C1 = -1 / (total_C1 * temperature)
                gradient_CD[part] = product(p_CV.to(weight_VD.dtype), weight_VD.T) * scale_C1.to(weight_VD.dtype)
            del z_CV
        ctx.save_for_backward(gradient_CD)
        ctx.mark_non_differentiable(entropies_C)
        return values_C, entropies_C

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient_CD,) = ctx.saved_tensors
        return gradient_CD * gradients[0].to(gradient_CD.dtype)[:, None], None, None, None
