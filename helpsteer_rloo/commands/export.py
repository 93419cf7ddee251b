"""`helpsteer-rloo export`: a trained reward model or policy as other programs load it, and on the hub."""

import dataclasses
import math
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_rloo.display.console import say
from helpsteer_rloo.records.policy import read_policy
from helpsteer_rloo.records.reward_model import DTYPES, check_reward_model
from helpsteer_rloo.run_dir import (
    HELDOUT_PROMPTS,
    POLICY_RECORD,
    REWARD_MODEL_RECORD,
    write_json,
    write_text,
)
from helpsteer_rloo.settings.config import CommandSpec, Settings
from helpsteer_rloo.settings.parsing import parse_command

if TYPE_CHECKING:
    from helpsteer_rloo.model.loading import Base, Model
    from helpsteer_rloo.rendering import Renderer

FORMATS = ("merged", "adapter")
_EXACT = 1e-4
"""Largest change of a score or log-probability by merging in float32."""
_COPIED = (
    "adapter_config.json", "adapter_model.safetensors", "tokenizer*", "special_tokens_map.json", "vocab.json",
    "merges.txt", "chat_template*", "README.md", HELDOUT_PROMPTS, REWARD_MODEL_RECORD, POLICY_RECORD,
)  # fmt: skip
"""What belongs to an adapter, the record last."""
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
    "adapter alone. Whole weights are compared in a fresh process with the model they are of.",
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

    It is made beside the place that was named, and moved there when all is done.

    Raises:
        ValueError: there is no model of this project, the output directory is in use, what was saved is not the model,
            or it cannot be uploaded.
    """
    own, target = settings.own, Path(settings.own.output_dir).resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--output_dir {target} is in use; give one that is empty or does not exist.")
    trained = _trained(own)
    if own.push_to_hub is not None:
        _make_repository(own.push_to_hub, private=own.private)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    if own.format == "adapter":
        _copy_adapter(trained, partial)
    else:
        _merge(trained, own.dtype, partial)
    if target.exists():
        target.rmdir()
    partial.rename(target)
    say(f"Exported to {target}.")
    if own.push_to_hub is not None:
        say(f"Uploaded to {_upload(target, own.push_to_hub)}")


@dataclass(frozen=True)
class _Trained:
    """A trained model: its directory, its record, and whether it scores or writes."""

    directory: Path
    record: Mapping[str, Any]
    scores: bool

    @property
    def unit(self) -> str:
        """What it is compared by."""
        return "scores" if self.scores else "log-probabilities"

    @property
    def record_name(self) -> str:
        """Of the file that its record is in."""
        return REWARD_MODEL_RECORD if self.scores else POLICY_RECORD

    def load(self, base: "Base") -> "Model":
        """The model, with its base's weights held in some way."""
        from helpsteer_rloo.model.loading import load_policy, load_reward_model

        if self.scores:
            return load_reward_model(self.directory, base)[0]
        if self.record["adapter"]:
            return load_policy(base, adapter=self.directory)
        return load_policy(dataclasses.replace(base, name=str(self.directory), revision=None))


def _trained(own: ExportKnobs) -> _Trained:
    """The model in a directory.

    Raises:
        ValueError: there is none, or its base runs code of its own and the user did not allow it.
    """
    source = Path(own.model_dir)
    if (source / REWARD_MODEL_RECORD).exists():
        record = check_reward_model(source, "--model_dir", trusted=own.trust_remote_code)
        return _Trained(source, record, scores=True)
    if not (source / POLICY_RECORD).exists():
        raise ValueError(f"--model_dir {source}: no finished reward model or policy of this project is there.")
    return _Trained(source, read_policy(source, "--model_dir", trusted=own.trust_remote_code).record, scores=False)


def _copy_adapter(trained: _Trained, target: Path) -> None:
    """Copy the adapter, the tokenizer and what this project knows of them; nothing else that training left."""
    if not trained.record["adapter"]:
        raise ValueError(f"--model_dir {trained.directory} was trained in full and has no adapter: --format merged.")
    base = trained.record["base"]["name"]
    if Path(base).is_dir():
        say(f"The adapter stands on {base}, a directory of this machine; who loads it needs that model too.")
    for pattern in _COPIED:
        for path in sorted(trained.directory.glob(pattern)):
            shutil.copy2(path, target / path.name)


