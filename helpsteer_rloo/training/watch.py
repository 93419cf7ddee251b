"""Watching a policy while it is trained: measurements along the run, and its end where it begins to go wrong."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedTokenizerBase, TrainerCallback

from helpsteer_rloo.alarms import COLUMNS, Watched, alarms, best_of, is_over, read_watched, verdict, watched
from helpsteer_rloo.checkpoints import damage
from helpsteer_rloo.events import Measured, publish
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.rollout import Completion, sequence_seed, supports_sampler
from helpsteer_rloo.model.sharding import whole_weights
from helpsteer_rloo.training.ledger import discard_rollouts_from, number_or_none, write_step
from helpsteer_rloo.training.rloo import RLOOTrainer
from helpsteer_rloo.training.scorer import RewardModelScorer


@dataclass(frozen=True)
class WatchRules:
    """How a run is watched: every `steps` optimizer steps, on some prompts; `action` follows a verdict."""

    steps: int
    action: str
    max_kl: float | None = None


class PolicyWatch(TrainerCallback):
    """Measures the policy on prompts of its own at the start, every so many steps and at the end.

    Every measurement is a file `step-<optimizer step>.jsonl.gz`, one line a prompt with the completion and its numbers.
    The best step has a checkpoint that is not rotated away. Where `verdict` speaks, training stops (or a warning is
    given, by the rules).

    Args:
        trainer: That trains the policy.
        prompts: To sample for, the same every time and with the same seeds; none of them is trained on.
        guard: Scores as it is not, if there is such a reward model.
        rules: When, and what follows.
        directory: Of the files.

    Raises:
        ValueError: the policy's passes are TRL's own, or it is a model that the embedded sampler does not take.
    """

    def __init__(
        self,
        trainer: RLOOTrainer,
        prompts: Sequence[TokenGroup],
        guard: RewardModelScorer | None,
        rules: WatchRules,
        directory: Path,
    ) -> None:
        if not (trainer.is_packed and supports_sampler(trainer.accelerator.unwrap_model(trainer.model))):
            raise ValueError(
                "The policy cannot be watched, since its passes are left to TRL. Leave out --guard_reward_model, "
                "--watch_steps and --max_kl (in the pipeline --guard too)."
            )
        self._trainer, self._prompts, self._guard = trainer, prompts, guard
        self._rules, self._directory = rules, directory
        self.rolled_back_to: int | None = None
        self.history: list[Watched] = []
        self._told: set[str] = set()

    @property
    def ends_the_run(self) -> bool:
        """Whether the run is over by what has been measured."""
        return self._rules.action != "warn" and verdict(self.history, self._rules.max_kl) is not None

    @property
    def _best(self) -> Watched:
        """The best step that can be gone back to: not the start, and not over the limit of KL if another is not."""
        return best_of(self.history[1:] or self.history, self._rules.max_kl)

    def begin(self, step: int) -> bool:
        """Take over what was measured up to the step that training goes on from; whether the run ends there."""
        found: list[Any] = [None]
        if self._trainer.accelerator.is_main_process:
            discard_rollouts_from(self._directory, step + 1)
            found = [read_watched(self._directory)]
        self.history = cast(Any, broadcast_object_list(found))[0]
        return self.ends_the_run

    def finish(self) -> None:
        """Give the policy the weights of its best step, if the run was ended and the rules say so.

        Raises:
            ValueError: the checkpoint of that step is not what was saved.
        """
        state, best = self._trainer.state, self._best.step
        if not (self.ends_the_run and self._rules.action == "rollback") or best == state.global_step:
            return
        checkpoint = Path(str(self._trainer.args.output_dir)) / f"checkpoint-{best}"
        if problem := damage(checkpoint):
            raise ValueError(
                f"The run is to go back to its best step, but {checkpoint} cannot be used: {problem}. Give "
                "--on_alarm stop to keep the last step instead."
            )
        over = self._rules.max_kl is not None and is_over(self._best, self._rules.max_kl)
        within = "" if not over else f" (no step after the start is within --max_kl {self._rules.max_kl:g})"
        warnings.warn(f"Going back to step {best}, the best so far{within}.", stacklevel=2)
        state.best_model_checkpoint = str(checkpoint)  # which may have been moved with the run since it was set
        cast(Any, self._trainer)._load_best_model()
        self.rolled_back_to = best

    def summary(self) -> dict[str, Any]:
        """What was seen along the run: its curve, its best step, and what ended it."""
        ended = verdict(self.history, self._rules.max_kl) if self.history else None
        return {
            "curve": [seen.to_json() for seen in self.history],
            "best_step": self._best.step,
            "verdict": None if ended is None else {"name": ended.name, "step": ended.step, "sentence": ended.sentence},
            "action": self._rules.action if ended else None,
            "rolled_back_to": self.rolled_back_to,
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start, if that has not been done."""
        if not self.history:
            self._measure(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the policy, keep the best, and stop where it is time to."""
        step = state.global_step
        if step % self._rules.steps and step < state.max_steps:
            return
        self._measure(state)
        if self._best.step == step:
            state.best_global_step, state.best_metric = step, self.history[-1].merit
            state.best_model_checkpoint = str(Path(args.output_dir) / f"checkpoint-{step}")
            control.should_save = True
        for alarm in alarms(self.history, self._rules.max_kl):
            if alarm.name not in self._told:
                self._told.add(alarm.name)
                warnings.warn(f"Step {step}: {alarm.sentence}", stacklevel=2)
        if self.ends_the_run and step < state.max_steps:
            control.should_save = control.should_training_stop = True

    def _measure(self, state: Any) -> None:
        trainer, accelerator = self._trainer, self._trainer.accelerator
        turns = range(-(-len(self._prompts) // accelerator.num_processes))  # as many on every process, some twice
        places = (accelerator.process_index + turn * accelerator.num_processes for turn in turns)
        numbers = [place % len(self._prompts) for place in places]
        own = [self._prompts[number] for number in numbers]
        seeds = [sequence_seed(trainer.args.seed, -1, number) for number in numbers]
        rows = dict(gather_object(list(zip(numbers, self._rows(own, seeds), strict=True))))
        ordered = [rows[number] for number in sorted(rows)]
        if accelerator.is_main_process:
            write_step(self._directory, state.global_step, ordered)
            publish(Measured("watch", state.global_step, state.max_steps, _means(ordered)))
        self.history.append(watched(state.global_step, ordered))

    def _guarded(self, ids: Mapping[str, list[list[int]]], drawn: Sequence[Completion]) -> list[float | None]:
        """The guard's scores less the run's penalties: of a text that was cut off it knows nothing.

        Raises:
            ValueError: one is not finite.
        """
        if self._guard is None:
            return [None] * len(drawn)
        with whole_weights(self._trainer.accelerator.unwrap_model(self._trainer.model)):  # on which it may stand
            scores = self._guard(**ids)
        if not all(map(math.isfinite, scores)):
            raise ValueError(
                f"The guard's scores at step {self._trainer.state.global_step} are not finite: it is damaged, or its "
                "training diverged. Give another --guard_reward_model, or none."
            )
        penalties = self._trainer.penalties_of(drawn)
        return [score - penalty for score, penalty in zip(scores, penalties, strict=True)]

    def _rows(self, prompts: Sequence[TokenGroup], seeds: Sequence[int]) -> list[dict[str, Any]]:
        trainer = self._trainer
        drawn = trainer.drawn([prompt.prompt_ids for prompt in prompts], seeds)
        groups = [TokenGroup((), p.prompt_ids, (c.ids,)) for p, c in zip(prompts, drawn, strict=True)]
        ids = {"prompt_ids": [list(g.prompt_ids) for g in groups], "completion_ids": [list(c.ids) for c in drawn]}
        columns: dict[str, Sequence[Any]] = {
            "reward": list(map(number_or_none, trainer.rewards_of(prompts, drawn))),
            "guard": self._guarded(ids, drawn),
            "length": [len(c.ids) for c in drawn],
            "ended": [c.ended for c in drawn],
        }
        own = trainer.summed_log_probs(groups)
        with trainer.as_reference() as reference:
            start = trainer.summed_log_probs(groups, reference)
        if not all(map(math.isfinite, own)):
            raise ValueError(f"The policy diverged by step {trainer.state.global_step}: lower --learning_rate.")
        columns |= {"surprise": [-value for value in own], "kl": [a - b for a, b in zip(own, start, strict=True)]}
        tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
        texts = tokenizer.batch_decode([list(c.ids[:-1] if c.ended else c.ids) for c in drawn])
        prompt_of = [prompt.prompt[-1].content for prompt in prompts]
        return [
            {"prompt": prompt, "text": text, **{name: columns[name][place] for name in COLUMNS}}
            for place, (prompt, text) in enumerate(zip(prompt_of, texts, strict=True))
        ]


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of the columns over the prompts that have a number there."""
    told = {name: [float(row[name]) for row in rows if row[name] is not None] for name in COLUMNS}
    return {name: sum(values) / len(values) for name, values in told.items() if values}
