"""Linear layers for inference: adapters folded in, and on CPUs weights in the layout of oneDNN's matrix products.

Layers that are given the same input (queries, keys and values; gate and up) become one product. The layout is twice as
fast as `torch.nn.functional.linear` for the few rows of a decoding step in float32, and 1.3 to 1.7 times in bfloat16,
where PyTorch lays out the weight anew for every product. Modules stay where they are; only their `forward` is shadowed
for as long as the context lasts.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from helpsteer_rloo.model.fused_linears import FusedLinear, FusedLora
from helpsteer_rloo.model.products import gains_by_layout, laid_out, onednn_product, product
from helpsteer_rloo.model.shadowing import is_hooked
from helpsteer_rloo.sizes import MOST_COPIED_BYTES

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of layers in one module that are given the same input."""

Forward = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Parts:
    """What a linear layer computes: x Wᵀ + b + Σ (x Aᵀ) Bᵀ, the adapters' factors with their scaling in B.

    `sizes` are the outputs of the layers that it stands for.
    """

    weight: Tensor
    bias: Tensor | None
    updates: tuple[tuple[Tensor, Tensor], ...]
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of a copy of the weight."""
        return self.weight.numel() * self.weight.element_size()

    @property
    def merges(self) -> bool:
        """Whether the adapters go into the weight.

        Not in half precision: there a weight moves only if its change is above half its last place, 2^-9 of it, and
        the small changes that an adapter consists of early in training would vanish.
        """
        return bool(self.updates) and self.weight.dtype in (torch.float32, torch.float64)


@contextmanager
def light_linears(modules: tuple[nn.Module, ...], rows: int) -> Generator[Mapping[nn.Module, Forward]]:
    """Let the linear layers within some modules run lighter, without gradients.

    Plain layers and LoRA layers with their active adapters take part. What is of another kind (quantized, offloaded,
    with hooks, another variant of LoRA) runs as it is.

    Args:
        modules: Where to look; a layer may be given itself.
        rows: Rows that most products will have, for the choice of a layout.

    Yields:
        For the first of the layers that became one product, that product: their outputs side by side.
    """
    joined: dict[nn.Module, Forward] = {}
    shadowed: dict[nn.Module, Any] = {}
    bundles = [bundle for top in modules for bundle in _bundles(top)]
    alone = [_parts(bundle[0]) for bundle in bundles if len(bundle) == 1]
    affordable = sum(parts.bytes for parts in alone if parts is not None) <= MOST_COPIED_BYTES
    try:
        for bundle in bundles:
            if not affordable and (len(bundle) > 1 or all(map(_is_fast_enough, bundle))):
                continue
            parts = _joined([_parts(module) for module in bundle])
            if parts is None:
                continue
            packs = gains_by_layout(parts.weight, rows)
            copies = affordable and (parts.merges or packs or len(bundle) > 1)
            if copies or parts.updates:
                forward = _forward(parts, rows if packs else None, copies)
                if len(bundle) > 1:
                    joined[bundle[0]] = forward
                for module, own in zip(bundle, _shared(forward, parts.sizes), strict=True):
                    shadowed[module] = module.__dict__.get("forward")
                    module.__dict__["forward"] = own
        yield joined
    finally:
        for module, fused in shadowed.items():
            if fused is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = fused


def _is_fast_enough(module: nn.Module) -> bool:
    """Whether a layer gains nothing without a copy of its weight: a fused one on a CPU, where products take the time.

    On a GPU every small operation costs as much as another, such as a cast of the adapter's factors at every token.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
    return on_cpu and isinstance(module.__dict__.get("forward"), FusedLora)


def _bundles(module: nn.Module) -> Iterator[tuple[nn.Module, ...]]:
    """Linear layers within a module: first those that share their input, together, then every one alone.

    A layer of a bundle that could be made light as a whole is met again alone, and passed over then.
    """
    if isinstance(module, nn.Linear | LoraLinear):
        yield (module,)
        return
    children = dict(module.named_children())
    for names in SIBLINGS:
        if all(isinstance(children.get(name), nn.Linear | LoraLinear) for name in names):
            yield tuple(children[name] for name in names)
    for child in children.values():
        yield from _bundles(child)


def _parts(module: nn.Module) -> _Parts | None:
    """What a layer computes, if that is all there is to it."""
    if type(module) is nn.Linear and _is_plain(module):
        bias = cast(Tensor | None, module.bias)
        return _Parts(module.weight.detach(), None if bias is None else bias.detach(), (), (len(module.weight),))
    if type(module) is not LoraLinear or not _is_plain(module):
        return None
    base = _parts(module.base_layer)
    if base is None or (module.merged and module.disable_adapters):  # which PEFT unmerges in its forward
        return None
    if module.merged or module.disable_adapters:
        return base
    active = [name for name in module.active_adapters if name in module.lora_A]
    if any(name in module.lora_variant or module.lora_bias[name] for name in active):
        return None
    if any(is_hooked(factors[name]) for name in active for factors in (module.lora_A, module.lora_B)):
        return None
    return replace(base, updates=tuple(_factors(module, name) for name in active))


