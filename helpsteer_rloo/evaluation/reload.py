"""Proof that a saved model is the one in memory: a fresh process with stock libraries computes the same."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from helpsteer_rloo.evaluation import stock_log_probs, stock_scores

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01, "float64": 1e-5}
"""Largest difference, in score units, that the arithmetic of each type can explain."""
EXACT = 1e-4
"""The same for scores or log-probabilities that were computed in float32 on both sides."""


def check_reload(
    directory: str | Path,
    sequences: Sequence[Sequence[int]],
    expected: Sequence[float],
    base: Mapping[str, Any],
    limit: float | None = None,
) -> float:
    """Score `sequences` with the saved reward model in a fresh process and compare with the scores it should give.

    Args:
        directory: Where it was saved.
        sequences: Ids.
        expected: Their scores.
        base: How the base model's weights are held (`helpsteer_rloo.model.loading.Base` as a dictionary).
        limit: Largest difference allowed (default: `TOLERANCE` of the type of `base`).

    Returns:
        The largest absolute difference.

    Raises:
        ValueError: the directory does not load, or the scores differ by more than that.
    """
    scores = _in_a_fresh_process(stock_scores, directory, sequences, base)
    return _checked(directory, scores, expected, TOLERANCE[base["dtype"]] if limit is None else limit)


def check_log_probs(
    directory: str | Path,
    sequences: Sequence[Sequence[int]],
    expected: Sequence[Sequence[float]],
    base: Mapping[str, Any],
    limit: float,
) -> float:
    """The same for a saved policy and the log-probabilities of the tokens after the first, in nats."""
    found = _in_a_fresh_process(stock_log_probs, directory, sequences, base)
    flat = [[value for own in side for value in own] for side in (found, expected)]
    return _checked(directory, flat[0], flat[1], limit)


def _in_a_fresh_process(
    program: ModuleType, directory: str | Path, sequences: Sequence[Sequence[int]], base: Mapping[str, Any]
) -> Any:
    """What a program of stock libraries prints of a saved model."""
    with tempfile.TemporaryDirectory() as folder:
        ids_file = Path(folder) / "ids.json"
        ids_file.write_text(json.dumps([list(ids) for ids in sequences]), encoding="utf-8")
        base_file = Path(folder) / "base.json"
        base_file.write_text(json.dumps(dict(base)), encoding="utf-8")
        command = [sys.executable, str(program.__file__), str(directory), str(ids_file), str(base_file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"The saved model in {directory} does not load in a fresh process:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _checked(directory: str | Path, found: Sequence[float], expected: Sequence[float], limit: float) -> float:
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    if not all(difference <= limit for difference in differences):  # NaN is not
        raise ValueError(
            f"The model saved in {directory} does not give the scores of the one in memory: they differ by "
            f"{max(differences):.3g} on a fixed sample of {len(expected)}. The directory must not be used."
        )
    return max(differences)
