"""Kill a small run at random moments, give the same command again, and compare its end with that of an undisturbed one.

`make chaos`, or `python -m tests.chaos --kills 40 --seed 1`: a world and a base model are made once; then two lanes, a
thread each, take `configs/chaos.yaml` through `train_pipeline.py`, once undisturbed and then again and again with kills
(`SIGKILL` to the whole process group; now and then `SIGTERM`, which lets it save) until there were enough of them.
Weights, ledger, answers, logged metrics and the numbers of `summary.json` must be equal, byte by byte.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpsteer_rloo.checkpoints import SEAL
from helpsteer_rloo.data.demo import DemoBaseSettings, write_rows
from helpsteer_rloo.preemption import STOPPED
from helpsteer_rloo.run_dir import METRICS

ROOT = Path(__file__).resolve().parent.parent
BASE = DemoBaseSettings(hidden_size=64, intermediate_size=192, layers=2, clean_steps=60, mixed_steps=30)
ROWS = 1600
LONGEST_LIFE = 16.0
"""Seconds that a run lives at most before it is killed; six or seven of them go by before its first step."""
TERMINATED = 0.2
"""Share of the kills that are a `SIGTERM`."""
HANGING = 300.0
"""Seconds after which a run is taken to hang."""
EXPECTED = {0, -signal.SIGKILL, -signal.SIGTERM, STOPPED}
OF_THE_CLOCK = ("seconds", "provenance", "runtime", "per_second", "step_time", "train_loss", "machine")
"""Ends of the names of numbers that tell how long something took, when it was, or what one process alone did."""


@dataclass
class Record:
    """What happened so far, in all lanes."""

    goal: int
    kills: Counter[str] = field(default_factory=Counter)
    resumed: int = 0
    half_written: int = 0
    rounds: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def enough(self) -> bool:
        return self.kills.total() >= self.goal


def make_world(directory: Path) -> None:
    """Rows and a base model to train on; in a process of its own, so that this one stays small."""
    code = "import sys; from tests.chaos import build; build(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(directory)], cwd=ROOT, check=True, capture_output=True)


def build(directory: str) -> None:
    """Write the rows and build the base."""
    from helpsteer_rloo.training.demo_base import build_base

    write_rows(Path(directory) / "rows.jsonl", 1, ROWS)
    build_base(Path(directory) / "base", BASE, 1)


def start(world: Path, lane: Path) -> subprocess.Popen[str]:
    """The command, the same every time, in a process group of its own."""
    command = [sys.executable, str(ROOT / "train_pipeline.py"), "--config", str(ROOT / "configs" / "chaos.yaml")]
    command += [f"--dataset_name={world / 'rows.jsonl'}", f"--model_name_or_path={world / 'base'}"]
    with (lane / "output.txt").open("w") as output:
        return subprocess.Popen(
            command,
            cwd=lane,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )


def live(world: Path, lane: Path, record: Record, chance: random.Random) -> bool:
    """Start the run and let it live for a while, or to its end; whether it came to that."""
    process = start(world, lane)
    life = HANGING if record.enough else chance.uniform(0.5, LONGEST_LIFE)
    try:
        process.wait(life)
    except subprocess.TimeoutExpired:
        if life == HANGING:
            record.differences.append(f"{lane.name}: hangs")
        kill(process, lane, record, chance)
    status = process.returncode
    if status not in EXPECTED:
        raise SystemExit(f"exit status {status}:\n{(lane / 'output.txt').read_text()[-3000:]}")
    return status == 0


def kill(process: subprocess.Popen[str], lane: Path, record: Record, chance: random.Random) -> None:
    """End a run by a signal, and note where it was, unless the signal came too late."""
    by_term = chance.random() < TERMINATED
    os.killpg(process.pid, signal.SIGTERM if by_term else signal.SIGKILL)
    if process.wait(HANGING) == 0:  # it had just come to its end
        return
    started = sorted((lane / "run" / "stages").glob("*.started.json"))
    where = started[-1].name.removesuffix(".started.json") if started else "between stages"
    record.kills[f"{'SIGTERM' if by_term else 'SIGKILL'} in {where}"] += 1
    unsealed = [path for path in lane.glob("run/*/checkpoint-*") if not (path / SEAL).exists()]
    record.half_written += bool(unsealed or list(lane.rglob(".*.json.*")))


def results(run: Path) -> dict[str, Any]:
    """Everything that must be the same: files by name, and numbers without those of the clock."""
    files = [*run.glob("*/*.safetensors"), *run.glob("rollouts/*.gz"), *run.glob("*.jsonl"), run / "data.json"]
    found: dict[str, Any] = {str(path.relative_to(run)): path.read_bytes() for path in sorted(files)}
    found["summary.json"] = timeless(json.loads((run / "summary.json").read_text()))
    for stage in ("reward_model", "policy"):
        lines = (run / stage / METRICS).read_text().splitlines()
        found[f"{stage}: {METRICS}"] = timeless([json.loads(line) for line in lines])
        last = max(run.glob(f"{stage}/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
        state = json.loads((last / "trainer_state.json").read_text())
        found[f"{stage}: logged"] = timeless(state["log_history"])
    return found


def timeless(value: Any) -> Any:
    """A JSON value without what depends on the clock."""
    if isinstance(value, dict):
        return {name: timeless(inner) for name, inner in value.items() if not name.endswith(OF_THE_CLOCK)}
    return [timeless(inner) for inner in value] if isinstance(value, list) else value


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """Names of what is not the same, or not there."""
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


def drive(world: Path, lane: Path, record: Record, seed: int) -> None:
    """One lane: the undisturbed run, then runs with kills until there are enough of them in all lanes."""
    chance = random.Random(seed)
    lane.mkdir()
    undisturbed = start(world, lane)
    if undisturbed.wait(HANGING) != 0:
        raise SystemExit((lane / "output.txt").read_text()[-3000:])
    expected = results(lane / "run")
    while not record.enough:
        shutil.rmtree(lane / "run")
        while not live(world, lane, record, chance):
            record.resumed += 1
        found = differences(expected, results(lane / "run"))
        record.differences += [f"{lane.name}, round {record.rounds}: {name}" for name in found]
        record.rounds += 1
        print(f"round {record.rounds}: kills so far {record.kills.total()}, differences {found}", flush=True)


def main() -> None:
    """Run the lanes and report; exit status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="how many there are to be at least")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30), help="of the moments")
    parser.add_argument("--lanes", type=int, default=2, help="runs at the same time, one thread each")
    options = parser.parse_args()
    record, begin = Record(options.kills), time.monotonic()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch) / "world"
        world.mkdir()
        make_world(world)
        with ThreadPoolExecutor(options.lanes) as pool:
            lanes = [
                pool.submit(drive, world, Path(scratch) / f"lane-{n}", record, options.seed + n)
                for n in range(options.lanes)
            ]
            for lane in lanes:
                lane.result()
    for what, count in sorted(record.kills.items()):
        print(f"  {what}: {count}")
    print(f"  left a half-written file or checkpoint: {record.half_written}")
    print(f"  rounds {record.rounds}, {time.monotonic() - begin:.0f} s")
    for line in record.differences:
        print(f"  DIFFERENT: {line}")
    identical = not record.differences
    print(f"kills {record.kills.total()}, resumed {record.resumed}, identical {str(identical).lower()}")
    sys.exit(not identical)


if __name__ == "__main__":
    main()
