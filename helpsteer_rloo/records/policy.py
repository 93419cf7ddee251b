"""What stands beside the weights of a policy: its record, read and checked. A plain model has none, and answers too."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpsteer_rloo.identity import reward_model_identity
from helpsteer_rloo.records.places import base_found_again, doubt_of_base, found_again, recorded_identity
from helpsteer_rloo.records.reward_model import DTYPES, check_base_record
from helpsteer_rloo.run_dir import POLICY_RECORD, REWARD_MODEL_RECORD, read_json, read_record

_TRUST = "runs code of its own. If you trust it, give --trust_remote_code true."


@dataclass(frozen=True)
class PolicySource:
    """A model that answers: where it lies, what it was trained from, and whether it is an adapter on that.

    A plain model was trained from nothing: its `base` is itself, and its `record` empty.
    """

    directory: Path
    base: Mapping[str, Any]
    adapter: bool = False
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_trained(self) -> bool:
        """Whether it is a policy of this project, with a model that it was trained from."""
        return bool(self.record)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings of its training; none of a plain model."""
        given = self.record.get("settings")
        return given if isinstance(given, dict) else {}

    def judge(self, name: str) -> Path | None:
        """The directory of the reward model that it was trained with, where the record says or beside the policy.

        Args:
            name: `reward_model` or `guard_reward_model`.
        """
        identity = self._identity(name)
        same = None if identity is None else lambda place: reward_model_identity(place) == identity
        places = (found_again(one, self.directory, REWARD_MODEL_RECORD, same) for one in self._named(name))
        return next((found for found in places if found), None)

    def doubts(self, judges: Collection[Path]) -> list[str]:
        """What is to be known before a policy is believed: that its base, or a judge of its training, has changed.

        Args:
            judges: The reward models that it is judged by.
        """
        found = [doubt_of_base(self.record, self.directory)] if self.is_trained else []
        for name in ("reward_model", "guard_reward_model"):
            identity, directory = self._identity(name), self.judge(name)
            if identity is None or directory is None or directory not in judges:
                continue
            if reward_model_identity(directory) != identity:
                what = name.replace("_", " ")
                found.append(f"{directory} is not the {what} any more that {self.directory} was trained with.")
        return [one for one in found if one is not None]

    def _identity(self, name: str) -> str | None:
        identities = self.record.get("judge_identities")
        found = identities.get(name) if isinstance(identities, dict) else None
        return found if isinstance(found, str) else None

    def absence_of_judge(self, name: str, flag: str) -> str:
        """Why there is no reward model of its training, and what to do."""
        named = self._named(name)
        if not named:
            return f"{self.directory} has no record of a reward model: give one by {flag}."
        return (
            f"The reward model of {self.directory}, {named[0]}, is not there, nor beside the policy: say by {flag} "
            "where it is now."
        )

    def _named(self, name: str) -> list[str]:
        """What the record calls a reward model: by its absolute path, if it was written since that is kept, or less."""
        judges = self.record.get("judges")
        kept = judges.get(name) if isinstance(judges, dict) else None
        named = (kept, self.record.get(name), self.settings.get(name))
        return [one for one in named if isinstance(one, str) and one]


def read_policy(directory: str | Path, flag: str, *, trusted: bool) -> PolicySource:
    """A trained policy of this project.

    Raises:
        ValueError: there is none, its record is damaged, or its base runs code of its own and the user did not allow
            it.
    """
    source = Path(directory)
    record = read_record(source / POLICY_RECORD, {"base": dict, "adapter": bool})
    if record is None:
        raise ValueError(f"{flag} {source}: no finished policy of this project is there.")
    base = record["base"]
    check_base_record(source / POLICY_RECORD, base)
    if base.get("trust_remote_code") and not trusted:
        raise ValueError(f"The policy's base {_TRUST}")
    base = {**base, "name": base_found_again(base["name"], source, recorded_identity(record))}
    return PolicySource(source, base, record["adapter"], {**record, "base": base})


def read_policy_or_model(directory: str | Path, flag: str, *, trusted: bool) -> PolicySource:
    """A trained policy, or a plain model as it lies in a directory, its weights held in their own type.

    Raises:
        ValueError: as `read_policy`; there is no model; or an adapter's base is gone.
    """
    source = Path(directory)
    if (source / POLICY_RECORD).exists():
        policy = read_policy(source, flag, trusted=trusted)
        _require_base(policy, flag)
        return policy
    config = read_json(source / "config.json")
    if config is None:
        raise ValueError(f"{flag} {source}: neither a policy of this project ({POLICY_RECORD}) nor a model is there.")
    if "auto_map" in config and not trusted:
        raise ValueError(f"{flag} {source} {_TRUST}")
    dtype = config.get("dtype") or config.get("torch_dtype")
    base = {"name": str(source), "dtype": dtype if dtype in DTYPES else "float32", "trust_remote_code": trusted}
    return PolicySource(source, base)


def _require_base(policy: PolicySource, flag: str) -> None:
    name = Path(policy.base["name"])
    if policy.adapter and name.is_absolute() and not name.is_dir():  # else a directory that is there, or the hub's
        raise ValueError(
            f"{flag} {policy.directory} is an adapter, and the model that it stands on, {name}, is not there, nor "
            f"beside it. Put that back, or write where it is now to base.name in {policy.directory / POLICY_RECORD}."
        )
