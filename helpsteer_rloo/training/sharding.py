"""What trainers need where FSDP2, or DeepSpeed, shares the weights out over processes."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import Trainer
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

_FSDP_WEIGHTS = "pytorch_model_fsdp*"
"""In a checkpoint: what accelerate saves under FSDP, in one file or in parts."""


def refuse_lone_loading(trainer: Trainer) -> None:
    """Refuse a setting under which only one process of a machine reads weights from the disk.

    Models that FSDP does not hold, such as a reward model of its own, would be nothing but noise on the others.

    Raises:
        ValueError: it is on.
    """
    plugin: Any = trainer.accelerator.state.fsdp_plugin
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "Set fsdp_cpu_ram_efficient_loading to false, as configs/accelerate/fsdp2.yaml does. With it only the "
            "first process of a machine loads weights, and models that FSDP does not hold are noise on the others."
        )


@contextmanager
def loaded_whole(trainer: Trainer) -> Generator[None]:
    """Within, models are loaded whole, also under DeepSpeed's ZeRO-3.

    It would share out the weights of any model that is loaded, and gather only those of models that it was given.
    """
    args: Any = trainer.args
    config = getattr(args.deepspeed_plugin, "dschf", None) or getattr(args, "hf_deepspeed_config", None)
    if config is None:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(config)


def refuse_other_engine(trainer: Trainer, checkpoint: Path) -> None:
    """Refuse a checkpoint that FSDP saved where it is not used, and one that it did not save where it is.

    Raises:
        ValueError: it is one.
    """
    saved, used = any(checkpoint.glob(_FSDP_WEIGHTS)), trainer.is_fsdp_enabled
    if saved == used:
        return
    were, are = (("with" if fsdp else "without") + " FSDP" for fsdp in (saved, used))
    raise ValueError(
        f"{checkpoint} was saved {were}, and this run is {are}: weights and optimizer lie in other files. Launch it as "
        f"before ({'any number of processes will do' if saved else 'or in one process'}), or give another --output_dir."
    )


def most_of_all(trainer: Trainer, count: int) -> int:
    """The largest of all processes' counts, and 1 at least."""
    counts = trainer.accelerator.gather(torch.tensor([count], device=trainer.accelerator.device))
    return max(1, int(cast(Tensor, counts).max().item()))


def save_finished(trainer: Trainer, directory: str) -> None:
    """Save the model with all its weights in the files that one process would write, to be called by all processes.

    FSDP's checkpoints may be in parts; by that setting, which no checkpoint after this needs, nothing would be saved.
    """
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(directory)
