"""Loading of tokenizers, policies and reward models, from a directory or the hub, with messages for users."""

import dataclasses
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
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

from helpsteer_rloo.hub import absence, snapshot
from helpsteer_rloo.records import reward_model as reward_record
from helpsteer_rloo.records.weights import COPY_AGAIN, check_weights, weight_shapes
from helpsteer_rloo.rendering import Renderer
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
        if absence(self.name, self.revision) is not None:
            kwargs |= {"local_files_only": True, "adapter_kwargs": {"local_files_only": True}}
        if self.revision is not None:
            kwargs["revision"] = self.revision
        if self.quantization is not None:
            kwargs["quantization_config"] = BitsAndBytesConfig.from_dict(dict(self.quantization))
        return kwargs


def fetch_weights(base: Base) -> None:
    """Download the weights of a base on the hub, which is told of; those who load it afterwards find them here.

    What cannot be fetched is left to them, who say so.
    """
    if Path(base.name).is_dir() or absence(base.name, base.revision) is not None:
        return
    with suppress(HfHubHTTPError, OSError):
        snapshot(base.name, _WEIGHTS, base.revision)


_WEIGHTS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
"""Files that transformers loads weights from."""


def load_tokenizer(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer; a missing pad token becomes the end-of-sequence token.

    Raises:
        ValueError: it cannot be fetched or read.
    """
    for file in ("tokenizer.json", "tokenizer_config.json"):
        read_json(Path(name) / file, COPY_AGAIN)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            local_files_only=absence(name, revision) is not None,
        )
    except (OSError, ValueError, TypeError, KeyError) as error:  # the latter two: a file that is JSON of another shape
        raise ValueError(_cannot_load("tokenizer", name, error)) from None
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise ValueError(f"The tokenizer of {name!r} has no vocabulary: text becomes nothing. {COPY_AGAIN}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _cannot_load(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "trust_remote_code" in str(error):
        return f"The {what} {name!r} comes with code of its own. If you trust it, give --trust_remote_code true."
    if Path(name).is_dir():
        return f"Could not load the {what} in {name}: {reason}\n{COPY_AGAIN}"
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
        read_json(Path(directory) / "adapter_config.json", COPY_AGAIN)
        try:
            if PeftConfig.from_pretrained(str(directory)).peft_type is None:
                raise ValueError("it does not say which kind of adapter this is")
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{directory}/adapter_config.json cannot be used ({error}). {COPY_AGAIN}") from None
    check_weights(directory, "adapter_model" if record["adapter"] else "model", needed="score")
    return record


def check_base(
    name: str, tokenizer: PreTrainedTokenizerBase, *, trust_remote_code: bool = False, samples: bool = False
) -> None:
    """Look at a local model that training is to start from: its configuration, weights, and vocabulary.

    Args:
        name: Of the model; nothing is looked at if that is no directory.
        tokenizer: That goes with it.
        trust_remote_code: Whether its own code may be run.
        samples: Whether it is to write text, and so needs a vocabulary head.

    Raises:
        ValueError: one of them cannot be read, weights are missing, or the tokenizer has more tokens than the model has
            embeddings.
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
    _check_fit(name, config, samples=samples)


def _check_fit(name: str, config: PretrainedConfig, *, samples: bool) -> None:
    """Compare the weights with those of an empty model: their shapes, and where names are plain which there are."""
    found = weight_shapes(name)
    if getattr(config, "quantization_config", None) is not None or getattr(config, "auto_map", None):
        return  # packed weights have shapes of their own, and code of the model's own is not run for a check
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = model.state_dict()
    if config.model_type in _PLAIN and any(tensor.startswith("model.") for tensor in found):
        tied = getattr(model, "all_tied_weights_keys", {})
        needed = [key for key in expected if key not in tied and (samples or key.startswith("model."))]
        if missing := [key for key in needed if key not in found]:
            raise ValueError(
                f"{name}: {len(missing)} weights are missing ({missing[0]}, for one), which would be random. "
                f"{COPY_AGAIN}"
            )
    for tensor, parameter in expected.items():
        if found.get(tensor, parameter.shape) != tuple(parameter.shape):
            raise ValueError(
                f"{name}: the weights do not fit config.json: {tensor} is {found[tensor]} in model.safetensors, where "
                f"{tuple(parameter.shape)} is expected. {COPY_AGAIN}"
            )


_PLAIN = ("llama", "qwen3")
"""Types of models whose weights have the same names in files and in transformers' modules."""


def load_reward_model(directory: str | Path, base: Base | None = None) -> tuple[Model, dict[str, Any]]:
    """Load a reward model this project trained, with its record, ready for scoring.

    Args:
        directory: Where it was saved.
        base: How its weights are to be held, if not as its record says.

    Raises:
        ValueError: the directory is not a reward model of this project, some of its weights are missing, or its base
            model cannot be fetched.
    """
    directory = Path(directory)
    record = read_reward_record(directory)
    base = base or Base(**record["base"])
    try:
        if record["adapter"]:
            model, missing = _classifier(base)
            missing.discard("score.weight")  # which the adapter brings
            model = PeftModel.from_pretrained(cast(Any, model), str(directory), torch_device="cpu")
            missing |= _not_in_file(model, directory)
        else:
            model, missing = _classifier(dataclasses.replace(base, name=str(directory), revision=None))
    except _UNREADABLE as error:
        raise ValueError(_cannot_load("reward model", str(directory), error)) from None
    if missing:
        raise ValueError(
            f"The reward model in {directory} lacks {len(missing)} of its weights ({min(missing)}, for one), which "
            f"would be random. {COPY_AGAIN}"
        )
    return _ready(model), record


def _not_in_file(model: PeftModel, directory: str | Path) -> set[str]:
    """Names of an adapter's weights that its file lacks."""
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    return set(own.keys() - weight_shapes(directory, "adapter_model").keys())


def _classifier(base: Base) -> tuple[Model, set[str]]:
    """A sequence classifier with one score, and the names of the weights that it did not find."""
    fetch_weights(base)
    loader = AutoModelForSequenceClassification.from_pretrained
    with _without_load_report():
        model, report = loader(base.name, num_labels=1, output_loading_info=True, **base.load_kwargs())
    return model, set(report["missing_keys"])


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
    fetch_weights(base)
    try:
        model: Model = AutoModelForCausalLM.from_pretrained(base.name, **base.load_kwargs())
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter), torch_device="cpu")
            if missing := _not_in_file(model, adapter):
                raise ValueError(f"the adapter in {adapter} lacks weights ({min(missing)}, for one). {COPY_AGAIN}")
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


def own_renderer(directory: str, record: Mapping[str, Any], flag: str, *, trusted: bool) -> Renderer:
    """The rendering that a reward model was trained with, on the tokenizer that lies beside it.

    Raises:
        ValueError: that tokenizer renders text otherwise.
    """
    tokenizer = load_tokenizer(directory, trust_remote_code=trusted)
    renderer = Renderer(tokenizer, thinking=record["thinking"])
    if different := renderer.differences(record["rendering"]):
        raise ValueError(
            f"{flag} {directory}: its tokenizer renders text otherwise than in training: "
            f"{', '.join(different)} differ. Copy the directory again."
        )
    return renderer
