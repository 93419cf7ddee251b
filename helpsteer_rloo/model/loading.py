"""Loading of tokenizers, policies and reward models, from a directory or the hub, with messages for users."""

import dataclasses
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from helpsteer_rloo import reward_record
from helpsteer_rloo.run_dir import read_json

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
        kwargs["use_safetensors"] = True
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
    for file in ("tokenizer.json", "tokenizer_config.json"):
        read_json(Path(name) / file, _COPY_AGAIN)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, KeyError) as error:  # the latter two: a file that is JSON of another shape
        raise ValueError(_cannot_load("tokenizer", name, error)) from None
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"The tokenizer of {name!r} has no vocabulary: text becomes nothing. {_COPY_AGAIN}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


_COPY_AGAIN = "Copy the model's directory again, with all of its files."


def _cannot_load(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return f"The {what} {name!r} comes with code of its own. If you trust it, give --trust_remote_code true."
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
    """The record of a finished reward model whose weights are there to be loaded.

    Raises:
        ValueError: the directory is not a reward model that this project finished, its record is damaged, or its
            weights are missing, cut short, or in a format that can run code.
    """
    record = reward_record.read_reward_record(directory)
    if record["adapter"]:
        read_json(Path(directory) / "adapter_config.json", _COPY_AGAIN)
        try:
            if PeftConfig.from_pretrained(str(directory)).peft_type is None:
                raise ValueError("it does not say which kind of adapter this is")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{directory}/adapter_config.json cannot be used ({error}). {_COPY_AGAIN}") from None
    check_weights(directory, "adapter_model" if record["adapter"] else "model", needed="score")
    return record


def check_weights(directory: str | Path, stem: str = "model", needed: str | None = None) -> None:
    """Look at the weights of a local model before anything is loaded from it; what they hold is not read.

    Only safetensors are taken: a pickle, which is what `pytorch_model.bin` is, can run code when it is opened.

    Args:
        directory: Of the model.
        stem: Name of its weights, without ending: "model" or "adapter_model".
        needed: Part of the name of a tensor that has to be among them.

    Raises:
        ValueError: there are none, or only as a pickle; a file cannot be read or lies elsewhere; `needed` is missing.
    """
    shapes = weight_shapes(directory, stem)
    if needed is not None and not any(needed in name for name in shapes):
        raise ValueError(
            f"{Path(directory) / stem}.safetensors has no scalar head ({needed!r}), so its scores would be random. "
            "Give --reward_model_path a reward model that reward_model_training.py trained."
        )


def weight_shapes(directory: str | Path, stem: str = "model") -> dict[str, tuple[int, ...]]:
    """Names and shapes of a local model's tensors, from the headers of its safetensors files.

    Raises:
        ValueError: there are no such files, or one cannot be read or lies elsewhere.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(Path(directory), stem):
        try:
            with safe_open(path, "pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{path} cannot be read ({error}). Is the file complete? Copy it again, or train again."
            ) from None
    return shapes


def _weight_files(directory: Path, stem: str) -> list[Path]:
    single, index = directory / f"{stem}.safetensors", directory / f"{stem}.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        names = sorted(set((read_json(index) or {}).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{index}: the file {name!r} is not in the directory of the model; it is not read.")
        return [directory / name for name in names]
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ValueError(
            f"{directory}: the weights are only there as {', '.join(pickles)}, a format that can run code when it is "
            "opened. Convert them with their maker's tools to safetensors, or take a model that has them."
        )
    raise ValueError(f"{directory}: no weights here; expected {single.name}.")


_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def check_base(name: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False) -> None:
    """Look at a local model that training is to start from: its configuration, weights, and vocabulary.

    Raises:
        ValueError: one of them cannot be read, or the tokenizer has more tokens than the model has embeddings.
    """
    if not Path(name).is_dir():
        return
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except _UNREADABLE as error:
        raise ValueError(_cannot_load("configuration of the model", name, error)) from None
    if (Path(name) / "adapter_config.json").exists():
        return  # its weights are those of another model
    embeddings, tokens = config.get_text_config().vocab_size, max(tokenizer.get_vocab().values()) + 1
    if tokens > embeddings:
        raise ValueError(
            f"{name}: the model has a vocabulary of {embeddings}, its tokenizer one of {tokens}; they are not of one "
            "model. Give --model_name_or_path a directory with both."
        )
    _check_fit(name, config)


def _check_fit(name: str, config: PretrainedConfig) -> None:
    """Compare the weights' shapes with those of an empty model; names that only one side has are loading's to judge."""
    found = weight_shapes(name)
    if getattr(config, "quantization_config", None) is not None or getattr(config, "auto_map", None):
        return  # packed weights have shapes of their own, and code of the model's own is not run for a check
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    for tensor, parameter in model.state_dict().items():
        if found.get(tensor, parameter.shape) != tuple(parameter.shape):
            raise ValueError(
                f"{name}: the weights do not fit config.json: {tensor} is {found[tensor]} in model.safetensors, where "
                f"{tuple(parameter.shape)} is expected. {_COPY_AGAIN}"
            )


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
