"""`helpsteer-rloo export`: a trained reward model or policy as other programs load it, and on the hub."""

import dataclasses
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_rloo.config import CommandSpec, Settings
from helpsteer_rloo.console import say
from helpsteer_rloo.parsing import parse_command
from helpsteer_rloo.reward_record import DTYPES, check_base_record, check_reward_model
from helpsteer_rloo.run_dir import (
    HELDOUT_PROMPTS,
    POLICY_RECORD,
    REWARD_MODEL_RECORD,
    read_record,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from helpsteer_rloo.model.loading import Base, Model
    from helpsteer_rloo.rendering import Renderer

FORMATS = ("merged", "adapter")
PROBES = (
    ("What is the capital of France?", "Paris."),
    ("Write one line about rain.", "It taps on the roof, and the house falls silent to listen."),
    ("Nenne drei Bäume.", "Eiche, Buche, Linde."),
    ("2 + 2 = ?", "4"),
)
"""Conversations that a saved model is compared on with the one in memory."""


@dataclass(frozen=True, kw_only=True)
class ExportKnobs:
    """What is exported, how, and where to."""

    model_dir: str = field(default="", metadata={"help": "Directory of a reward model or a policy."})
    output_dir: str = field(default="", metadata={"help": "Directory to make."})
    format: str = field(
        default="merged",
        metadata={
            "help": "'merged': whole weights, adapters merged in, as transformers and vLLM load them; 'adapter': the "
            "adapter alone."
        },
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Type of merged weights: float32, bfloat16 or float16 (default: the base's)."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Upload the result to this repository of the hub, OWNER/NAME, as well."}
    )
    private: bool = field(default=True, metadata={"help": "Make that repository private, if it is made."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})


EXPORT = CommandSpec(
    program="helpsteer-rloo export",
    description="Export a trained reward model or policy: merged weights that stock transformers and vLLM load, or the "
    "adapter alone; compared in a fresh process with the model it is of.",
    knobs=ExportKnobs,
)


def parse_export(argv: Sequence[str] | None = None) -> Settings[ExportKnobs]:
    """Read the flags of the command."""
    return parse_command(EXPORT, argv, checks=[check_export])


def check_export(settings: Settings[ExportKnobs]) -> None:
    """Check the flags.

    Raises:
        ValueError: one is missing or none that can be.
    """
    own = settings.own
    for name in ("model_dir", "output_dir"):
        if not getattr(own, name):
            raise ValueError(f"--{name} is missing.")
    if own.format not in FORMATS:
        raise ValueError(f"--format is {own.format!r}; expected {' or '.join(FORMATS)}.")
    if own.dtype is not None and own.dtype not in DTYPES[:3]:
        raise ValueError(f"--dtype is {own.dtype!r}; expected {', '.join(DTYPES[:3])}.")
    if own.dtype is not None and own.format == "adapter":
        raise ValueError("--dtype has no effect with --format adapter, which is copied as it is.")
    if own.push_to_hub is not None and own.push_to_hub.count("/") != 1:
        raise ValueError(f"--push_to_hub is {own.push_to_hub!r}; expected OWNER/NAME.")


def run_export(settings: Settings[ExportKnobs]) -> None:
    """Make the directory, prove that it is the model, and upload it if asked to.

    Raises:
        ValueError: there is no model of this project, the output directory is in use, or what was saved is not it.
    """
    own, source, target = settings.own, Path(settings.own.model_dir), Path(settings.own.output_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--output_dir {target} is in use; give one that is empty or does not exist.")
    scores = (source / REWARD_MODEL_RECORD).exists()
    record = _record(own, source, scores=scores)
    target.mkdir(parents=True, exist_ok=True)
    if own.format == "adapter":
        _copy_adapter(source, target, record)
    else:
        difference = _merge(own, source, target, record, scores=scores)
        unit = "scores" if scores else "log-probabilities"
        say(f"Loaded {target} in a fresh process with stock libraries: {unit} agree to {difference:.2g}.")
    say(f"Exported to {target}.")
    if own.push_to_hub is not None:
        say(f"Uploaded to {_upload(target, own.push_to_hub, private=own.private)}")


def _record(own: ExportKnobs, source: Path, *, scores: bool) -> dict[str, Any]:
    """The record of a trained model.

    Raises:
        ValueError: there is none, or its base runs code of its own and the user did not allow it.
    """
    if scores:
        return check_reward_model(source, "--model_dir", trusted=own.trust_remote_code)
    record = read_record(source / POLICY_RECORD, {"base": dict, "adapter": bool})
    if record is None:
        raise ValueError(f"--model_dir {source}: no finished reward model or policy of this project is there.")
    check_base_record(source / POLICY_RECORD, record["base"])
    if record["base"].get("trust_remote_code") and not own.trust_remote_code:
        raise ValueError("The policy's base runs code of its own. If you trust it, give --trust_remote_code true.")
    return record


def _copy_adapter(source: Path, target: Path, record: Mapping[str, Any]) -> None:
    if not record["adapter"]:
        raise ValueError(f"--model_dir {source} was trained in full and has no adapter; give --format merged.")
    base = record["base"]["name"]
    if Path(base).is_dir():
        say(f"The adapter stands on {base}, a directory of this machine; who loads it needs that model too.")
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            shutil.copy2(path, target / path.name)


def _merge(own: ExportKnobs, source: Path, target: Path, record: Mapping[str, Any], *, scores: bool) -> float:
    """Save merged weights with tokenizer, record and card; the largest difference from the model they are of."""
    from helpsteer_rloo.model.loading import Base, load_tokenizer
    from helpsteer_rloo.model.merging import merged

    base = Base(**record["base"])
    base = dataclasses.replace(base, dtype=own.dtype or base.dtype, quantization=None)
    tokenizer = load_tokenizer(str(source), trust_remote_code=base.trust_remote_code)
    model = _loaded(source, base, adapter=record["adapter"], scores=scores)
    sequences = _sequences(_renderer(tokenizer, record))
    expected = _computed(model, sequences, scores=scores)
    whole = merged(model)
    if scores:
        whole.config.problem_type = "regression"  # one number as it is, for programs that would make it a probability
        whole.config.pad_token_id = tokenizer.pad_token_id
    whole.save_pretrained(target)
    tokenizer.save_pretrained(target)
    _write_record(source, target, record, base, scores=scores)
    return _difference(target, sequences, expected, dataclasses.asdict(base), scores=scores)


def _loaded(source: Path, base: "Base", *, adapter: bool, scores: bool) -> "Model":
    from helpsteer_rloo.model.loading import load_policy, load_reward_model

    if scores:
        return load_reward_model(source, base)[0]
    if adapter:
        return load_policy(base, adapter=source)
    return load_policy(dataclasses.replace(base, name=str(source), revision=None))


def _renderer(tokenizer: Any, record: Mapping[str, Any]) -> "Renderer":
    from helpsteer_rloo.rendering import Renderer

    settings = record.get("settings") or {}
    return Renderer(tokenizer, thinking=bool(record.get("thinking", settings.get("thinking", False))))


def _sequences(renderer: "Renderer") -> list[list[int]]:
    from helpsteer_rloo.groups import Message

    return [
        [*renderer.prompt_ids([Message("user", question)]), *renderer.continuation_ids(answer, ended=True)]
        for question, answer in PROBES
    ]


def _computed(model: "Model", sequences: Sequence[Sequence[int]], *, scores: bool) -> list[Any]:
    """Scores, or lists of log-probabilities of the tokens after the first."""
    from helpsteer_rloo.groups import TokenGroup
    from helpsteer_rloo.model.forward import group_log_probs, score_sequences

    if scores:
        return score_sequences(model, sequences, batch_size=1)
    groups = [TokenGroup((), (ids[0],), (tuple(ids[1:]),)) for ids in sequences]
    return [own.tolist() for (own,) in group_log_probs(model, groups, tokens=None)]


def _difference(
    target: Path, sequences: Sequence[Sequence[int]], expected: Sequence[Any], base: Mapping[str, Any], *, scores: bool
) -> float:
    from helpsteer_rloo.evaluation.reload import MERGED, check_log_probs, check_reload

    if scores:
        return check_reload(target, sequences, expected, base, MERGED)
    return check_log_probs(target, sequences, expected, base)


def _write_record(source: Path, target: Path, record: Mapping[str, Any], base: "Base", *, scores: bool) -> None:
    """What stands beside the weights: the record, by which this project's commands know the model, and the card."""
    from helpsteer_rloo.evaluation.cards import policy_card, reward_model_card

    new = {**record, "adapter": False, "base": {**dataclasses.asdict(base), "name": record["base"]["name"]}}
    write_json(target / (REWARD_MODEL_RECORD if scores else POLICY_RECORD), new)
    if scores:
        shutil.copy2(source / HELDOUT_PROMPTS, target / HELDOUT_PROMPTS)
    complete = "by_domain" in (record.get("heldout") or {}) if scores else True
    if complete:
        write_text(target / "README.md", reward_model_card(new) if scores else policy_card(new))


def _upload(directory: Path, name: str, *, private: bool) -> str:
    """Upload a directory to the hub; the address of the commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=name, folder_path=str(directory), commit_message="Export"))
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(
            f"--push_to_hub {name}: {error}\nThe export is in {directory}; log in with `hf auth login`, or upload it "
            "yourself."
        ) from None
