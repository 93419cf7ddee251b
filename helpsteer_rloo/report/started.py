"""What a run was started with, of what its record says: settings that are not at their defaults, seed, versions."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

from helpsteer_rloo.report.records import Setting
from helpsteer_rloo.settings.config import REWARD, RLOO, CommandSpec
from helpsteer_rloo.settings.knobs import PipelineKnobs


def setting(settings: Mapping[str, Any], stage: str, name: str) -> Any:
    """What a setting of a stage was given as; None if it is not recorded."""
    of_stage = settings.get(stage)
    return of_stage.get(name) if isinstance(of_stage, dict) else None


def seed_of(settings: Mapping[str, Any]) -> int | None:
    """The seed of a run."""
    found = [setting(settings, stage, "seed") for stage in ("pipeline", "reward", "rloo")]
    return next((seed for seed in found if isinstance(seed, int)), None)


def versions_of(provenance: object) -> dict[str, str]:
    """What a run was made with: versions by package, and the commit."""
    if not isinstance(provenance, dict):
        return {}
    return {str(name): str(value) for name, value in provenance.items() if value is not None}


def differences(settings: Mapping[str, Any]) -> Iterator[Setting]:
    """The settings that are not at their defaults; what a stage has from the pipeline is not said twice."""
    of_pipeline: dict[str, str] = {}
    for stage, command in (("pipeline", None), ("reward", REWARD), ("rloo", RLOO)):
        given = settings.get(stage)
        if not isinstance(given, dict):
            continue
        defaults = _defaults(command) if command else {f.name: str(f.default) for f in fields(PipelineKnobs)}
        for name, value in given.items():
            default = defaults.get(name, "")
            if _same(str(value), default) or of_pipeline.get(name) == str(value):
                continue
            if stage == "pipeline":
                of_pipeline[name] = str(value)
            yield Setting(stage, name, _plain(str(value)), _plain(default.strip("'\"")))


def _defaults(command: CommandSpec[Any]) -> dict[str, str]:
    return {flag.name: flag.default for section in command.flags().values() for flag in section}


def _plain(value: str) -> str:
    """A whole number as such: the parsers give `200.0` for some flags that take shares of the steps as well."""
    return value.removesuffix(".0") if value.removesuffix(".0").lstrip("-").isdecimal() else value


def _same(value: str, default: str) -> bool:
    try:
        return float(value) == float(default)
    except ValueError:
        return value == default.strip("'\"")
