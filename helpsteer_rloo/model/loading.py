"""Loading of tokenizers, policies and reward models, from a directory or the hub, with messages for users."""

import dataclasses
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from helpsteer_rloo.run_dir import REWARD_MODEL_RECORD, read_json

Model = PreTrainedModel | PeftModel


@dataclass(frozen=True, slots=True)
class Base:
    """Where a model comes from and how its weights are held; `asdict` of it is stored with what is trained from it.

    `dtype` is the name of a torch type; `quantization` is transformers' quantization configuration as a dictionary.
    """

    name: str
    dtype: str = "float32"
    revision: str | None = None
    trust_remote_code: bool = False
    quantization: dict[str, Any] | None = None

    def load_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`, besides the name."""
        kwargs: dict[str, Any] = {"dtype": getattr(torch, self.dtype), "trust_remote_code": self.trust_remote_code}
        if self.revision is not None:
            kwargs["revision"] = self.revision
        if self.quantization is not None:
            kwargs["quantization_config"] = BitsAndBytesConfig.from_dict(dict(self.quantization))
        return kwargs


def load_tokenizer(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; a missing pad token becomes the end-of-sequence token.

    Raises:
        ValueError: it cannot be fetched or read.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(_cannot_load("tokenizer", name, error)) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _cannot_load(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"Could not fetch the {what} {name!r}: {reason}\n"
        "Check the name and the network, or pass a directory that holds the model: --model_name_or_path PATH."
    )


def accelerator() -> torch.device:
    """The device of this process: its own GPU under a launcher, the only one without, or the CPU."""
    return cast(torch.device, PartialState().device)


def has_bf16() -> bool:
    """Whether the hardware computes in bfloat16 at full speed."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def weight_dtype(use_peft: bool, asked: str | None = None) -> torch.dtype:
    """The type that weights are held in: what was asked for, else bf16 for a frozen base on hardware that has it.

    Weights that are trained in full stay in float32: at a learning rate of 1e-5 most updates are smaller than the
    spacing of bfloat16 (2^-8 relative) and would be rounded away.
    """
    if asked not in (None, "auto"):
        dtype = getattr(torch, str(asked).removeprefix("torch."), None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"--dtype is {asked!r}; expected float32, bfloat16 or float16.")
        return dtype
    return torch.bfloat16 if use_peft and has_bf16() else torch.float32


def read_reward_record(directory: str | Path) -> dict[str, Any]:
    """The record of a finished reward model.

    Raises:
        ValueError: the directory is not a reward model that this project finished.
    """
    record = read_json(Path(directory) / REWARD_MODEL_RECORD)
    if record is None:
        raise ValueError(
            f"{directory}: no {REWARD_MODEL_RECORD} here, so this is not a reward model that reward_model_training.py "
            "finished. Train one first, or give its directory with --reward_model_path."
        )
    missing = [name for name in ("base", "adapter", "thinking", "rendering", "base_model") if name not in record]
    if missing:
        raise ValueError(
            f"{directory}: {REWARD_MODEL_RECORD} lacks {', '.join(missing)}; it is damaged or older than this."
        )
    return record


def load_reward_model(directory: str | Path) -> tuple[Model, dict[str, Any]]:
    """Load a reward model this project trained, with its record, ready for scoring.

    Raises:
        ValueError: the directory is not a reward model of this project, or its base model cannot be fetched.
    """
    directory = Path(directory)
    record = read_reward_record(directory)
    base = Base(**record["base"])
    loader = AutoModelForSequenceClassification.from_pretrained
    try:
        if record["adapter"]:
            with _without_load_report():  # the base has no `score` head; the adapter brings it
                model: Model = loader(base.name, num_labels=1, **base.load_kwargs())
            model = PeftModel.from_pretrained(model, str(directory))
        else:
            model = loader(str(directory), num_labels=1, **dataclasses.replace(base, revision=None).load_kwargs())
    except _UNREADABLE as error:
        raise ValueError(_cannot_load("reward model", str(directory), error)) from None
    return _ready(model), record


@contextmanager
def _without_load_report() -> Generator[None]:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def load_policy(base: Base, adapter: str | Path | None = None) -> Model:
    """Load a causal language model for sampling, with a LoRA adapter on it if one is given.

    Raises:
        ValueError: it cannot be fetched or read.
    """
    try:
        model: Model = AutoModelForCausalLM.from_pretrained(base.name, **base.load_kwargs())
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
    except _UNREADABLE as error:
        raise ValueError(_cannot_load("model", base.name, error)) from None
    return _ready(model)


def _ready(model: Model) -> Model:
    module = cast(nn.Module, model)
    quantized = getattr(model, "quantization_method", None) is not None  # placed by its loader, and not to be moved
    return cast(Model, (module if quantized else module.to(accelerator())).eval())


def end_ids(model: Model, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a completion: those of the generation configuration, and the tokenizer's."""
    declared = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [declared] if isinstance(declared, int) else list(declared or [])
    own = cast(int, tokenizer.eos_token_id)
    return ids if own in ids else [own, *ids]


_UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError)
"""What loading raises for weights that are missing, cut short, or of another shape than the configuration says."""
