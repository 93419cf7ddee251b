"""The ledger of rollouts: one JSON line a completion, with everything its advantage was computed from."""

import gzip
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from helpsteer_rloo.run_dir import json_lines, read_steps, step_file, write_bytes


@dataclass(frozen=True, slots=True)
class Entry:
    """One completion.

    `scores` holds each reward source's raw score, `None` where it gave none; `score` is their weighted, clipped sum.
    reward = score - missing_eos_penalty - length_penalty - kl_coef * kl, and `advantage` is the reward's leave-one-out
    advantage in its `group` (normalized, if the run normalizes). `sampled_log_probs` has a value for each token, in
    nats, under the distribution that it was drawn from; `None` if the sampler does not tell. `kl` is the estimate
    summed over the completion's tokens, in nats; `kl_coef` is 0 where KL stands in the loss. What is not finite, and so
    was not trained on, is `None`.
    """

    step: int
    group: int
    index: int
    prompt_ids: list[int]
    completion_ids: list[int]
    sampled_log_probs: list[float] | None
    text: str
    finish_reason: str
    scores: dict[str, float | None]
    score: float | None
    missing_eos_penalty: float
    length_penalty: float
    kl: float | None
    kl_coef: float
    reward: float | None
    advantage: float | None


def write_rollout(directory: Path, step: int, entries: Iterable[Entry]) -> Path:
    """Write one batch of rollouts as `step-<optimizer step>.jsonl.gz`, atomically.

    A run that goes on from a checkpoint samples the steps behind it again and replaces their files.
    """
    return write_step(directory, step, map(asdict, entries))


def write_step(directory: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write the rows of an optimizer step as JSON lines, atomically."""
    directory.mkdir(parents=True, exist_ok=True)
    path = step_file(directory, step)
    write_bytes(path, gzip.compress(json_lines(rows).encode("utf-8", "surrogatepass"), mtime=0))
    return path


def read_rollouts(directory: Path) -> list[Entry]:
    """All entries of a ledger in the order of their steps."""
    return [Entry(**row) for rows in read_steps(directory).values() for row in rows]


def discard_rollouts_from(directory: Path, step: int) -> int:
    """Remove the files of optimizer steps from `step` on, which a restart will sample again; return their number."""
    stale = [path for path in directory.glob("step-*.jsonl.gz") if int(path.name[5:11]) >= step]
    for path in stale:
        path.unlink()
    return len(stale)


def number_or_none(value: float) -> float | None:
    """A float for JSON: NaN, which marks a missing reward, and infinities become null."""
    return value if math.isfinite(value) else None
