"""Proof that a saved model is the one in memory: a fresh process with stock libraries computes the same."""

import json
import subprocess
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from helpsteer_rloo.evaluation import stock_log_probs, stock_scores

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01, "float64": 1e-5}
"""Largest difference that the arithmetic of each type can explain, as a share of the largest score, or absolute where
all scores are below 1. A head that was lost is off by as much as the scores are large."""
EXACT = 1e-4
"""Largest difference of scores, or log-probabilities in nats, that were computed in float32 on both sides."""


def rounding(scores: Sequence[float], *dtypes: str) -> float:
    """Largest difference, in score units, that rounding can explain where scores are computed in some types.

    >>> rounding([-12.0, 3.0], "bfloat16", "float32"), rounding([0.5], "bfloat16")
    (0.6000000000000001, 0.05)
    """
    return max(TOLERANCE[dtype] for dtype in dtypes) * max([1.0, *map(abs, scores)])


class FreshProcess:
    """A process that imports stock libraries, waits for one question, and answers it; without one it ends with us."""

    def __init__(self, program: ModuleType) -> None:
        """Start a program, out of reach of a terminal's signals, which are meant for the process that asks."""
        self._process = subprocess.Popen(
            [sys.executable, str(program.__file__)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def answer(self, directory: str | Path, sequences: Sequence[Sequence[int]], base: Mapping[str, Any]) -> Any:
        """What the program finds of a saved model.

        Raises:
            ValueError: the directory does not load.
        """
        asked = {"directory": str(directory), "sequences": [list(ids) for ids in sequences], "base": dict(base)}
        output, errors = self._process.communicate(json.dumps(asked) + "\n")
        if self._process.returncode:
            raise ValueError(f"The saved model in {directory} does not load in a fresh process:\n{errors}")
        return json.loads(output.strip().splitlines()[-1])

    def end(self) -> None:
        """End the process, if it has not ended."""
        self._process.kill()
        with self._process:  # which closes its pipes, and waits for it
            pass


@contextmanager
def fresh_process(program: ModuleType) -> Generator[FreshProcess]:
    """A fresh process for as long as the context lasts; the sooner it starts, the sooner it answers."""
    process = FreshProcess(program)
    try:
        yield process
    finally:
        process.end()


def check_reload(
    directory: str | Path,
    sequences: Sequence[Sequence[int]],
    expected: Sequence[float],
    base: Mapping[str, Any],
    limit: float | None = None,
    process: FreshProcess | None = None,
) -> float:
    """Score `sequences` with the saved reward model in a fresh process and compare with the scores it should give.

    Args:
        directory: Where it was saved.
        sequences: Ids.
        expected: Their scores.
        base: How the base model's weights are held (`helpsteer_rloo.model.loading.Base` as a dictionary).
        limit: Largest difference allowed, in score units (default: `rounding` in the type of `base`).
        process: One that runs `stock_scores` and has not been asked yet (default: one that is started now).

    Returns:
        The largest absolute difference.

    Raises:
        ValueError: the directory does not load, or the scores differ by more than that.
    """
    answer = process.answer if process else partial(_in_a_fresh_process, stock_scores)
    scores = answer(directory, sequences, base)
    return _checked(directory, scores, expected, rounding(expected, base["dtype"]) if limit is None else limit)


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
    with fresh_process(program) as process:
        return process.answer(directory, sequences, base)


def _checked(directory: str | Path, found: Sequence[float], expected: Sequence[float], limit: float) -> float:
    differences = [abs(a - b) for a, b in zip(found, expected, strict=True)]
    if not all(difference <= limit for difference in differences):  # NaN is not
        raise ValueError(
            f"The model saved in {directory} does not give the scores of the one in memory: they differ by "
            f"{max(differences):.3g} on a fixed sample of {len(expected)}, where {limit:.3g} can be explained. The "
            "directory must not be used."
        )
    return max(differences)