def _joined(parts: Sequence[_Parts | None]) -> _Parts | None:
    """Layers that are given the same input as one, if they are of one kind."""
    first, *others = parts
    if first is None or not others:
        return first
    found = [part for part in parts if part is not None]
    kinds = {(part.weight.dtype, part.weight.device, part.bias is None, bool(part.updates)) for part in found}
    if len(found) < len(parts) or len(kinds) > 1:
        return None
    updates: tuple[tuple[Tensor, Tensor], ...] = ()
    if first.updates:
        down = torch.cat([down for part in found for down, _ in part.updates])
        up = torch.block_diag(*(torch.cat([up for _, up in part.updates], dim=1) for part in found))
        updates = ((down, up),)
    biases = [part.bias for part in found if part.bias is not None]
    sizes = tuple(size for part in found for size in part.sizes)
    return _Parts(torch.cat([p.weight for p in found]), torch.cat(biases) if biases else None, updates, sizes)


def _shared(product: Forward, sizes: tuple[int, ...]) -> list[Forward]:
    """The parts of one product as the forwards of several layers, which are called one after the other."""
    if len(sizes) == 1:
        return [product]
    given: list[Tensor] = []
    pieces: list[Tensor] = []

    def piece(index: int, x: Tensor) -> Tensor:
        if not given or given[0] is not x:
            given[:], pieces[:] = [x], product(x).split(sizes, dim=-1)
        result = pieces[index]
        if index == len(sizes) - 1:  # let go of the memory
            given.clear()
            pieces.clear()
        return result

    return [partial(piece, index) for index in range(len(sizes))]


def _factors(module: LoraLinear, name: str) -> tuple[Tensor, Tensor]:
    down, up = cast(nn.Linear, module.lora_A[name]), cast(nn.Linear, module.lora_B[name])
    return down.weight.detach(), up.weight.detach() * module.scaling[name]


def _is_plain(module: nn.Module) -> bool:
    return (
        not is_hooked(module)
        and isinstance(module.__dict__.get("forward"), FusedLinear | FusedLora | None)
        and all(p.device.type != "meta" for p in module.parameters())
    )


def _forward(parts: _Parts, rows: int | None, copies: bool) -> Forward:
    """A function that computes the layer; with `rows`, on a copy of the weight laid out for so many."""
    merges = copies and parts.merges
    weight = _merged(parts) if merges else parts.weight
    if not copies or rows is None:
        product = _plain(weight, parts.bias)
        return product if merges or not parts.updates else _with_updates(product, parts)
    return _packed(weight, parts.bias, rows) if merges or not parts.updates else _packed_with_updates(parts, rows)


def _merged(parts: _Parts) -> Tensor:
    weight = parts.weight
    for down, up in parts.updates:
        weight = weight + up.to(weight.dtype) @ down.to(weight.dtype)
    return weight


def _plain(weight: Tensor, bias: Tensor | None) -> Forward:
    return lambda x: product(x, weight, bias)


def _packed(weight: Tensor, bias: Tensor | None, rows: int) -> Forward:
    packed = laid_out(weight, rows)
    return lambda x: onednn_product(x, packed, bias)


def _with_updates(product: Forward, parts: _Parts) -> Forward:
    """The sum x Wᵀ + Σ (x Aᵀ) Bᵀ, the low-rank products in the type of the base, as `FusedLora` computes them."""
    dtype = parts.weight.dtype
    factors = [(down.to(dtype), up.to(dtype).T) for down, up in parts.updates]

    def forward(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        result = product(rows)
        for down, up_RO in factors:
            result = torch.addmm(result, linear(rows, down), up_RO)
        return result.view(*x.shape[:-1], -1).to(x.dtype)

    return forward


def _packed_with_updates(parts: _Parts, rows: int) -> Forward:
    """Computes x Wᵀ + Σ (x Aᵀ) Bᵀ as one product, of x and x Aᵀ side by side with W and B side by side."""
    dtype = parts.weight.dtype
    downs, ups = zip(*parts.updates, strict=True)
    down = _packed(torch.cat(downs).to(dtype), None, rows)
    product = _packed(torch.cat([parts.weight, *(up.to(dtype) for up in ups)], dim=1), parts.bias, rows)
    return lambda x: product(torch.cat([x, down(x)], dim=-1))
