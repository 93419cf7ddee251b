"""`helpsteer-rloo demo`: the pipeline in a small world whose gold quality is known, offline, on two cores."""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from helpsteer_rloo.data.demo import DemoBaseSettings, gold, write_rows
from helpsteer_rloo.pipeline import run_pipeline
from helpsteer_rloo.settings.checks import check_packages_of_pipeline, check_pipeline
from helpsteer_rloo.settings.config import PipelineSettings
from helpsteer_rloo.settings.flags import Flag, own_flags, read_yaml, unknown_name
from helpsteer_rloo.settings.knobs import PROGRESS
from helpsteer_rloo.settings.parsing import pipeline_settings
from helpsteer_rloo.stages import Stage


@dataclass(frozen=True)
class DemoSettings:
    """The world (rows to write), the base model to build in it, and the pipeline over them."""

    rows: int
    base: DemoBaseSettings
    pipeline: PipelineSettings


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("helpsteer-rloo demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", default="configs/demo.yaml", help="settings of the world, the base and the stages")
    parser.add_argument("--seed", type=int, help="seed of the world and of every stage (default: the file's)")
    parser.add_argument("--output_dir", help="directory of everything the demo makes (default: the file's)")
    parser.add_argument("--engine", choices=("packed", "trl"), help="of both stages; trl is TRL's own, for comparison")
    parser.add_argument("--guard", choices=("true", "false"), help="whether to watch the policy (default: the file's)")
    parser.add_argument("--progress", choices=PROGRESS, help="what is shown while the run goes on (default: auto)")
    parser.add_argument("--progress_seconds", type=float, help="least time between two lines or events about steps")
    parser.add_argument("--report_to", nargs="+", help="trackers of the trainings: tensorboard, trackio, wandb")
    return parser


def demo_flags() -> list[Flag]:
    """The flags of the command, for its documentation."""
    actions = [action for action in _parser()._actions if action.dest != "help"]
    return [
        Flag(
            action.dest,
            " | ".join(action.choices or (getattr(action.type, "__name__", "str"),)),
            str(action.default),
            str(action.help),
        )
        for action in actions
    ]


def parse_demo(argv: Sequence[str] | None = None) -> DemoSettings:
    """Read the flags and the file of `--config` into settings; mistakes end the program with status 2."""
    parser = _parser()
    args, rest = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    if rest:
        unknown = rest[0].partition("=")[0].removeprefix("--")
        parser.exit(2, f"helpsteer-rloo demo: {unknown_name(unknown, list(vars(args)), 'flag')}\n")
    given: dict[str, Any] = {"seed": args.seed, "output_dir": args.output_dir, "engine": args.engine}
    given |= {"progress": args.progress, "progress_seconds": args.progress_seconds, "report_to": args.report_to}
    given |= {"guard": None if args.guard is None else args.guard == "true"}
    given = {key: value for key, value in given.items() if value is not None}
    try:
        return demo_settings(read_yaml(Path(args.config)), given, source=args.config)
    except ValueError as error:
        hint = "" if Path(args.config).exists() else " Run it in a clone of the project, or give --config FILE."
        parser.exit(2, f"helpsteer-rloo demo: {error}{hint}\n")


def demo_settings(content: Mapping[str, Any], given: Mapping[str, Any], source: str) -> DemoSettings:
    """Settings from a file's content and the flags given; paths follow from the output directory.

    Raises:
        ValueError: an unknown key, or as `pipeline_settings`.
    """
    world = _mapping(content.get("demo"), f"{source}: demo")
    base = _mapping(world.get("base"), f"{source}: demo: base")
    flags = {flag.name: flag for flag in own_flags(DemoBaseSettings)}
    for key in [*(key for key in world if key not in ("rows", "base")), *(key for key in base if key not in flags)]:
        raise ValueError(f"{source}: demo: {unknown_name(str(key), ['rows', 'base', *flags], 'key')}")
    rows = _value(_ROWS, world.get("rows", 8000), f"{source}: demo")
    shape = {key: _value(flags[key], value, f"{source}: demo: base") for key, value in base.items()}
    rest = {key: value for key, value in content.items() if key != "demo"}
    if given.get("engine") == "trl":  # whose passes cannot be watched
        given = {**given, "guard": False}
    if given.get("guard") is False:
        watching = ("watch_steps", "watch_prompts")
        rest["rloo"] = {key: value for key, value in (rest.get("rloo") or {}).items() if key not in watching}
    directory = given.get("output_dir") or rest.get("output_dir") or "runs/demo"
    paths = {
        "output_dir": directory,
        "dataset_name": f"{directory}/rows.jsonl",
        "model_name_or_path": f"{directory}/base",
    }
    settings = pipeline_settings(rest, {**given, **paths}, source=source)
    check_pipeline(settings)
    check_packages_of_pipeline(settings)
    return DemoSettings(rows, DemoBaseSettings(**shape), settings)


_ROWS = Flag("rows", "int", "8000", "Rows of the world.")
_MAY_BE_ZERO = ("clean_steps", "mixed_steps")


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, Mapping | None):
        raise ValueError(f"{place}: expected a mapping, got {type(value).__name__}.")
    return dict(cast("Mapping[str, Any]", value or {}))


def _value(flag: Flag, value: Any, place: str) -> Any:
    try:
        number = flag.from_yaml(value)
    except ValueError as error:
        raise ValueError(f"{place}: {flag.name}: {error}") from None
    if number < 0 or (number == 0 and flag.name not in _MAY_BE_ZERO):
        raise ValueError(f"{place}: {flag.name} is {number}; expected more.")
    return number


def run_demo(settings: DemoSettings) -> None:
    """Write the world, build the base model, and run the pipeline with the world's gold quality as judge."""
    own = settings.pipeline.own
    rows_file, base_dir = Path(own.dataset_name), Path(own.model_name_or_path)

    def write_world() -> dict[str, Any]:
        rows_file.parent.mkdir(parents=True, exist_ok=True)
        write_rows(rows_file, own.seed, settings.rows)
        return {"rows": settings.rows, "file": str(rows_file)}

    def build() -> dict[str, Any]:
        from helpsteer_rloo.training.demo_base import build_base

        build_base(base_dir, settings.base, own.seed)
        return {"directory": str(base_dir)}

    world = Stage("world", {"rows": settings.rows, "seed": own.seed}, write_world, artefacts=(rows_file,))
    base = Stage(
        "base",
        dataclasses.asdict(settings.base),
        build,
        artefacts=(base_dir / "config.json",),
        directory=base_dir,
        content="*.safetensors",
    )
    run_pipeline(settings.pipeline, before=[world, base], gold=gold)
