"""One frozen base in three roles: policy, reference and reward model are the same weights with other adapters.

Policy: the adapter that is trained. Reference: adapters off (or a frozen copy of the adapter that training started
from). Reward model: the adapter `REWARD_ADAPTER` and a scalar head beside the model. Where nothing can be shared, each
role is a model of its own behind the same interface.
"""

import copy
import functools
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import base_model, body_of, score_groups
from helpsteer_rloo.model.loading import Base, load_reward_model, read_reward_record

REWARD_ADAPTER, GUARD_ADAPTER = "reward", "guard"
"""Names of adapters that score; those of an ensemble are `reward-2`, `reward-3`, …"""
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_HEAD_WEIGHT = "base_model.model.score.weight"
_FACTORS = (".lora_A.weight", ".lora_B.weight")
_HEADS = {"classifier", "score"}  # what PEFT saves in full under the task type SEQ_CLS, if the model has it


@contextmanager
def acting_as(model: PeftModel, adapter: str | None) -> Generator[None]:
    """Run a model with another adapter, or with none, for inference: in evaluation mode, so without dropout.

    On leaving, also by an exception, the adapters that were active are active again (or switched off again), every
    module is in the mode it was in, and every parameter is trainable or frozen as it was.

    Args:
        model: With at least the adapter named.
        adapter: Its name; None for the bare base.
    """
    first, active = model.active_adapter, list(model.active_adapters)
    adapted = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    off = [module for module in adapted if module.disable_adapters]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        if adapter is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(adapter, inference_mode=True)
            for module in off:
                module.enable_adapters(True)
            yield
    finally:
        model.set_adapter(active[0])
        if len(active) > 1:  # which the model's own method does not take
            cast(Any, model.base_model).set_adapter(active)
        model.active_adapter = first
        for module in off:
            module.enable_adapters(False)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class RewardRole:
    """What scores: a sequence classifier of its own, or a `head` and an `adapter` on a base with other roles too."""

    model: nn.Module
    head: nn.Module | None = None
    adapter: str | None = None

    def score(self, groups: Sequence[TokenGroup], batch_size: int) -> list[list[float]]:
        """Score every continuation, `batch_size` of them in a pass; one list a group."""
        if self.adapter is None:
            return score_groups(self.model, groups, batch_size)
        head = cast(nn.Module, self.head).to(next(self.model.parameters()).device)  # FSDP moves the model later
        with acting_as(cast(PeftModel, self.model), self.adapter):
            return score_groups(self.model, groups, batch_size, head=head)


def can_share(policy: nn.Module, base: Base, directory: str | Path) -> bool:
    """Whether a trained reward model is a plain adapter for the very base that a policy's adapter stands on.

    Adapters that change the base's weights (PiSSA and the like), that need more than low-rank factors (DoRA), or that
    reach beyond the decoder's layers are loaded apart; and so is every other one beside a policy that trains more of
    the base than such factors where the reward model reads it.

    Args:
        policy: The policy, LoRA or not.
        base: Where the policy's base came from, and how its weights are held.
        directory: Of the reward model.
    """
    record = read_reward_record(directory)
    if not isinstance(policy, PeftModel) or not record["adapter"] or Base(**record["base"]) != base:
        return False
    config = PeftConfig.from_pretrained(str(directory))
    if not all(map(_leaves_base_alone, [config, *policy.peft_config.values()])):
        return False
    with safe_open(Path(directory) / _ADAPTER_WEIGHTS, "pt") as file:
        names = [name for name in file.keys() if name != _HEAD_WEIGHT]  # noqa: SIM118 - it is no mapping
    plain = all(".layers." in name and name.endswith(_FACTORS) for name in names)
    layers = cast(nn.Module, cast(Any, body_of(base_model(policy))).layers)
    whole = not any(isinstance(module, AuxiliaryTrainingWrapper) for module in layers.modules())
    return plain and whole and set(cast(LoraConfig, config).modules_to_save or ()) <= _HEADS


