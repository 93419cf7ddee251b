"""The pages of flags, written from the parsers themselves: `python -m tools.flags_page`, or `make docs`.

`docs/flags.md` has the flags of this project, is committed, and held to the parsers by a test. `docs/trl-flags.md` has
those of TRL and transformers in their authors' own words; it is made before each build and belongs to no commit.
"""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import helpsteer_rloo.commands
from helpsteer_rloo.cli import COMMANDS
from helpsteer_rloo.commands.demo import demo_flags
from helpsteer_rloo.settings.config import PIPELINE, REWARD, RLOO, CommandSpec
from helpsteer_rloo.settings.flags import Flag, own_flags
from helpsteer_rloo.settings.knobs import DataKnobs, EngineKnobs, PipelineKnobs, RewardKnobs, RLOOKnobs

DOCS = Path(__file__).resolve().parents[1] / "docs"
MADE = "<!-- Made by `python -m tools.flags_page`; do not edit. -->"
SCRIPTS = {"pipeline": PIPELINE, "reward-model": REWARD, "rloo": RLOO}
"""Commands of `helpsteer-rloo` that are the three scripts under another name."""

_OF_TRAININGS: tuple[tuple[str, type, str], ...] = (
    ("Data", DataKnobs, "In both training scripts and the pipeline, where all stages share them; no `--rloo.` form."),
    (
        "Passes",
        EngineKnobs,
        "In both training scripts; in the pipeline for both stages, and but for those of the progress and `--force` "
        "also for one, as `--reward.FLAG` or `--rloo.FLAG`.",
    ),
    ("Reward model", RewardKnobs, "Of `reward_model_training.py`; in the pipeline `--reward.FLAG`."),
    ("RLOO", RLOOKnobs, "Of `rloo_helpsteer_training.py`; in the pipeline `--rloo.FLAG`."),
    ("Pipeline", PipelineKnobs, "Of `train_pipeline.py`."),
)


def commands() -> dict[str, CommandSpec[Any]]:
    """Every command of `helpsteer-rloo` that is none of the three scripts nor the demo, by its name.

    Raises:
        ValueError: a command has no description that flags could be read from.
    """
    found = {
        value.program.removeprefix("helpsteer-rloo "): value
        for _, name, _ in pkgutil.iter_modules(helpsteer_rloo.commands.__path__, "helpsteer_rloo.commands.")
        for value in vars(importlib.import_module(name)).values()
        if isinstance(value, CommandSpec) and value.program.startswith("helpsteer-rloo ")
    }
    rest = [name for name in COMMANDS if name not in (*SCRIPTS, "demo")]
    if missing := set(rest) - set(found):
        raise ValueError(f"no CommandSpec in helpsteer_rloo.commands describes {', '.join(sorted(missing))}")
    return {name: found[name] for name in rest}


def own_page() -> str:
    """`docs/flags.md`."""
    return _page(_own_lines())


def trl_page() -> str:
    """`docs/trl-flags.md`."""
    return _page(_trl_lines())


def _page(lines: Iterable[str]) -> str:
    return "\n".join([MADE, "", *lines]) + "\n"


def _own_lines() -> Iterator[str]:
    yield from (
        "# Every flag",
        "",
        "Flags are written `--name value`; a flag that is true or false may stand alone for true. `--config FILE` "
        "takes them from a YAML file, in the pipeline with sections `reward:` and `rloo:`; the command line wins. "
        "An unknown flag ends the command with the nearest known name.",
        "",
        "The training scripts also take [TRL's flags](trl-flags.md), with "
        "[some other defaults](#defaults-for-trls-flags); [some are refused](#refused-flags-of-trl).",
    )
    for title, knobs, given in _OF_TRAININGS:
        yield from ("", f"## {title}", "", given, "", *_table(_declared(knobs)))
    yield from ("", "## Defaults for TRL's flags", "", *_defaults(), "")
    yield from ("## Other names", "", "TRL's names for flags of RLOO that have an older one here.", "", *_aliases(), "")
    yield from ("## Refused flags of TRL", "", *_refused())
    yield from ("", "## `helpsteer-rloo demo`", "", _sentence(COMMANDS["demo"]), "", *_table(demo_flags()))
    for name, command in commands().items():
        yield from ("", f"## `helpsteer-rloo {name}`", "", *_of_command(COMMANDS[name], command))


