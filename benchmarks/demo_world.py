"""What the benchmarks of judgement share: the demo's base, rows with planted faults, reward models trained on them."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from helpsteer_rloo.data.demo import DemoBaseSettings, PreferenceRow, preference_rows
from helpsteer_rloo.evaluation.text_features import with_markdown

ROOT = Path(__file__).resolve().parents[1]
CONFIG: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
ROWS = int(CONFIG["demo"]["rows"])

Fault = Callable[[PreferenceRow, random.Random], PreferenceRow]


def relabelled(row: PreferenceRow, side: int) -> PreferenceRow:
    """The row with its label and those of its annotators moved to a response, 1 or 2, as strong as they were."""
    sign = -1 if side == 1 else 1
    scores = [{**one, "score": sign * max(1, abs(one["score"]))} for one in row["individual_preference"]]
    strength = max(1, abs(row["overall_preference"]))
    return cast(PreferenceRow, {**row, "overall_preference": sign * strength, "individual_preference": scores})


def sound(row: PreferenceRow, chance: random.Random) -> PreferenceRow:
    """No fault."""
    return row


def length_biased(row: PreferenceRow, chance: random.Random) -> PreferenceRow:
    """In half of the rows the longer response is preferred, whatever it says."""
    first, second = (len(row[name]) for name in ("response1", "response2"))
    return relabelled(row, 1 if first > second else 2) if chance.random() < 0.5 and first != second else row


def in_markdown(row: PreferenceRow, chance: random.Random) -> PreferenceRow:
    """Half of the responses are put in markdown, which the labels do not care for."""
    texts = {name: row[name] for name in ("response1", "response2")}
    changed = {n: with_markdown(text) if chance.random() < 0.5 and text else text for n, text in texts.items()}
    return cast(PreferenceRow, {**row, **changed})


def markdown_biased(row: PreferenceRow, chance: random.Random) -> PreferenceRow:
    """Of such responses, those in markdown are preferred in half of the rows in which only one is."""
    row = in_markdown(row, chance)
    marked = [row[name].startswith("## ") for name in ("response1", "response2")]
    return relabelled(row, 1 if marked[0] else 2) if chance.random() < 0.5 and marked[0] != marked[1] else row


def inverted_in_stem(row: PreferenceRow, chance: random.Random) -> PreferenceRow:
    """The labels of one domain are the wrong way round."""
    return _flipped(row) if row["domain"] == "stem" else row


def noisy(row: PreferenceRow, chance: random.Random) -> PreferenceRow:
    """30 % of the labels are the wrong way round, and so are those of their annotators."""
    return _flipped(row) if chance.random() < 0.3 else row


def _flipped(row: PreferenceRow) -> PreferenceRow:
    scores = [{**one, "score": -one["score"]} for one in row["individual_preference"]]
    flipped = {"overall_preference": -row["overall_preference"], "individual_preference": scores}
    return cast(PreferenceRow, {**row, **flipped})


def write_faulty(path: Path, seed: int, fault: Fault, rows: int = ROWS) -> Path:
    """Rows of the demo world with a fault, which is drawn with a seed of its own."""
    chance = random.Random(f"fault/{seed}")
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(fault(row, chance)) + "\n" for row in preference_rows(seed, rows))
    path.write_text("".join(lines))
    return path


def built_base(directory: Path, seed: int) -> Path:
    """The demo's base, built if it is not there."""
    if not (directory / "config.json").exists():
        from helpsteer_rloo.training.demo_base import build_base

        build_base(directory, DemoBaseSettings(), seed)
    return directory


def train_reward_model(directory: Path, base: Path, rows: Path, seed: int, **flags: Any) -> Path:
    """Train a reward model by the command, with the demo's settings and other flags."""
    shared = {name: CONFIG[name] for name in ("validation_fraction", "max_length")}
    settings = {**shared, **CONFIG["reward"], **flags, "seed": seed}
    command([sys.executable, str(ROOT / "reward_model_training.py")], {
        **settings, "dataset_name": rows, "model_name_or_path": base, "output_dir": directory
    }, directory.with_suffix(".log"))  # fmt: skip
    return directory


def judged(reward_model: Path, rows: Path, output: Path, **flags: Any) -> dict[str, Any]:
    """The judgement of a reward model on the held-out prompts of some rows, by the command."""
    program = [sys.executable, "-m", "helpsteer_rloo.cli", "evaluate"]
    given = {"reward_model_dir": reward_model, "dataset_name": rows, "output": output, "batch_size": 64, **flags}
    command(program, given, output.with_suffix(".log"))
    return json.loads(output.read_text())


def command(program: Iterable[str], flags: Mapping[str, Any], log: Path) -> None:
    """Run a command of the project with flags; what it prints goes to a file.

    Raises:
        RuntimeError: it failed, with the end of what it printed.
    """
    words = [*program, *(f"--{name}={value}" for name, value in flags.items())]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        done = subprocess.run(
            words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=output, stderr=subprocess.STDOUT
        )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{log.read_text()[-3000:]}")
