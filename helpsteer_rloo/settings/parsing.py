"""From the command line and the `--config` file to settings; a mistake ends the program with status 2.

Precedence, weakest first: TRL's own default, this project's default, the file, the command line. In the pipeline: the
file's main part, the file's section of a stage, main flags given, flags given for the stage.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from helpsteer_rloo.settings.checks import check_packages_of_pipeline, check_pipeline
from helpsteer_rloo.settings.config import (
    PIPELINE,
    SECTIONS,
    CommandSpec,
    Knobs,
    PipelineSettings,
    Settings,
    ensemble,
    flags_named_of,
    seed_of,
)
from helpsteer_rloo.settings.flags import FlagParser, FlagValue, read_yaml
from helpsteer_rloo.settings.knobs import DEFAULT_POLICY_DIR, DEFAULT_REWARD_MODEL_DIR, DataKnobs, PipelineKnobs


def parse_command(
    command: CommandSpec[Knobs],
    argv: Sequence[str] | None = None,
    checks: Sequence[Callable[[Settings[Any]], None]] = (),
) -> Settings[Knobs]:
    """Read the command line, and the file given as --config, into settings; mistakes end the program with status 2.

    `checks` look at the settings as a whole, and raise `ValueError` for a mistake.
    """
    parser = _parser(command)
    given = parser.parse_given(sys.argv[1:] if argv is None else argv)
    try:
        content, source = _read_config(given)
        command.resolve(content, source=source)
        settings = command.resolve(content, given, source="command line")
        for check in checks:
            check(settings)
        return settings
    except ValueError as error:
        parser.error(str(error))


def split_positions(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """What stands on the command line before any flag, and the rest.

    >>> split_positions(["runs/a", "runs/b", "--output", "both.html"])
    (['runs/a', 'runs/b'], ['--output', 'both.html'])
    """
    first = next((place for place, token in enumerate(argv) if token.startswith("-")), len(argv))
    return list(argv[:first]), list(argv[first:])


def named_positions(argv: Sequence[str], names: Sequence[str]) -> list[str]:
    """What stands on the command line before any flag, as flags of these names.

    >>> named_positions(["8", "rows.jsonl", "--seed", "1"], ["n", "input"])
    ['--n=8', '--input=rows.jsonl', '--seed', '1']
    """
    positions, _ = split_positions(argv)
    named = [f"--{name}={value}" for name, value in zip(names, positions, strict=False)]
    return [*named, *argv[len(named) :]]


def parse_pipeline(argv: Sequence[str] | None = None, main: CommandSpec[Any] = PIPELINE) -> PipelineSettings:
    """Read the pipeline's command line and --config file; mistakes end the program with status 2.

    `main` is the pipeline, or a command that takes its flags and more.
    """
    parser, program = _parser(main), main.program
    main_argv, section_argv = _split_sections(sys.argv[1:] if argv is None else argv)
    given = parser.parse_given(main_argv)
    sections = {
        name: _parser(dataclasses.replace(command, program=program)).parse_given(section_argv[name])
        for name, command in SECTIONS.items()
    }
    try:
        content, source = _read_config(given)
        settings = pipeline_settings(content, given, sections, source, main)
        check_pipeline(settings)
        if main is PIPELINE:
            check_packages_of_pipeline(settings)
        return settings
    except ValueError as error:
        parser.error(str(error))


def pipeline_settings(
    content: Mapping[str, FlagValue],
    given: Mapping[str, FlagValue],
    sections: Mapping[str, Mapping[str, FlagValue]] | None = None,
    source: str = "configuration",
    command: CommandSpec[Any] = PIPELINE,
) -> PipelineSettings:
    """Settings of a run from a file's `content`, the main flags `given`, and the flags given for single `sections`.

    What the stages share (data, model, seed, LoRA) is handed down. Precedence, weakest first: the file's main part,
    the file's section of the stage, main flags given, flags given for the stage.

    Raises:
        ValueError: as `CommandSpec.resolve`.
    """
    main = {key: value for key, value in content.items() if key not in SECTIONS}
    command.resolve(main, source=source)
    own: PipelineKnobs = command.resolve(main, given, source="command line").own
    stages: dict[str, Settings[Any]] = {}
    for name, of_section in SECTIONS.items():
        section, of_stage = content.get(name) or {}, (sections or {}).get(name, {})
        if not isinstance(section, Mapping):
            raise ValueError(f"{source}: {name}: expected a mapping from flag names to values.")
        _refuse_handed_down(name, [*section, *of_stage])
        with flags_named_of(name):
            of_section.resolve(section, source=f"{source}: {name}")
            stages[name] = of_section.resolve(_stage_settings(own, given, section, name), of_stage, source=f"--{name}")
    settings = _with_ensemble(PipelineSettings(own, stages["reward"], stages["rloo"]))
    return _with_guard(settings) if own.guard else settings


def _with_ensemble(settings: PipelineSettings) -> PipelineSettings:
    """RLOO against all reward models of the ensemble."""
    members = [str(member.own.output_dir) for member in ensemble(settings.reward)[1:]]
    if not members:
        return settings
    if settings.rloo.own.reward_ensemble:
        raise ValueError("--rloo.reward_ensemble cannot be set with --reward.ensemble, which decides it.")
    own = dataclasses.replace(settings.rloo.own, reward_ensemble=",".join(members))
    return dataclasses.replace(settings, rloo=Settings(own, settings.rloo.trl))


def _with_guard(settings: PipelineSettings) -> PipelineSettings:
    """The reward model on the first half of the prompts, a guard on the second with another seed, and RLOO with it."""
    own, reward, rloo = settings.own, settings.reward, settings.rloo
    for flag, given in (
        ("reward.half", reward.own.half != "all"),
        ("rloo.guard_reward_model", rloo.own.guard_reward_model),
    ):
        if given:
            raise ValueError(f"--{flag} cannot be set with --guard, which decides it.")
    directory = own.guard_dir or (
        f"{own.output_dir}/guard_model" if own.output_dir else f"{Path(reward.own.output_dir)}_guard"
    )
    return PipelineSettings(
        own,
        Settings(dataclasses.replace(reward.own, half="first"), reward.trl),
        Settings(dataclasses.replace(rloo.own, guard_reward_model=directory), rloo.trl),
        Settings(
            dataclasses.replace(reward.own, half="second", output_dir=directory, ensemble=1),
            {**reward.trl, "seed": seed_of(reward) + reward.own.ensemble},
        ),
    )


def _refuse_handed_down(stage: str, names: Sequence[str]) -> None:
    """Refuse what a stage's section cannot change: its directories, what is shown, and for RLOO the data."""
    owners = {"output_dir": "--reward_model_dir" if stage == "reward" else "--policy_dir"}
    owners |= {"rollouts_dir": "--output_dir", "reward_model_path": "--reward_model_dir"}
    owners |= {name: f"--{name}" for name in ("progress", "progress_seconds")}
    if stage == "rloo":
        owners |= {field.name: f"--{field.name}" for field in fields(DataKnobs)}
    for name in names:
        if name in owners:
            raise ValueError(f"--{stage}.{name} cannot be set: the stages share it; give {owners[name]} instead.")