def _of_command(text: str, command: CommandSpec[Any]) -> Iterator[str]:
    flags = own_flags(command.knobs)
    yield _sentence(text)
    if issubclass(command.knobs, DataKnobs):
        data = {flag.name for flag in own_flags(DataKnobs)}
        flags = [flag for flag in flags if flag.name not in data]
        yield from ("", "All flags of [Data](#data), and:")
    yield from ("", *_table(flags))


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _declared(knobs: type) -> list[Flag]:
    """The flags that a class adds to those it inherits."""
    bases = [base for base in knobs.__bases__ if dataclasses.is_dataclass(base)]
    inherited = {field.name for base in bases for field in dataclasses.fields(base)}
    return [flag for flag in own_flags(knobs) if flag.name not in inherited]


def _table(flags: Sequence[Flag]) -> list[str]:
    rows = [(f"`--{flag.name}`", _taken(flag), _default(flag.default), _text(flag.help)) for flag in flags]
    return _rows(("flag", "takes", "default", "meaning"), rows)


def _rows(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _taken(flag: Flag) -> str:
    return _text(" or ".join("none" if part == "None" else part for part in flag.alternatives()))


def _default(default: str) -> str:
    return f"`{default}`" if default not in ("", "None") else "none"


def _text(text: str) -> str:
    """Text in a cell of a table: what stands in backticks is code, and nothing else is Markdown."""
    parts = re.split(r"(`[^`]*`)", " ".join(text.split()))
    return "".join(part.replace("|", "\\|") if number % 2 else _plain(part) for number, part in enumerate(parts))


def _plain(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([|*_`\[])", r"\\\1", escaped)


def _defaults() -> list[str]:
    names = dict.fromkeys([*REWARD.trl_defaults, *RLOO.trl_defaults])

    def default(command: CommandSpec[Any], name: str) -> str:
        value = command.trl_defaults.get(name)
        return "TRL's" if value is None else f"`{value}`"

    rows = [(f"`--{name}`", default(REWARD, name), default(RLOO, name)) for name in names]
    return _rows(("flag", "reward model", "RLOO"), rows)


def _aliases() -> list[str]:
    return _rows(("TRL's name", "flag here"), [(f"`--{trl}`", f"`--{own}`") for trl, own in RLOO.aliases.items()])


def _refused() -> list[str]:
    stages: Mapping[str, CommandSpec[Any]] = {"reward model": REWARD, "RLOO": RLOO}
    names = dict.fromkeys(name for command in stages.values() for name in command.refused)
    rows: list[tuple[str, str, str]] = []
    for name in names:
        of = [stage for stage, command in stages.items() if name in command.refused]
        reasons = dict.fromkeys(stages[stage].refused[name] for stage in of)
        rows.append((f"`--{name}`", ", ".join(of), _text(" ".join(reasons))))
    return _rows(("flag", "in", "because"), rows)


def _trl_lines() -> Iterator[str]:
    yield from (
        "# TRL's flags",
        "",
        "Flags that the training scripts take besides [those of this project](flags.md), read from the installed TRL "
        "and transformers. The texts are theirs (Apache-2.0); the defaults are those here. In the pipeline they are "
        "given as `--reward.FLAG` or `--rloo.FLAG`.",
    )
    reward, rloo = ({flag.name: flag for flag in command.flags()["flags of TRL"]} for command in (REWARD, RLOO))
    parts = {
        "Both stages": reward.keys() & rloo.keys(),
        "Reward model": reward.keys() - rloo.keys(),
        "RLOO": rloo.keys() - reward.keys(),
    }
    for title, names in parts.items():
        rows = [_of_both(reward.get(name), rloo.get(name)) for name in {**reward, **rloo} if name in names]
        yield from ("", f"## {title}", "", *_rows(("flag", "takes", "default", "meaning"), rows))


def _of_both(reward: Flag | None, rloo: Flag | None) -> tuple[str, str, str, str]:
    flag = reward or rloo
    assert flag is not None
    defaults = dict.fromkeys(_default(one.default) for one in (reward, rloo) if one is not None)
    return f"`--{flag.name}`", _taken(flag), ", in RLOO ".join(defaults), _text(flag.help)


def main() -> None:
    """Write both pages."""
    for name, page in (("flags.md", own_page()), ("trl-flags.md", trl_page())):
        (DOCS / name).write_text(page, encoding="utf-8")
        print(f"docs/{name}: {len(page.splitlines())} lines")


if __name__ == "__main__":
    main()
