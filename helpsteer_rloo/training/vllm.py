"""What TRL leaves to be wished for between RLOO and vLLM: log-probabilities at sampling, and a base that stays put."""

from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import trl
from accelerate import DistributedType
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from trl.generation.vllm_generation import VLLMGeneration

from helpsteer_rloo.model.rollout import Completion


class TellingVLLM:
    """TRL's way to vLLM, which also remembers what the tokens of the last completions were drawn with.

    TRL sets vLLM up to tell log-probabilities after temperature and truncation (`processed_logprobs`). The weights that
    vLLM is given are those of `merged_parameters`.

    Args:
        generation: Whom every call is passed on to.
        args: Of the trainer; they tell whether the distribution was truncated.
        end_ids: Tokens that end a completion.
    """

    def __init__(self, generation: VLLMGeneration, args: trl.RLOOConfig, end_ids: Collection[int]) -> None:
        self._generation = generation
        self._end_ids = end_ids
        self._whole = args.top_p == 1.0 and not args.top_k and not args.min_p and args.repetition_penalty == 1.0
        self._whole &= not args.generation_kwargs and args.vllm_structured_outputs_regex is None
        generation.logprobs = 0  # the drawn token's alone
        own: Any = generation
        own._iter_named_params = partial(_named_parameters, generation, own._iter_named_params)
        self.drawn: list[Completion] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generation, name)

    def generate(self, *arguments: Any, **named: Any) -> tuple[Any, Any, Any, Any]:
        """Generate as TRL's object does, and keep `drawn`: `None` if vLLM did not tell of every token."""
        result = self._generation.generate(*arguments, **named)
        _, completion_ids, told, _ = result
        self.drawn = None
        if told is not None and all(part and part[0] is not None for parts in told for part in parts):
            self.drawn = [
                self._completion(ids, [part[0] for part in parts])
                for ids, parts in zip(completion_ids, told, strict=True)
            ]
        return result

    def _completion(self, ids: list[int], log_probs: list[float]) -> Completion:
        told = tuple(log_probs)
        return Completion(tuple(ids), ids[-1] in self._end_ids, told, told if self._whole else ())


Named = Iterator[tuple[str, Tensor]]


def _named_parameters(generation: VLLMGeneration, by_trl: Callable[[], Named]) -> Named:
    """What vLLM is given of the policy: as TRL does it, but with no weight of the base written to where that can be."""
    model = cast(Any, generation.model)
    shared_out = generation.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if isinstance(model, PeftModel) and not shared_out and all(map(_is_plain, model.modules())):
        return merged_parameters(model, by_trl)
    return by_trl()


def merged_parameters(model: PeftModel, by_trl: Callable[[], Named]) -> Named:
    """The parameters of a policy with its adapter merged, W + s B A rounded once, by TRL's names.

    TRL merges into the base and then takes the adapter out of it again. In half precision that leaves other weights
    behind, by a last place here and there, at every synchronization; and the base is that of other roles too.

    Args:
        model: With plain LoRA.
        by_trl: The same, by merging.
    """
    adapted = {
        f"{name.removeprefix('base_model.model.')}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, LoraLinear)
    }
    with _never_merged(model):
        for name, value in by_trl():
            layer = adapted.get(name)
            yield name, value if layer is None else _merged(layer)


def _is_plain(module: nn.Module) -> bool:
    """Whether a module is no LoRA layer, or one that adds low-rank products to a weight as it is, and nothing else."""
    if not isinstance(module, LoraLayer):
        return True
    layer: Any = module
    plain = type(layer) is LoraLinear and type(layer.base_layer) is nn.Linear and not layer.merged
    return plain and not layer.lora_variant and not any(layer.lora_bias.values())


def _merged(layer: Any) -> Tensor:
    weight: Tensor = layer.base_layer.weight.detach()
    wide = weight.float()
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            wide = wide + layer.get_delta_weight(adapter).detach().float()
    return wide.to(weight.dtype)


@contextmanager
def _never_merged(model: PeftModel) -> Generator[None]:
    instance = cast(Any, model)
    instance.merge_adapter = instance.unmerge_adapter = lambda *_, **__: None
    try:
        yield
    finally:
        del instance.merge_adapter, instance.unmerge_adapter
