"""The demo with either engine in turn, three seeds: seconds of its training stages, and how good their results are.

Both engines stand on bases with the same weights. Seconds are those of the stages as the run recorded them, with
loading, saving and verification by reload; quality is the demo's known one, on held-out prompts, after less before.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks import harness
from benchmarks.harness import Options, Run

ENGINES = {"ours": "packed", "trl": "trl"}
STAGES = {"reward": "reward_model", "rloo": "rloo"}
SEEDS = 3
LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")
_CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"


def benchmark(options: Options) -> None:
    """Run the demo with seeds from `--seed` + 1 on, one after the other with both engines."""
    for seed in range(options.seed + 1, options.seed + 1 + (1 if options.quick else SEEDS)):
        name = f"demo/seed{seed}"
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as directory:
            runs = {side: _run(Path(directory), side, seed, options) for side in harness.SIDES}
        if runs["ours"]["base"] != runs["trl"]["base"]:
            raise ValueError(f"{name}: the two runs stand on different bases.")
        harness.publish(_row(name, seed, runs, options), options)


def _run(directory: Path, side: str, seed: int, options: Options) -> Run:
    """The demo with one engine, in a directory of its own.

    Raises:
        RuntimeError: it failed; the message ends with the last of what it wrote.
    """
    config = directory / f"{side}.yaml"
    config.write_text(yaml.safe_dump(_settings(options.quick)), encoding="utf-8")
    command = [sys.executable, "-m", "helpsteer_rloo.cli", "demo", "--config", config, "--seed", str(seed)]
    command += ["--output_dir", directory / side, "--engine", ENGINES[side], "--guard", "false"]
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    done = subprocess.run(
        command, env={**os.environ, **threads}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"The demo failed with seed {seed} and engine {ENGINES[side]}.\n{done.stdout[-6000:]}")
    summary = json.loads((directory / side / "summary.json").read_text(encoding="utf-8"))
    seconds = {stage: summary["seconds"][name] for stage, name in STAGES.items()}
    harness.say(f"  seed {seed} {side}: {seconds}")
    base = hashlib.sha256((directory / side / "base" / "model.safetensors").read_bytes()).hexdigest()
    return {"summary": summary, "seconds": seconds, "base": base}


def _settings(quick: bool) -> dict[str, Any]:
    settings = yaml.safe_load(_CONFIG.read_text(encoding="utf-8"))
    if quick:
        settings |= {"evaluation_prompts": 16, "allow_weak_reward_model": True}
        settings["demo"] = {"rows": 400, "base": {"clean_steps": 10, "mixed_steps": 5}}
        settings["rloo"]["total_episodes"] = 128
    return settings


def _row(name: str, seed: int, runs: dict[str, Run], options: Options) -> dict[str, Any]:
    """The stages of both engines, and what came of them; `ours`, `trl` and `ratio` are of both stages together."""
    totals = {side: sum(run["seconds"].values()) for side, run in runs.items()}
    row: dict[str, Any] = {"name": name, **totals, "ratio": totals["trl"] / totals["ours"]}
    for stage in STAGES:
        row |= {f"{stage}_seconds_{side}": run["seconds"][stage] for side, run in runs.items()}
        row[f"{stage}_ratio"] = row[f"{stage}_seconds_trl"] / row[f"{stage}_seconds_ours"]
    for side, run in runs.items():
        reward, policy = run["summary"]["reward_model"], run["summary"]["policy"]
        row[f"accuracy_{side}"] = reward["heldout_accuracy"]
        row[f"gold_before_{side}"] = policy["gold_before"]
        row[f"gold_change_{side}"] = policy["gold_change"]
        row[f"prompts_{side}"] = policy["prompts"]
    versions = {library: importlib.metadata.version(library) for library in LIBRARIES}
    return row | {"threads": options.threads, "seed": seed, "quick": options.quick, "versions": versions}


if __name__ == "__main__":
    harness.main("The demo's stages, ours against TRL's", benchmark)
