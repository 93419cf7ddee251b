"""The parent of a benchmark: children in turn, medians, checks, and one JSON line a row.

Every side runs in a process of its own, ours / TRL / ours / TRL …, with the same environment, so that peak memory is
that side's alone and a busy machine slows both alike. This module imports nothing heavy.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SIDES = ("ours", "trl")
GEMM_RATES = ("gemm_flops", "fastest_gemm_flops")
"""Operations a second of large matrix products: of `torch.mm`, and of oneDNN where it is faster."""
Run = dict[str, Any]
Spec = dict[str, Any]
_ROOT = Path(__file__).resolve().parents[1]
_STDERR_SHOWN = 6000


@dataclass(frozen=True)
class Options:
    """What every benchmark takes on its command line."""

    pairs: int
    steps: int
    threads: int
    seed: int
    quick: bool
    only: str
    huge_pages: bool
    output: Path | None
    published: list[str] = field(default_factory=list[str])
    """Names of the rows that are measured so far."""


def parse(description: str, argv: Sequence[str] | None = None) -> Options:
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--pairs", type=int, default=3, help="runs of each side, interleaved (default: 3)")
    parser.add_argument("--steps", type=int, default=2, help="timed optimizer steps a run (default: 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of each run (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of models, data and sampling (default: 0)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one pair, one row of each benchmark")
    parser.add_argument("--only", default="", help="only rows whose name contains this")
    parser.add_argument(
        "--huge_pages", action="store_true", help="as the project's own command asks for, on both sides"
    )
    parser.add_argument("--output", type=Path, help="append the JSON lines to this file as well")
    given = parser.parse_args(argv)
    if min(given.pairs, given.steps, given.threads) < 1:
        parser.error("--pairs, --steps and --threads are at least 1")
    if given.quick:
        given.pairs = given.steps = 1
    if given.output:
        try:
            given.output.open("a", encoding="utf-8").close()
        except OSError as error:
            parser.error(f"--output: nothing can be written there: {error}")
    return Options(**vars(given))


def selected(specs: Sequence[Spec], options: Options) -> list[Spec]:
    """The rows that `--only` leaves, with `--quick` the first of them, told the steps and seed to use."""
    found = [spec for spec in specs if options.only in spec["name"]]
    common = {"steps": options.steps, "seed": options.seed, "quick": options.quick}
    suffix = "-huge-pages" if options.huge_pages else ""
    return [spec | common | {"name": spec["name"] + suffix} for spec in (found[:1] if options.quick else found)]


def run_child(module: str, spec: Spec, options: Options) -> Run:
    """Measure one side in a process of its own.

    Raises:
        RuntimeError: the process failed; the message ends with the last of what it wrote to stderr.
    """
    threads_text = str(options.threads)
    settings = {
        "OMP_NUM_THREADS": threads_text,
        "MKL_NUM_THREADS": threads_text,
        "THP_MEM_ALLOC_ENABLE": str(int(options.huge_pages)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
    }
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.child", module, json.dumps(spec)]
    with tempfile.TemporaryFile("w+") as errors:
        done = subprocess.run(
            command, cwd=_ROOT, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        if done.returncode:
            errors.seek(0)
            raise RuntimeError(f"{module} failed with {spec}\n{errors.read()[-_STDERR_SHOWN:]}")
    return json.loads(done.stdout)


def interleaved(module: str, spec: Spec, options: Options) -> dict[str, list[Run]]:
    """Runs of both sides in turn, ours first."""
    runs: dict[str, list[Run]] = {side: [] for side in SIDES}
    for number in range(options.pairs):
        for side in SIDES:
            run = run_child(module, {**spec, "side": side}, options)
            runs[side].append(run)
            say(f"  {spec['name']} {number + 1}/{options.pairs} {side}: {run['seconds']:.2f} s a step")
    return runs


def comparison(spec: Spec, runs: Mapping[str, Sequence[Run]], options: Options) -> dict[str, Any]:
    """The row of a comparison: medians over the runs; seconds and tokens are of one optimizer step.

    `peak_bytes_*` is the peak resident memory of the whole process; `peak_above_imports_bytes_*` is what it is over
    the memory that the imported libraries took, and `peak_above_model_bytes_*` over libraries and models.
    `flops_fraction_of_gemm_peak` counts what a step of ours needs at the least, against the rate of `torch.mm`, which
    is not the fastest that every machine has: `flops_fraction_of_fastest_gemm` is against that. Under gradient
    checkpointing the body's linear layers run a second time, which `flops_fraction_with_recomputation` counts too.
    """
    ours, trl = runs["ours"], runs["trl"]
    row: dict[str, Any] = {
        "name": spec["name"],
        "ours": median(ours, "seconds"),
        "trl": median(trl, "seconds"),
        "ratio": median(trl, "seconds") / median(ours, "seconds"),
        "pair_ratios": [theirs["seconds"] / own["seconds"] for own, theirs in zip(ours, trl, strict=True)],
    }
    for side in SIDES:
        row[f"peak_bytes_{side}"] = round(median(runs[side], "peak_bytes"))
    row["peak_ratio"] = row["peak_bytes_ours"] / row["peak_bytes_trl"]
    for side in SIDES:
        row[f"tokens_{side}"] = median(runs[side], "tokens")
    row["flops_fraction_of_gemm_peak"] = statistics.median(_flops_fraction(run, run["flops"]) for run in ours)
    row["flops_fraction_of_fastest_gemm"] = row["flops_fraction_of_gemm_peak"] * share_of_fastest(ours)
    row["flops_fraction_with_recomputation"] = statistics.median(
        _flops_fraction(run, run["flops"] + run["recomputed_flops"]) for run in ours
    )
    for side in SIDES:
        for base in ("imports", "model"):
            above = statistics.median(run["peak_bytes"] - run[f"{base}_bytes"] for run in runs[side])
            row[f"peak_above_{base}_bytes_{side}"] = round(above)
        row[f"phase_seconds_{side}"] = medians(runs[side], "phase_seconds")
        row[f"phase_tokens_{side}"] = medians(runs[side], "phase_tokens")
    return row | _circumstances(spec, [*ours, *trl], options)


def _flops_fraction(run: Run, flops: float) -> float:
    """Share of the GEMM rate that these operations of a step reached, sampling left out."""
    return flops / run["flops_seconds"] / statistics.mean(run["gemm_flops"])


def share_of_fastest(runs: Sequence[Run]) -> float:
    """The GEMM rate of `torch.mm` over the fastest one, that of oneDNN where it is higher."""
    rates = [statistics.mean([rate for run in runs for rate in run[name]]) for name in GEMM_RATES]
    return rates[0] / rates[1]


def _circumstances(spec: Spec, runs: Sequence[Run], options: Options) -> dict[str, Any]:
    rates = {name: [rate for run in runs for rate in run[name]] for name in GEMM_RATES}
    return {
        **{name: statistics.median(found) for name, found in rates.items()},
        **{f"{name}_range": [min(found), max(found)] for name, found in rates.items()},
        "copy_bytes_per_second": median(runs, "copy_bytes_per_second"),
        "pairs": options.pairs,
        "steps": options.steps,
        "threads": options.threads,
        "huge_pages": options.huge_pages,
        "seed": options.seed,
        "quick": options.quick,
        "spec": spec,
        "versions": runs[0]["versions"],
    }


def median(runs: Sequence[Run], key: str) -> float:
    """Median of a number over runs."""
    return statistics.median(run[key] for run in runs)


def medians(runs: Sequence[Run], key: str) -> dict[str, float]:
    """Medians over runs of every number in a table, those of a phase that a run has not got counting as zero."""
    names = sorted({name for run in runs for name in run[key]})
    return {name: statistics.median(run[key].get(name, 0.0) for run in runs) for name in names}


def require_equal(what: str, ours: Sequence[float], trl: Sequence[float], tolerance: float) -> float:
    """The largest difference between two lists of numbers.

    Raises:
        ValueError: it is over the tolerance, so the two sides did not compute the same thing.
    """
    if len(ours) != len(trl) or not ours:
        raise ValueError(f"{what}: {len(ours)} numbers of ours and {len(trl)} of TRL's cannot be compared.")
    difference = max(abs(own - theirs) for own, theirs in zip(ours, trl, strict=True))
    if not difference <= tolerance:
        raise ValueError(f"{what} differ by {difference:.3g}, more than {tolerance:.3g}: ours {ours}, TRL's {trl}.")
    return difference


def publish(row: Mapping[str, Any], options: Options) -> None:
    """Print a row as one JSON line, and append it to the file of `--output`."""
    options.published.append(row["name"])
    line = json.dumps(row)
    print(line, flush=True)
    if options.output:
        with options.output.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def main(description: str, benchmark: Callable[[Options], None], argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run a benchmark."""
    options = parse(description, argv)
    given = {key: value for key, value in asdict(options).items() if key != "published"}
    say(f"{description} ({', '.join(f'{key}={value}' for key, value in given.items())})")
    if options.quick:
        say("--quick shows that it runs; its sizes are tiny, and its numbers mean nothing.")
    benchmark(options)
    if not options.published:
        sys.exit(f"error: --only {options.only!r} is in no row's name; the tables of docs/performance.md have them.")


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)
