"""What stands beside the weights of a reward model: its record and the prompts it was verified on, read and checked.

A reward model may come from somebody else, so nothing in its directory is believed before it was looked at.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpsteer_rloo.records.places import base_found_again, recorded_identity
from helpsteer_rloo.records.weights import check_weights
from helpsteer_rloo.run_dir import HELDOUT_PROMPTS, REWARD_MODEL_RECORD, open_file, read_json
from helpsteer_rloo.settings.knobs import DataKnobs

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Types that the weights of a model can be held in."""

Shape = Mapping[str, tuple[type, ...]]
_RECORD: Shape = {"base": (dict,), "adapter": (bool,), "thinking": (bool,), "rendering": (dict,), "base_model": (str,)}
_BASE: Shape = {
    "name": (str,),
    "dtype": (str,),
    "revision": (str, type(None)),
    "trust_remote_code": (bool,),
    "quantization": (dict, type(None)),
}
_RENDERING: Shape = {
    "chat_template": (str,),
    "tokenizer": (str,),
    "template_kwargs": (str,),
    "end_of_turn_id": (int,),
    "max_length": (int,),
}
_HELDOUT: Shape = {
    "heldout_accuracy": (int, float),
    "heldout_pairs": (int,),
    "interval": (list,),
    "better_than_chance": (bool,),
}
_PROMPT_KEY = re.compile(r"[0-9a-f]{32}")
_OTHER = "train the reward model again, or give another one."
_AGAIN = f"it is damaged or older than this: {_OTHER}"


def read_reward_record(directory: str | Path) -> dict[str, Any]:
    """The record of a finished reward model, with what loading it relies on; a base that was moved with it is found.

    Raises:
        ValueError: the directory is not a reward model that this project finished, or its record is damaged.
    """
    path = Path(directory) / REWARD_MODEL_RECORD
    record = read_json(path, _OTHER)
    if record is None:
        raise ValueError(
            f"{directory}: no {REWARD_MODEL_RECORD} here, so this is not a reward model that reward_model_training.py "
            "finished. Train one first, or give the directory of one."
        )
    _check(path, "", record, _RECORD)
    check_base_record(path, record["base"])
    base = {
        **record["base"],
        "name": base_found_again(record["base"]["name"], Path(directory), recorded_identity(record)),
    }
    return {**record, "base": base}


def check_base_record(path: Path, base: Mapping[str, Any]) -> None:
    """Check what a record at `path` says of a base model.

    Raises:
        ValueError: it has no name, unknown keys, or values of another type.
    """
    _check(path, "base", base, {name: kinds for name, kinds in _BASE.items() if name == "name" or name in base})
    unknown = sorted(base.keys() - _BASE.keys())
    if unknown:
        raise ValueError(f"{path}: base has unknown keys ({', '.join(map(repr, unknown))}); {_AGAIN}")
    if base.get("dtype", "float32") not in DTYPES:
        raise ValueError(f"{path}: base.dtype is {base['dtype']!r}, expected one of {', '.join(DTYPES)}; {_AGAIN}")


def check_reward_model(directory: str | Path, flag: str, *, trusted: bool) -> dict[str, Any]:
    """Say at once, before any long work, when there is no usable reward model where one is expected.

    Args:
        directory: Of the reward model.
        flag: That named it.
        trusted: Whether the user allows code that comes with a model to be run.

    Returns:
        Its record.

    Raises:
        ValueError: a part is missing or damaged, or its base runs code of its own and the user did not allow it.
    """
    path = Path(directory)
    for name in (REWARD_MODEL_RECORD, HELDOUT_PROMPTS):
        if not (path / name).exists():
            raise ValueError(
                f"{flag} {path}: no finished reward model there ({name} is missing). Train one with "
                "reward_model_training.py, or give the directory of one that it trained."
            )
    record = read_reward_record(path)
    _check(path / REWARD_MODEL_RECORD, "rendering", record["rendering"], _RENDERING)
    if record.get("heldout") is not None:
        _check(path / REWARD_MODEL_RECORD, "", record, {"heldout": (dict,)})
        _check(path / REWARD_MODEL_RECORD, "heldout", record["heldout"], _HELDOUT)
    read_heldout_prompts(path)
    check_weights(path, "adapter_model" if record["adapter"] else "model", needed="score")
    if record["base"].get("trust_remote_code") and not trusted:
        raise ValueError(
            f"{path / REWARD_MODEL_RECORD}: the base {record['base']['name']!r} runs code of its own. If you trust it, "
            "give --trust_remote_code true (in the pipeline --rloo.trust_remote_code true)."
        )
    return record


def read_heldout_prompts(directory: str | Path) -> set[str]:
    """Keys of the prompts that a reward model was verified on, which no policy may train on.

    Raises:
        ValueError: it is no file, or holds anything else, or nothing.
    """
    path = Path(directory) / HELDOUT_PROMPTS
    with open_file(path) as file:
        keys = file.read().decode("utf-8", "replace").split()
    if not keys or not all(map(_PROMPT_KEY.fullmatch, keys)):
        raise ValueError(
            f"{path} is damaged: expected at least one line, each with the 32 hexadecimal digits of a key."
        )
    return set(keys)


def _check(path: Path, part: str, record: Mapping[str, Any], shape: Shape) -> None:
    missing = [name for name in shape if name not in record]
    if missing:
        where = f"{path}: {part}" if part else f"{path}"
        raise ValueError(f"{where} lacks {', '.join(missing)}; {_AGAIN}")
    for name, kinds in shape.items():
        value = record[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            place = f"{part}.{name}" if part else name
            raise ValueError(f"{path}: {place} is {value!r}, expected {expected}; {_AGAIN}")


def html_entities_of(record: Mapping[str, Any]) -> str:
    """How HTML entities were decoded in the training of a reward model."""
    return str((record.get("settings") or {}).get("html_entities", DataKnobs().html_entities))
