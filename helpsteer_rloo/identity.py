"""What decides the result of a stage, as its key names it: settings that have an effect, and digests of models."""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from helpsteer_rloo.processes import launched_precision, process_count
from helpsteer_rloo.run_dir import REWARD_MODEL_RECORD, open_file, read_json
from helpsteer_rloo.settings.config import Settings
from helpsteer_rloo.settings.knobs import DataKnobs, RLOOKnobs

_PROBED_BYTES = 1 << 20
_WITHOUT_EFFECT = (
    "output_dir", "rollouts_dir", "reward_model_path", "guard_reward_model", "reward_ensemble", "ensemble",
    "sample_predictions", "local_rollout_forward_batch_size",
    "logging_", "log_", "report_to", "run_name", "per_device_eval_batch_size", "disable_tqdm", "progress", "hub_",
    "push_to_hub", "dataloader_num_workers", "dataloader_p", "project", "trackio_", "num_completions_to_print",
    "max_bad_steps", "use_cpu", "force", "ddp_", "per_device_train_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
"""Flags, or beginnings of flags, that leave the result as it is; changing them makes no stage run again."""
_OF_THE_BEST = ("save_", "eval_")
"""Those that do so unless the best checkpoint is the result."""


def effective_settings(settings: Settings[Any]) -> dict[str, Any]:
    """The settings that decide a stage's result; the data's own are inputs of the data stage.

    Of a step's batch its size counts, not how processes and passes share it; and the launcher's precision counts.
    """
    data = {field.name for field in fields(DataKnobs)}
    described = settings.describe()
    best = described.get("load_best_model_at_end") or described.get("early_stopping_patience")
    left_out = _WITHOUT_EFFECT + (() if best else _OF_THE_BEST)
    kept = {k: v for k, v in described.items() if not k.startswith(left_out) and k not in data}
    for name in _unused(settings):
        kept.pop(name, None)
    if getattr(settings.own, "watched", False):
        kept["watch_steps"] = settings.own.watch_steps or described["save_steps"]
    per_device, passes = described["per_device_train_batch_size"], described["gradient_accumulation_steps"]
    return {
        **kept,
        "model_name_or_path": model_identity(str(kept["model_name_or_path"])),
        "batch_of_a_step": int(per_device) * int(passes) * process_count(),
        "mixed_precision": launched_precision(),
    }


def _unused(settings: Settings[Any]) -> Sequence[str]:
    """Knobs of RLOO that have no effect beside its other ones."""
    own = settings.own
    if not isinstance(own, RLOOKnobs):
        return ()
    unwatched = () if own.watched else ("watch_steps", "watch_prompts", "on_alarm", "max_kl")
    return (*unwatched, *(() if own.ensemble_members else ("score_of_ensemble",)))


def model_identity(name: str) -> str:
    """A hub id as it is; for a local directory a digest of its configuration and of the ends of its weight files."""
    directory = Path(name)
    if not directory.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted([*directory.glob("*.json"), *directory.glob("*.safetensors"), *directory.glob("*.jinja")]):
        with open_file(path) as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            digest.update(file.read(_PROBED_BYTES))
            file.seek(max(0, path.stat().st_size - _PROBED_BYTES))
            digest.update(file.read())
    return f"local:{digest.hexdigest()[:16]}"


def tokenizer_identity(name: str, revision: str | None) -> str:
    """A hub id with its revision; for a local directory a digest of the tokenizer's files."""
    directory = Path(name)
    if not directory.is_dir():
        return f"{name}@{revision or 'main'}"
    files = [directory / file for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    digest = hashlib.sha256(b"".join(_content(file) for file in files if file.exists()))
    return f"local:{digest.hexdigest()[:16]}"


def _content(path: Path) -> bytes:
    with open_file(path) as file:
        return file.read()


def reward_model_identity(directory: Path) -> str | None:
    """Identity of a finished reward model, apart from its verification."""
    record = read_json(directory / REWARD_MODEL_RECORD)
    if record is None:
        return None
    kept = {name: record.get(name) for name in ("rendering", "data", "training", "reload")}
    return hashlib.sha256(repr(kept).encode()).hexdigest()[:16]
