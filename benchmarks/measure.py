"""Measuring inside a child process: time and phases of `trainer.train()`, tokens, memory, and the machine's rates."""

import functools
import importlib.metadata
import itertools
import platform
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model

from helpsteer_rloo.model.products import product

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate")
_STATUS = Path("/proc/self/status")


@dataclass
class Clock:
    """Seconds and tokens by phase, of the timed steps only.

    A phase is a method of the trainer ("compute_loss", "accelerator.backward"). Time counts for the innermost phase
    that is running; the rest is "other": the optimizer, collation and the loop itself. Tokens are the ids that go
    through the embedding of a model's body in a forward pass, padding included; recomputation under gradient
    checkpointing does not pass there again.
    """

    phases: dict[str, str | Callable[[], str]]
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    tokens: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    losses: list[float] = field(default_factory=list)
    step_ends: list[float] = field(default_factory=list)
    _running: list[str] = field(default_factory=lambda: ["other"])
    _since: float = field(default_factory=time.perf_counter)
    _loss: float = 0.0

    def attach(self, trainer: Trainer) -> None:
        """Time the phases of a trainer, and collect the loss of every optimizer step."""
        for path, phase in self.phases.items():
            *owners, name = path.split(".")
            owner = functools.reduce(getattr, owners, trainer)
            setattr(owner, name, self._timed(getattr(owner, name), phase))
        trainer.training_step = self._with_loss(trainer.training_step)

    def count(self, bodies: Iterable[Qwen3Model]) -> None:
        """Count the tokens that go through these bodies."""
        for body in bodies:
            body.embed_tokens.register_forward_pre_hook(self._count)

    def start(self) -> None:
        """Forget what was measured up to the end of the last step, which only warmed up."""
        self.seconds.clear()
        self.tokens.clear()

    def end_step(self) -> None:
        """One optimizer step is over."""
        self._switch()
        self.step_ends.append(self._since)
        self.losses.append(self._loss)
        self._loss = 0.0

    def _count(self, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.tokens[self._running[-1]] += args[0].numel()

    def _switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def _timed(self, method: Callable[..., Any], phase: str | Callable[[], str]) -> Callable[..., Any]:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._running.append(phase if isinstance(phase, str) else phase())
            try:
                return method(*args, **kwargs)
            finally:
                self._switch()
                self._running.pop()

        return timed

    def _with_loss(self, training_step: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(training_step)
        def stepped(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss = training_step(*args, **kwargs)
            self._loss += float(loss)
            return loss

        return stepped


class StepEnds(TrainerCallback):
    """Starts the clock after the steps that warm up, and tells it about every later one."""

    def __init__(self, clock: Clock, warm_up: int) -> None:
        """`warm_up` steps are not measured; at least one, for the time of a step runs from the end of the last."""
        self.clock, self.warm_up = clock, warm_up

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the trainer after the optimizer."""
        self.clock.end_step()
        if state.global_step == self.warm_up:
            self.clock.start()


def run(trainer: Trainer, models: Iterable[Any], clock: Clock, warm_up: int) -> dict[str, Any]:
    """Train, and return what was measured; numbers are means of one timed optimizer step.

    Tokens are counted in those of `models` that are modules; a reward function is none.

    A step lasts from the end of the step before to its own end, so collation and everything else the loop does counts.
    """
    clock.attach(trainer)
    clock.count(
        {
            body
            for model in models
            if isinstance(model, torch.nn.Module)
            for body in model.modules()
            if isinstance(body, Qwen3Model)
        }
    )
    trainer.add_callback(StepEnds(clock, warm_up))
    trainer.train()
    ends = clock.step_ends[warm_up - 1 :]
    steps = len(ends) - 1
    # The loop goes on after the last step's end; its time up to there is what the phases add up to.
    return {
        "seconds": (ends[-1] - ends[0]) / steps,
        "step_seconds": [after - before for before, after in itertools.pairwise(ends)],
        "phase_seconds": {phase: seconds / steps for phase, seconds in clock.seconds.items()},
        "tokens": sum(clock.tokens.values()) / steps,
        "phase_tokens": {phase: tokens / steps for phase, tokens in clock.tokens.items()},
        "losses": clock.losses,
        "grad_norms": [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row],
        "peak_bytes": peak_bytes(),
    }


def peak_bytes() -> int:
    """Peak resident memory of this process.

    Linux's VmHWM is used where there is one: `ru_maxrss` of a fresh process starts at the size of its parent.
    """
    if _STATUS.exists():
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Resident memory of this process now; its peak so far where the system does not tell."""
    return _status("VmRSS") if _STATUS.exists() else peak_bytes()


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def gemm_rates(dtype: torch.dtype, size: int) -> dict[str, float]:
    """Floating-point operations a second of a square matrix product, best of three after one to warm up.

    "gemm_flops" is that of `torch.mm`, which stock modules get; "fastest_gemm_flops" that of oneDNN where it is higher.
    """
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    out = torch.empty(size, size, dtype=dtype)
    rate = 2 * size**3 / _best(lambda: torch.mm(left, right, out=out))
    fastest = max(rate, 2 * size**3 / _best(lambda: product(left, right)))
    return {"gemm_flops": rate, "fastest_gemm_flops": fastest}


def joined(rates: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """What `gemm_rates` gave at several times, as a list for each rate."""
    return {name: [found[name] for found in rates] for name in rates[0]}


def copy_bytes_per_second(size: int = 2**25) -> float:
    """Bytes read and written a second when a buffer is copied, best of three after one to warm up."""
    source, target = torch.ones(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    return 2 * size / _best(lambda: target.copy_(source))


def _best(work: Callable[[], Any]) -> float:
    work()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that the numbers depend on."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **found}
