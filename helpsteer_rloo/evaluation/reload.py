"""Proof that a saved reward model is the trained one: a fresh process with stock libraries gives the same scores."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from helpsteer_rloo.evaluation import stock_scores

TOLERANCE = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}
"""Largest difference, in score units, that the arithmetic of each type can explain."""


def check_reload(
    directory: str | Path, sequences: Sequence[Sequence[int]], expected: Sequence[float], base: Mapping[str, Any]
) -> float:
    """Score `sequences` with the saved model in a fresh process and compare with the trained model's scores.

    `base` tells how the base model's weights are held (`helpsteer_rloo.model.loading.Base` as a dictionary).

    Returns:
        The largest absolute difference.

    Raises:
        ValueError: the directory does not load, or the scores differ by more than `TOLERANCE`.
    """
    with tempfile.TemporaryDirectory() as folder:
        ids_file = Path(folder) / "ids.json"
        ids_file.write_text(json.dumps([list(ids) for ids in sequences]), encoding="utf-8")
        base_file = Path(folder) / "base.json"
        base_file.write_text(json.dumps(dict(base)), encoding="utf-8")
        command = [sys.executable, str(stock_scores.__file__), str(directory), str(ids_file), str(base_file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"The saved reward model in {directory} does not load in a fresh process:\n{done.stderr}")
    scores = json.loads(done.stdout.strip().splitlines()[-1])
    difference = max(abs(a - b) for a, b in zip(scores, expected, strict=True))
    if not difference <= TOLERANCE[base["dtype"]]:
        raise ValueError(
            f"The reward model saved in {directory} does not give the trained model's scores: they differ by "
            f"{difference:.3g} on a fixed sample of {len(expected)}. The directory must not be used."
        )
    return difference
