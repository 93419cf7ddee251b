"""From the values of flags to TRL's configuration objects."""

import dataclasses
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from peft import PeftConfig
from transformers import TrainingArguments
from trl import ModelConfig, get_peft_config, get_quantization_config

from helpsteer_rloo.model.loading import Base, fetch_weights, has_bf16, weight_dtype
from helpsteer_rloo.processes import process_count
from helpsteer_rloo.settings.config import Knobs, Settings
from helpsteer_rloo.settings.flags import FlagValue
from helpsteer_rloo.training.tracking import run_name, trackers

Args = TypeVar("Args", bound=TrainingArguments)


def build_args(config_class: type[Args], settings: Settings[Knobs], **fixed: Any) -> Args:
    """The trainer's arguments: the flags given, bf16 where the hardware has it, and what the command fixes.

    Trackers are told a name of the run that is its own, unless one was given.

    Raises:
        ValueError: the hardware has no bf16, or the processes that were launched do not form a group.
    """
    names = {field.name for field in dataclasses.fields(config_class)}
    values = {key: value for key, value in settings.trl.items() if key in names}
    if not values.get("fp16"):
        values.setdefault("bf16", has_bf16())
    if trackers(values.get("report_to")):
        values.setdefault("run_name", run_name(Path(fixed["output_dir"])))
    try:
        return with_its_processes(config_class(**{**values, **fixed}))
    except ValueError as error:
        if "bf16" not in str(error):
            raise
        raise ValueError(
            "--bf16 true needs a GPU with bfloat16. Leave the flag out, or give --use_cpu true to use it on a CPU."
        ) from error


def with_its_processes(args: Args) -> Args:
    """The same arguments, for one GPU a process and as many processes as were launched.

    Raises:
        ValueError: the processes do not form a group.
    """
    if args.world_size != process_count():
        raise ValueError(
            f"{process_count()} processes were launched, but torch found no GPUs for them to work on together. On "
            "CPUs, give --use_cpu true (in the pipeline --reward.use_cpu true --rloo.use_cpu true)."
        )
    if args.n_gpu > 1:  # transformers would double the batch, and copy the model in every pass
        warnings.warn(f"One of {args.n_gpu} GPUs is used; accelerate launch uses all of them.", stacklevel=2)
        cast(Any, args)._n_gpu = 1
    return args


@contextmanager
def passed_on_explained(trl: Mapping[str, FlagValue]) -> Generator[None]:
    """Name the flags whose mappings a library is handed as they are, where it does not take what it was handed.

    Raises:
        ValueError: it does not.
    """
    try:
        yield
    except TypeError as error:
        given = [f"--{name} {value}" for name, value in trl.items() if isinstance(value, dict) and value]
        if not given:
            raise
        raise ValueError(f"{error}. What is handed on as it is given: {', '.join(given)}.") from error


@dataclass(frozen=True)
class ModelSetup:
    """The model a training starts from: its base, and what TRL's trainers take to load and adapt it."""

    base: Base
    init_kwargs: dict[str, Any]
    peft: PeftConfig | None
    quantization: Any


def _placement(args: Any) -> dict[str, Any]:
    """Where one process on GPUs loads a model: TRL would have it split over all of them, or partly in main memory."""
    return {"device_map": {"": str(args.device)}} if args.device.type == "cuda" and args.world_size == 1 else {}


def build_model_setup(settings: Settings[Knobs], args: Any, task_type: str) -> ModelSetup:
    """The base and adapter that the flags ask for, with LoRA on every linear layer unless they say otherwise.

    The base's weights are fetched, so that the trainer that loads them need not.
    """
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    values = {key: value for key, value in settings.trl.items() if key in names}
    in_few_bits = values.get("load_in_4bit") or values.get("load_in_8bit")
    if in_few_bits and args.device.type == "cpu" and values.get("dtype") in (None, "auto"):
        values["dtype"] = "bfloat16"  # in which bitsandbytes computes there when it infers
    values["dtype"] = str(weight_dtype(bool(values.get("use_peft")), values.get("dtype"))).removeprefix("torch.")
    values["lora_task_type"] = task_type
    config = ModelConfig(**values)
    if config.lora_target_modules is None:
        config.lora_target_modules = cast(Any, "all-linear")
    quantization = get_quantization_config(config)
    base = Base(
        name=_resolved(str(config.model_name_or_path)),
        dtype=str(config.dtype),
        revision=settings.trl.get("model_revision"),
        trust_remote_code=bool(settings.trl.get("trust_remote_code")),
        quantization=quantization.to_dict() if quantization is not None else None,
    )
    fetch_weights(base)
    kwargs = {"revision": base.revision or "main", "attn_implementation": config.attn_implementation}
    kwargs |= {"dtype": base.dtype, "use_safetensors": True, **_placement(args), **(args.model_init_kwargs or {})}
    return ModelSetup(base, kwargs, get_peft_config(config), quantization)


def _resolved(name: str) -> str:
    """An adapter records where its base is; an absolute path can be loaded from any working directory."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name