def _merge(trained: _Trained, dtype: str | None, target: Path) -> None:
    """Save merged weights with tokenizer, record and card, and prove that they are the model.

    Raises:
        ValueError: they are not.
    """
    from helpsteer_rloo.model.loading import Base, load_tokenizer
    from helpsteer_rloo.model.memory import release

    own_base = Base(**trained.record["base"])
    base = dataclasses.replace(own_base, dtype=dtype or own_base.dtype, quantization=None)
    tokenizer = load_tokenizer(str(trained.directory), trust_remote_code=base.trust_remote_code)
    sequences = _sequences(_renderer(tokenizer, trained.record))
    expected = _computed(trained.load(own_base), sequences, scores=trained.scores)
    release()
    saved = _save_merged(trained, base, tokenizer, sequences, target)
    release()
    found = _prove(target, sequences, saved, dataclasses.asdict(base), scores=trained.scores)
    moved = _largest(saved, expected)
    say(f"A fresh process with stock libraries computes {trained.unit} within {found:.2g} of the merged weights'.")
    say(f"Those differ by at most {moved:.2g} from the trained model's ({own_base.dtype}; merged: {base.dtype}).")
    if base == own_base and base.dtype == "float32" and not moved <= _EXACT:
        raise ValueError(f"The merged weights are not the trained model: {trained.unit} differ by {moved:.3g}.")
    _write_record(trained, base, target)


def _save_merged(
    trained: _Trained, base: "Base", tokenizer: Any, sequences: Sequence[Sequence[int]], target: Path
) -> list[list[float]]:
    """Save weights and tokenizer; what these weights give, computed in float32."""
    from helpsteer_rloo.model.merging import merged

    whole = merged(trained.load(base))
    if trained.scores:
        whole.config.problem_type = "regression"  # one number as it is, for programs that would make it a probability
        whole.config.pad_token_id = tokenizer.pad_token_id
    whole.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return _computed(whole.float(), sequences, scores=trained.scores)


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


def _computed(model: "Model", sequences: Sequence[Sequence[int]], *, scores: bool) -> list[list[float]]:
    """Of each sequence its score, or the log-probabilities of the tokens after the first."""
    from helpsteer_rloo.groups import TokenGroup
    from helpsteer_rloo.model.forward import group_log_probs, score_sequences

    if scores:
        return [[score] for score in score_sequences(model, sequences, batch_size=1)]
    groups = [TokenGroup((), (ids[0],), (tuple(ids[1:]),)) for ids in sequences]
    return [own.tolist() for (own,) in group_log_probs(model, groups, tokens=None)]


def _largest(one: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> float:
    """The largest difference; NaN if there is one."""
    differences = [abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return math.nan if any(map(math.isnan, differences)) else max(differences)


def _prove(
    target: Path,
    sequences: Sequence[Sequence[int]],
    expected: Sequence[Sequence[float]],
    base: Mapping[str, Any],
    *,
    scores: bool,
) -> float:
    """Load the saved weights in a fresh process, in float32, and compare; the largest difference."""
    from helpsteer_rloo.evaluation.reload import EXACT, check_log_probs, check_reload

    wide = {**base, "dtype": "float32"}
    if scores:
        return check_reload(target, sequences, [score for (score,) in expected], wide, limit=EXACT)
    return check_log_probs(target, sequences, expected, wide, EXACT)


def _write_record(trained: _Trained, base: "Base", target: Path) -> None:
    """What stands beside the weights: the card, and last the record, by which this project's commands know a model."""
    from helpsteer_rloo.evaluation.cards import policy_card, reward_model_card

    record = trained.record
    new = {**record, "adapter": False, "base": {**dataclasses.asdict(base), "name": record["base"]["name"]}}
    if trained.scores:
        shutil.copy2(trained.directory / HELDOUT_PROMPTS, target / HELDOUT_PROMPTS)
    if not trained.scores:
        write_text(target / "README.md", policy_card(new))
    elif "by_domain" in (record.get("heldout") or {}):
        write_text(target / "README.md", reward_model_card(new))
    write_json(target / trained.record_name, new)


def _make_repository(name: str, *, private: bool) -> None:
    """Make the repository before any work, or find out why that cannot be.

    Raises:
        ValueError: it cannot be made, or has files of another export in it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_explained(name):
        api.create_repo(name, private=private, exist_ok=True)
        others = [file for file in api.list_repo_files(name) if file != ".gitattributes"]
    if others:
        raise ValueError(f"--push_to_hub {name} has files already ({others[0]}, for one); name a new repository.")


def _upload(directory: Path, name: str) -> str:
    """Upload a directory to the hub; the address of the commit.

    Raises:
        ValueError: it cannot be uploaded.
    """
    from huggingface_hub import HfApi

    with _hub_explained(name):
        return str(HfApi().upload_folder(repo_id=name, folder_path=str(directory), commit_message="Export"))


@contextmanager
def _hub_explained(name: str) -> Generator[None]:
    """Errors of the hub and the network, for users."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except Exception as error:
        known = isinstance(error, (HfHubHTTPError, OSError)) or type(error).__module__.startswith("httpx")
        if not known:
            raise
        raise ValueError(
            f"--push_to_hub {name}: {error}\nLog in with `hf auth login`, or upload it yourself."
        ) from None
