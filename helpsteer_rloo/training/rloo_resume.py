"""Going on exactly inside a batch of rollouts, and in later epochs."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import trl
from torch import Tensor, nn
from trl.trainer.utils import RepeatSampler

from helpsteer_rloo.training.exact_resume import Position, ResumesExactly

_SAMPLER_FIELDS = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
_REFERENCE = "reference."


class ResumingRLOOTrainer(ResumesExactly, trl.RLOOTrainer):
    """TRL's `RLOOTrainer` with checkpoints that hold the batch of rollouts that is being trained on.

    TRL 1.16 samples another batch when it goes on inside one, of the policy that has moved since.
    """

    @property
    def _inside_a_batch(self) -> bool:
        """Whether the next micro-batch is one more of the batch of rollouts that is being trained on."""
        slices = cast(int, cast(trl.RLOOConfig, self.args).steps_per_generation)
        return self._step % (slices * self.num_iterations) != 0

    def _get_train_sampler(self, dataset: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        sampler = super()._get_train_sampler(dataset)
        return EpochSampler(**{name: getattr(sampler, name) for name in _SAMPLER_FIELDS})

    def _position(self) -> Position:
        position = super()._position()
        position.values["micro_batches"] = self._step
        if self._moving_reference is not None:
            weights = self._moving_reference.state_dict()
            position.tensors |= {f"{_REFERENCE}{name}": tensor for name, tensor in weights.items()}
        if self._buffered_inputs and self._inside_a_batch:
            position.values["buffered"] = len(self._buffered_inputs)
            for number, part in enumerate(self._buffered_inputs):
                position.tensors |= {f"{number}.{name}": tensor for name, tensor in part.items() if tensor is not None}
        return position

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self._step = self.state.global_step * self.args.gradient_accumulation_steps  # unless the checkpoint tells it
        super()._load_rng_state(checkpoint)

    def _go_on_from(self, position: Position) -> None:
        super()._go_on_from(position)
        self._step = position.values["micro_batches"]
        if "buffered" in position.values:
            parts = range(position.values["buffered"])
            self._buffered_inputs: Any = [_named(position.tensors, f"{number}.") for number in parts]

    def _take_over(self, positions: Sequence[Position]) -> None:
        super()._take_over(positions)
        if self._moving_reference is not None:
            self._moving_reference.load_state_dict(_named(positions[0].tensors, _REFERENCE))

    @property
    def _moving_reference(self) -> nn.Module | None:
        """The reference model, if it follows the policy and is therefore not the one that training began with."""
        moves = cast(trl.RLOOConfig, self.args).sync_ref_model and self.ref_model is not None
        return self.accelerator.unwrap_model(self.ref_model) if moves else None


class EpochSampler(RepeatSampler):
    """TRL's order of prompts, with that of an epoch the same whether or not the epochs before it were gone through.

    TRL's sampler draws an epoch's order from a generator that moves on with every epoch, so that a run that goes on
    in its second epoch goes through the order of the first once more.
    """

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is iterated."""
        if not self.shuffle:
            return
        self.generator.manual_seed(cast(int, self.seed))
        for _ in range(epoch):
            torch.randperm(self.num_samples, generator=self.generator)


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, by what comes after it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