def _read_config(given: dict[str, FlagValue]) -> tuple[dict[str, FlagValue], str]:
    """Take `config` out of the flags given; return the file's content and its name."""
    file = given.pop("config", None)
    return (read_yaml(Path(file)), str(file)) if file else ({}, "configuration")


_FOR_BOTH = ("model_name_or_path", "seed", "use_peft", "engine", "packed_tokens", "max_bad_steps", "report_to")


def _shared_flags(own: PipelineKnobs, stage: str) -> dict[str, tuple[str, FlagValue]]:
    """What the pipeline hands down to a stage: for each of its flags, the main flag it comes from, and the value."""
    shared: dict[str, tuple[str, FlagValue]] = {f.name: (f.name, getattr(own, f.name)) for f in fields(DataKnobs)}
    shared |= {name: (name, getattr(own, name)) for name in _FOR_BOTH}
    everything = own.output_dir
    reward_dir = own.reward_model_dir or (f"{everything}/reward_model" if everything else DEFAULT_REWARD_MODEL_DIR)
    policy_dir = own.policy_dir or (f"{everything}/policy" if everything else DEFAULT_POLICY_DIR)
    rollouts_dir = f"{everything or f'runs/{own.name}'}/rollouts"
    if stage == "reward":
        shared |= {
            "output_dir": ("reward_model_dir", reward_dir),
            "per_device_train_batch_size": ("reward_batch_size", own.reward_batch_size),
            "num_train_epochs": ("reward_epochs", own.reward_epochs),
        }
    else:
        shared |= {
            "output_dir": ("policy_dir", policy_dir),
            "rollouts_dir": ("output_dir", rollouts_dir),
            "reward_model_path": ("reward_model_dir", reward_dir),
            "per_device_train_batch_size": ("rloo_batch_size", own.rloo_batch_size),
            "total_episodes": ("total_episodes", own.total_episodes),
        }
    return {name: (source, value) for name, (source, value) in shared.items() if value is not None}


_DIRECTORIES = ("output_dir", "rollouts_dir", "reward_model_path")


def _stage_settings(
    own: PipelineKnobs, given: Mapping[str, FlagValue], section: Mapping[str, FlagValue], name: str
) -> dict[str, FlagValue]:
    """Values for one stage: handed down, overridden by the file's section, overridden by main flags given."""
    shared = _shared_flags(own, name)
    below = {flag: value for flag, (_, value) in shared.items()}
    above = {flag: value for flag, (source, value) in shared.items() if source in given or flag in _DIRECTORIES}
    return {**below, **section, **above}


def _parser(command: CommandSpec[Any]) -> FlagParser:
    parser = FlagParser(command.program, command.description, command.flags(), command.explain_unknown, command.usage)
    parser.add_argument(
        "--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file of flags; the command line wins."
    )
    return parser


def _split_sections(argv: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separate `--reward.x 1` and `--rloo.y 2` from the rest, each with the values that follow it."""
    main: list[str] = []
    sections: dict[str, list[str]] = {name: [] for name in SECTIONS}
    target = main
    for token in argv:
        if token.startswith("--"):
            name, dot, rest = token[2:].partition(".")
            target = sections[name] if dot and name in sections else main
            token = f"--{rest}" if target is not main else token
        target.append(token)
    return main, sections