def _leaves_base_alone(config: PeftConfig) -> bool:
    """Whether an adapter is low-rank factors, and at most modules of its own in place of some of the base."""
    if not isinstance(config, LoraConfig) or config.init_lora_weights not in (True, False, "gaussian"):
        return False
    return config.bias == "none" and not config.trainable_token_indices


def load_shared_reward(policy: PeftModel, directory: str | Path, name: str = REWARD_ADAPTER) -> RewardRole:
    """Put a trained reward model's adapter on the policy's base under a name, frozen, next to the policy's own.

    Raises:
        ValueError: its weights do not fit the base.
    """
    directory = Path(directory)
    state = load_file(directory / _ADAPTER_WEIGHTS)
    if _HEAD_WEIGHT not in state:
        raise ValueError(f"{directory / _ADAPTER_WEIGHTS}: the scalar head ({_HEAD_WEIGHT}) is missing.")
    head_weight = state.pop(_HEAD_WEIGHT)
    config = copy.copy(PeftConfig.from_pretrained(str(directory)))
    config.task_type, config.inference_mode = None, True
    cast(Any, config).modules_to_save = None
    with _flags_kept(policy):
        policy.add_adapter(name, config)
    try:
        _check_fit(policy, state, directory, name)
    except ValueError:
        policy.delete_adapter(name)
        raise
    set_peft_model_state_dict(policy, state, adapter_name=name)
    device = next(base_model(policy).parameters()).device
    head = nn.Linear(head_weight.shape[1], 1, bias=False, device=device, dtype=head_weight.dtype)
    with torch.no_grad():
        head.weight.copy_(head_weight)
    return RewardRole(policy, head.requires_grad_(False), name)


def load_own_reward(directory: str | Path) -> RewardRole:
    """Load a trained reward model as a model of its own."""
    return RewardRole(load_reward_model(directory)[0])


@contextmanager
def without_reward(model: nn.Module) -> Generator[None]:
    """Let a model save every adapter but the reward models', so that a checkpoint of the policy holds it alone."""
    saved = [n for n in model.peft_config if not _scores(n)] if isinstance(model, PeftModel) else []
    if not isinstance(model, PeftModel) or len(saved) == len(model.peft_config):
        yield
        return
    instance = cast(Any, model)  # a trainer calls its `save_pretrained` without a choice of adapters
    instance.save_pretrained = functools.partial(model.save_pretrained, selected_adapters=saved)
    try:
        yield
    finally:
        del instance.save_pretrained


@contextmanager
def adapters_read_on_cpu(model: Any) -> Generator[None]:
    """Let a model read adapters' files on the CPU; PEFT does so on the first GPU, in whatever process that is."""
    if not isinstance(model, PeftModel):
        yield
        return
    instance = cast(Any, model)  # a trainer calls its `load_adapter` without a choice of device
    instance.load_adapter = functools.partial(model.load_adapter, torch_device="cpu")
    try:
        yield
    finally:
        del instance.load_adapter


def _scores(adapter: str) -> bool:
    return adapter in (REWARD_ADAPTER, GUARD_ADAPTER) or adapter.startswith(f"{REWARD_ADAPTER}-")


@contextmanager
def _flags_kept(model: nn.Module) -> Generator[None]:
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    yield
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def _check_fit(policy: PeftModel, state: Mapping[str, Tensor], directory: Path, name: str) -> None:
    mark = f".{name}."
    expected = {
        name.replace(mark, "."): tuple(parameter.shape) for name, parameter in policy.named_parameters() if mark in name
    }
    found = {name: tuple(tensor.shape) for name, tensor in state.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(
            f"{directory / _ADAPTER_WEIGHTS}: {len(wrong)} of the adapter's tensors do not fit the base, the first is "
            f"{wrong[0]} (base: {expected.get(wrong[0])}, file: {found.get(wrong[0])})."
        )
