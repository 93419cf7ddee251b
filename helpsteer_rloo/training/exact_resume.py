"""Going on from a checkpoint as if training had never stopped: what transformers and TRL leave out of one."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Trainer

from helpsteer_rloo.model.roles import adapters_read_on_cpu


@dataclass
class Position:
    """Where in its run a trainer stands: values for JSON, and tensors by name."""

    values: dict[str, Any]
    tensors: dict[str, Tensor]


class ResumesExactly(Trainer):
    """To be put before one of TRL's trainers: checkpoints of it also hold its `Position`, a file a process.

    transformers keeps weights, optimizer, scheduler and random states, and so a run that goes on takes the same steps
    where nothing else decides them. It forgets the sums behind the metrics that are logged next.
    """

    _metrics: dict[str, Any]
    _total_train_tokens: int

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with adapters_read_on_cpu(self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with adapters_read_on_cpu(self.model):
            super()._load_best_model()

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        write_position(self._position_file(output_dir), self._position())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is None:
            return
        passes, device = self.args.gradient_accumulation_steps, self.args.device
        path = self._position_file(checkpoint)
        own = read_position(path, device) if path.exists() else None
        if own is not None and own.values.get("passes") == passes:
            self._go_on_from(own)
            return
        others = sorted(Path(checkpoint).glob("position-*-of-*.safetensors"))
        positions = [read_position(other, device) for other in others]
        if positions:
            self._take_over(positions)
        steps = f"steps of {positions[0].values.get('passes')} passes" if positions else "other steps"
        warnings.warn(
            f"{checkpoint} was saved by {len(others)} of this tool's processes in {steps}, and {self.args.world_size} "
            f"go on from it in steps of {passes}. What was trained stays, and so does the order of the data, but not "
            "random states and a batch of rollouts that is not used up.",
            stacklevel=2,
        )

    def _position_file(self, checkpoint: str) -> Path:
        return Path(checkpoint) / f"position-{self.args.process_index}-of-{self.args.world_size}.safetensors"

    def _position(self) -> Position:
        """What a checkpoint is to keep."""
        values = {
            "loss_since_logged": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "metrics": {name: list(found) for name, found in self._metrics["train"].items()},
            "train_tokens": self._total_train_tokens,
            "passes": self.args.gradient_accumulation_steps,
        }
        return Position(values, {})

    def _go_on_from(self, position: Position) -> None:
        """Take over what a checkpoint kept."""
        self._take_over([position])

    def _take_over(self, positions: Sequence[Position]) -> None:
        """Take over what does not depend on the number of processes, from the positions of all or of this one.

        Sums behind metrics are the same on every process but the loss, whose mean is logged.
        """
        losses = [position.values["loss_since_logged"] for position in positions]
        self._tr_loss = torch.tensor(sum(losses) / len(losses), device=self.args.device)
        values = positions[0].values
        self._globalstep_last_logged = values["last_logged"]
        self._metrics["train"].update(values["metrics"])
        self._total_train_tokens = values["train_tokens"]


def write_position(path: Path, position: Position) -> None:
    """Write a position as safetensors, its values in the header."""
    copies = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in position.tensors.items()}
    tensors = {name: copy.copy_(position.tensors[name]) for name, copy in copies.items()}  # which share no memory
    save_file(tensors, path, metadata={"values": json.dumps(position.values)})


def read_position(path: Path, device: torch.device) -> Position:
    """Read a position, its tensors on the given device."""
    with cast(Any, safe_open)(path, framework="pt") as file:
        names: list[str] = file.keys()
        tensors = {name: file.get_tensor(name).to(device) for name in names}
        return Position(json.loads(file.metadata()["values"]), tensors)
