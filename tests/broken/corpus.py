"""One broken input: how it is made, which command meets it, and what must be said about it."""

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.data.rows import make_row, write_jsonl

USAGE, FAILURE = 2, 1
"""How a command ends: a mistake in its flags or file, and one that came out while it worked."""

RENDERING = ("chat_template", "tokenizer", "template_kwargs", "end_of_turn_id", "max_length")


@dataclass(frozen=True)
class World:
    """What the corpus breaks: a data set, a tiny base and reward models, all of them sound."""

    data: Path
    base: Path
    reward: Path
    full_reward: Path


@dataclass(frozen=True)
class Place:
    """Where one case may write, and what it breaks."""

    world: World
    root: Path

    def copy(self, source: Path, name: str = "copy") -> Path:
        """A directory to break."""
        return Path(shutil.copytree(source, self.root / name))

    def write(self, name: str, content: str | bytes) -> Path:
        """A file with this content."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def data(self, path: Path | str) -> list[str]:
        """Arguments of `helpsteer-rloo data` on another data set."""
        return [f"--dataset_name={path}", f"--model_name_or_path={self.world.base}", "--language=all"]

    def training(self, **changes: Any) -> list[str]:
        """Arguments of a training script."""
        flags: dict[str, Any] = {
            "dataset_name": self.world.data,
            "model_name_or_path": self.world.base,
            "output_dir": self.root / "out",
            "max_length": 96,
            "disable_tqdm": "true",
            "report_to": "none",
            "gradient_checkpointing": "false",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
        }
        return [f"--{name}={value}" for name, value in (flags | changes).items()]

    def rloo(self, **changes: Any) -> list[str]:
        """Arguments of RLOO for one batch."""
        flags = {"reward_model_path": self.world.reward, "response_length": 4, "total_episodes": 4, "use_peft": "true"}
        return self.training(**{**flags, **changes})

    def pipeline(self, *more: str) -> list[str]:
        """Arguments of the pipeline."""
        flags = {"dataset_name": self.world.data, "model_name_or_path": self.world.base, "max_length": 96}
        flags |= {"output_dir": self.root / "run"}
        return [*(f"--{name}={value}" for name, value in flags.items()), "--rloo.response_length=8", *more]


@dataclass(frozen=True)
class Broken:
    """One case; every fragment must be in the message, `{root}` standing for the directory that the case wrote to."""

    name: str
    command: str
    make: Callable[[Place], Sequence[str]]
    says: tuple[str, ...]
    status: int = FAILURE


def row_case(name: str, row: Any, *says: str) -> Broken:
    """A broken row in line 2 of a file, as JSON or as the bytes given."""
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    lines = [json.dumps(make_row("before")).encode(), line, json.dumps(make_row("after")).encode()]

    def make(place: Place) -> list[str]:
        return place.data(place.write("rows.jsonl", b"\n".join(lines)))

    return Broken(name, "data", make, ("{root}/rows.jsonl, line 2, field ", *says, "--skip_bad_rows"))


def file_case(name: str, file: str, content: bytes, *says: str) -> Broken:
    """A file of rows with the content given."""

    def make(place: Place) -> list[str]:
        return place.data(place.write(file, content))

    return Broken(name, "data", make, (f"{{root}}/{file}", *says))


def flag_case(name: str, command: str, argv: Sequence[str], *says: str) -> Broken:
    """Flags that are refused before any work."""
    return Broken(name, command, lambda place: argv, says, USAGE)


def yaml_case(name: str, command: str, content: str | bytes, *says: str) -> Broken:
    """A configuration file that is refused by name."""

    def make(place: Place) -> list[str]:
        return ["--config", str(place.write("settings.yaml", content))]

    return Broken(name, command, make, ("{root}/settings.yaml: ", *says), USAGE)


def changed_json(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def cut_short(path: Path) -> None:
    """Keep the first half of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def as_yaml(**content: Any) -> str:
    """A configuration file's text."""
    return yaml.safe_dump(content)


def write_world_data(directory: Path) -> Path:
    """A small data set with a validation split of its own."""
    write_jsonl(directory / "train.jsonl", [make_row(f"Name {n} trees.", f"oak {n}", "elm") for n in range(8)])
    write_jsonl(directory / "validation.jsonl", [make_row(f"Name {n} fish.", f"eel {n}", "cod") for n in range(4)])
    return directory


setting = functools.partial(dict.__setitem__)
