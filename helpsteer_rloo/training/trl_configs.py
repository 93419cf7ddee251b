"""From the values of flags to TRL's configuration objects."""

import dataclasses
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftConfig
from transformers import TrainingArguments
from trl import ModelConfig, get_peft_config, get_quantization_config

from helpsteer_rloo.config import Knobs, Settings
from helpsteer_rloo.model.loading import has_bf16, weight_dtype

Args = TypeVar("Args", bound=TrainingArguments)


def build_args(config_class: type[Args], settings: Settings[Knobs], **fixed: Any) -> Args:
    """The trainer's arguments: the flags given, bf16 where the hardware has it, and what the command fixes."""
    names = {field.name for field in dataclasses.fields(config_class)}
    values = {key: value for key, value in settings.trl.items() if key in names}
    if not values.get("fp16"):
        values.setdefault("bf16", has_bf16())
    return config_class(**{**values, **fixed})


def build_model_config(settings: Settings[Knobs], task_type: str) -> ModelConfig:
    """TRL's model configuration, with LoRA on every linear layer unless `lora_target_modules` says otherwise."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    values = {key: value for key, value in settings.trl.items() if key in names}
    values["lora_task_type"] = task_type
    config = ModelConfig(**values)
    if config.model_name_or_path and Path(config.model_name_or_path).is_dir():
        # An adapter records where its base is; an absolute path can be loaded from any working directory.
        config.model_name_or_path = str(Path(config.model_name_or_path).resolve())
    if config.lora_target_modules is None:
        config.lora_target_modules = "all-linear"  # type: ignore[assignment]
    return config


def model_init_kwargs(config: ModelConfig, given: Any, asked_dtype: str | None) -> dict[str, Any]:
    """Keyword arguments for loading the base model."""
    dtype: torch.dtype = weight_dtype(config.use_peft, asked_dtype)
    kwargs = {
        "revision": config.model_revision,
        "attn_implementation": config.attn_implementation,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return {**kwargs, **(given or {})}


def peft_and_quantization(config: ModelConfig) -> tuple[PeftConfig | None, Any]:
    """The adapter to train, if any, and the quantization of the base, if any."""
    return get_peft_config(config), get_quantization_config(config)
