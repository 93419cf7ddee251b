"""Losses of every step with 1, 2 and 4 processes, DDP and FSDP2, in both stages: they are to be the same.

`python -m benchmarks.processes` prints a table a stage and, as JSON lines, the largest difference to one process of
every number that is logged. The processes run on CPUs with gloo, a thread each; `benchmarks.process_curves` is what
they do. It takes about a minute and a half on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
Curves = dict[str, list[dict[str, float]]]
"""By stage, what was logged after every step."""
KINDS = ("ddp", "fsdp2")
SMALLEST = 1e-3
"""Differences are relative to a value, or to this where the value is less; a loss can be 0."""


def launched(directory: Path, count: int, kind: str = "ddp", steps: int = 8) -> Curves:
    """The curves of `count` processes, launched as a user would; they go on from a checkpoint in the directory.

    Raises:
        RuntimeError: one failed, with the end of what they wrote.
    """
    directory.mkdir(parents=True, exist_ok=True)
    work = ["-m", "benchmarks.process_curves", str(directory), f"--steps={steps}"]
    command = [sys.executable, *work]
    if count > 1:
        config = ROOT / "configs" / "accelerate" / f"{kind}.yaml"
        launch = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={config}"]
        port = ["--main_process_port=0"]  # any that is free
        command = [*launch, f"--num_processes={count}", "--mixed_precision=no", *port, *work]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads((directory / "curves.json").read_text())


def difference(expected: list[dict[str, float]], found: list[dict[str, float]]) -> float:
    """The largest relative difference of a number in any step.

    Raises:
        ValueError: there are other steps or other numbers.
    """
    return max(
        abs(row[name] - other[name]) / max(abs(row[name]), SMALLEST)
        for row, other in zip(expected, found, strict=True)
        for name in row.keys() | other.keys()
    )


def table(stage: str, runs: dict[str, Curves]) -> str:
    """The losses of a stage in Markdown, a row a step and a column a run."""
    lines = [f"| {stage}, step | " + " | ".join(runs) + " |", "|---" * (len(runs) + 1) + "|"]
    columns = [[row["loss"] for row in curves[stage]] for curves in runs.values()]
    for step, losses in enumerate(zip(*columns, strict=True), start=1):
        lines.append(f"| {step} | " + " | ".join(f"{loss:.7f}" for loss in losses) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run all, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="append the rows to this file as JSON lines")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = {"1 process": launched(Path(scratch) / "1", 1)}
        for count, kind in ((count, kind) for count in (2, 4) for kind in KINDS):
            runs[f"{count}, {kind.upper()}"] = launched(Path(scratch) / f"{count}-{kind}", count, kind)
    alone = runs["1 process"]
    for stage in alone:
        print(table(stage, runs), end="\n\n")
    for name, curves in runs.items():
        for stage, expected in alone.items():
            row = {"name": f"processes/{stage}, {name}", "largest_difference": difference(expected, curves[stage])}
            print(json.dumps(row))
            if options.output:
                with options.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
