"""`metrics.jsonl`: what a training logs, kept beside its checkpoints, so that it can be looked at as it grows."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback

from helpsteer_rloo.checkpoints import logged, step_of
from helpsteer_rloo.processes import peak_memory
from helpsteer_rloo.run_dir import METRICS, json_lines, read_lines, require_file, write_text
from helpsteer_rloo.training.ledger import number_or_none

_OF_A_WHOLE_CALL = "train_runtime"
"""In what transformers logs at the end of a call of `train`: means over that call, whatever part of the run it was."""


class MetricsLog(TrainerCallback):
    """Appends every line that a trainer logs to `metrics.jsonl`, as JSON, with its `step`.

    What depends on the machine and the moment stands apart, in `machine`: `time` (seconds since 1970), `step_seconds`
    (mean of the steps since the last line, without measurements and checkpoints between them), `tokens_per_second` (of
    all processes together) and `peak_memory_bytes` (of the GPU, without one of the process), the times and the memory
    of the main process. The rest of the file is the same whether a run was interrupted or not.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._began = 0.0
        self._seconds: list[float] = []
        self._counted: Mapping[str, Any] = {}

    def begin(self, checkpoint: Path | None) -> None:
        """Drop the lines behind the checkpoint that training goes on from, and a last one that was not finished.

        A run that began without this file has the lines that its checkpoint keeps, without `machine`.
        """
        if self._path.exists():
            require_file(self._path)
        step = step_of(checkpoint) if checkpoint else 0
        rows = self._rows_so_far(checkpoint) if checkpoint else []
        kept = [row for row in rows if isinstance(row.get("step"), int) and row["step"] <= step]
        self._counted = next((row for row in reversed(kept) if "num_tokens" in row), {})
        write_text(self._path, json_lines(kept))

    def _rows_so_far(self, checkpoint: Path) -> list[dict[str, Any]]:
        if self._path.exists():
            return read_lines(self._path)[0]
        rows = (row for row in logged(checkpoint) if _OF_A_WHOLE_CALL not in row)
        return [{"step": row.get("step"), **{name: _plain(value) for name, value in row.items()}} for row in rows]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when a step begins."""
        self._began = time.monotonic()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note how long it took; what other callbacks do after it is no part of it."""
        self._seconds.append(time.monotonic() - self._began)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Append a line, and see that it is on the disk before a checkpoint of this step can be."""
        if not state.is_world_process_zero or logs is None or _OF_A_WHOLE_CALL in logs:
            return
        metrics = {name: _plain(value) for name, value in logs.items()}
        row = {"step": state.global_step, **metrics, "machine": self._machine(state.global_step, metrics)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json_lines([row]))
            file.flush()
            os.fsync(file.fileno())
        self._seconds = []
        if "num_tokens" in metrics:  # which rows of an evaluation have not
            self._counted = row

    def _machine(self, step: int, metrics: Mapping[str, Any]) -> dict[str, float | None]:
        mean = sum(self._seconds) / len(self._seconds) if self._seconds else None
        steps = step - self._counted.get("step", 0)
        tokens = metrics.get("num_tokens", 0) - self._counted.get("num_tokens", 0)
        rate = tokens / steps / mean if mean and steps and "num_tokens" in metrics else None
        return {
            "time": round(time.time(), 3),
            "step_seconds": mean,
            "tokens_per_second": rate,
            "peak_memory_bytes": peak_memory(),
        }


def _plain(value: Any) -> Any:
    """A logged value for JSON: a number, or the text of anything else."""
    if isinstance(value, bool | int | str) or value is None:
        return value
    try:
        return number_or_none(float(value))
    except (TypeError, ValueError):
        return str(value)


def record_metrics(trainer: Trainer, checkpoint: Path | None) -> None:
    """Let a trainer, which goes on from a checkpoint or begins, record what it logs beside its checkpoints."""
    log = MetricsLog(Path(str(trainer.args.output_dir)) / METRICS)
    if trainer.is_world_process_zero():
        log.begin(checkpoint)
    trainer.add_callback(log)
