"""Reward models that a run is given, looked at before any work."""

from pathlib import Path

from helpsteer_rloo.identity import reward_model_identity
from helpsteer_rloo.records.reward_model import check_reward_model
from helpsteer_rloo.settings.checks import prompt_room
from helpsteer_rloo.settings.config import Settings
from helpsteer_rloo.settings.knobs import RLOOKnobs


def check_given_reward_model(settings: Settings[RLOOKnobs], flag: str) -> int:
    """Look at the reward model before any work; the longest sequence it was trained on."""
    trusted = bool(settings.trl.get("trust_remote_code"))
    record = check_reward_model(settings.own.reward_model_path, flag, trusted=trusted)
    longest = int(record["rendering"]["max_length"])
    prompt_room(longest, settings.own.response_length)
    return longest


def check_other_reward_models(
    settings: Settings[RLOOKnobs], longest: int, *, own_guard: bool = False, own_members: bool = False
) -> None:
    """Look at the guard and the ensemble before any work, but for those that the run trains itself.

    They have to read what the reward model does, which was trained on sequences of `longest` tokens, and to be others.

    Raises:
        ValueError: one is not to be used, or the same as another.
    """
    own, seen = settings.own, _names(settings.own.reward_model_path)
    given = [] if own_members else [(directory, "--reward_ensemble") for directory in own.ensemble_members]
    if own.guard_reward_model is not None and not own_guard:
        given.append((own.guard_reward_model, "--guard_reward_model"))
    for directory, flag in given:
        if seen & _names(directory):
            raise ValueError(f"{flag} {directory} is a reward model that this run has already; give another one.")
        seen |= _names(directory)
        trusted = bool(settings.trl.get("trust_remote_code"))
        record = check_reward_model(directory, flag, trusted=trusted)
        limit = record["rendering"]["max_length"]
        if record["thinking"] != settings.own.thinking:
            mode = "with" if record["thinking"] else "without"
            raise ValueError(f"{flag} {directory} was trained {mode} --thinking; give one that was trained alike.")
        if limit < longest:
            raise ValueError(
                f"{flag} {directory} was trained on at most {limit} tokens, the reward model on {longest}: give one "
                "that was trained with the same --max_length."
            )


def _names(directory: str) -> set[Path | str]:
    """What tells a reward model from others, also from its copy."""
    identity = reward_model_identity(Path(directory))
    return {Path(directory).resolve(), *([identity] if identity else [])}
