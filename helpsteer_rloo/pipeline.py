"""The run: a list of stages over one record, from preferences to a judged policy."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_rloo.config import DataKnobs, PipelineKnobs, PipelineSettings, RewardKnobs, RLOOKnobs, Settings
from helpsteer_rloo.console import data_table, predictions_table, results_table, say, show
from helpsteer_rloo.data.sources import content_digest, locate
from helpsteer_rloo.provenance import provenance
from helpsteer_rloo.run_dir import (
    HELDOUT_PROMPTS,
    POLICY_RECORD,
    REWARD_MODEL_RECORD,
    RunDir,
    read_json,
    write_json,
    write_text,
)
from helpsteer_rloo.stages import Stage, run_stages, seconds_by_stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from helpsteer_rloo.data.preparation import Prepared
    from helpsteer_rloo.rendering import Renderer

PROBES = 16
"""Held-out sequences whose scores a saved reward model must reproduce."""

_WITHOUT_EFFECT = (
    "output_dir", "rollouts_dir", "reward_model_path", "sample_predictions", "local_rollout_forward_batch_size",
    "logging_", "log_", "report_to", "run_name", "save_", "eval_", "per_device_eval_batch_size", "disable_tqdm",
    "hub_", "push_to_hub", "dataloader_", "project", "trackio_", "num_completions_to_print",
)  # fmt: skip
"""Flags, or beginnings of flags, that leave the result as it is; changing them makes no stage run again."""


@dataclass(frozen=True)
class DataContext:
    """A data set and a tokenizer, loaded when first used and shared by the stages of one process."""

    knobs: DataKnobs
    model: str
    revision: str | None

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the model that training starts from."""
        from helpsteer_rloo.model.loading import load_tokenizer

        return load_tokenizer(self.model, self.revision)

    @cached_property
    def renderer(self) -> "Renderer":
        """The rendering that the reward model is trained with."""
        from helpsteer_rloo.rendering import Renderer

        return Renderer(self.tokenizer, thinking=self.knobs.thinking)

    @cached_property
    def prepared(self) -> "Prepared":
        """The data set as groups of tokens, by split."""
        from helpsteer_rloo.data.preparation import prepare

        return prepare(self.knobs, self.renderer)


def data_context(settings: Settings[Any]) -> DataContext:
    """The data of one stage's settings."""
    trl = settings.trl
    return DataContext(settings.own, str(trl["model_name_or_path"]), trl.get("model_revision"))


# ---- stages ----------------------------------------------------------------------------------------------------------


def data_stage(run: RunDir, context: DataContext) -> Stage:
    """Read, split and tokenize the data; write and print its report."""
    knobs = {field.name: getattr(context.knobs, field.name) for field in fields(DataKnobs)}
    digest = content_digest(locate(context.knobs))

    def work() -> dict[str, Any]:
        report = context.prepared.report
        write_json(run.data_report, report)
        show(data_table(report))
        return {name: report[name] for name in ("rows", "pairs", "prompts", "fingerprint")}

    inputs = {**knobs, "model_name_or_path": context.model, "source_digest": digest}
    return Stage("data", inputs, work, artefacts=(run.data_report,))


def reward_stage(settings: Settings[RewardKnobs], context: DataContext) -> Stage:
    """Train the reward model, save it, and prove in a fresh process that the saved one is the trained one."""
    directory = Path(settings.own.output_dir)

    def work() -> dict[str, Any]:
        from helpsteer_rloo.evaluation.reload import check_reload
        from helpsteer_rloo.model.loading import release
        from helpsteer_rloo.training.reward import train_reward_model

        prepared = context.prepared
        probes = [list(g.sequence(i)) for g in prepared.groups["validation"] for i in range(2)][:PROBES]
        training = train_reward_model(
            settings, context.tokenizer, prepared.groups["train"], prepared.groups["validation"], probes
        )
        release()
        scores = training.pop("probe_scores")
        if not _is_main():
            return {}
        difference = check_reload(directory, probes, scores, training["dtype"])
        say(f"Reloaded {directory} in a fresh process: {len(probes)} scores agree (to {difference:.2g}).")
        record = _reward_record(settings, context, training, {"sequences": len(probes), "max_difference": difference})
        write_text(directory / HELDOUT_PROMPTS, "".join(key + "\n" for key in prepared.heldout_prompts))
        write_json(directory / REWARD_MODEL_RECORD, record)
        return {"directory": str(directory), **training, "reload_difference": difference}

    return Stage(
        "reward_model",
        _effective(settings),
        work,
        artefacts=(directory / REWARD_MODEL_RECORD,),
        directory=directory,
        distributed=True,
    )


def _reward_record(
    settings: Settings[RewardKnobs], context: DataContext, training: Mapping[str, Any], reload: Mapping[str, Any]
) -> dict[str, Any]:
    report = context.prepared.report
    return {
        "base_model": context.model,
        "adapter": training["adapter"],
        "dtype": training["dtype"],
        "thinking": settings.own.thinking,
        "rendering": context.renderer.fingerprint(settings.own.max_length),
        "data": {
            "source": report["source"],
            "fingerprint": report["fingerprint"],
            "pairs": report["splits"]["train"]["pairs"],
        },
        "settings": settings.describe(),
        "training": {name: training[name] for name in ("steps", "train_loss")},
        "reload": dict(reload),
        "provenance": provenance(),
    }


def verification_stage(settings: Settings[RewardKnobs], context: DataContext) -> Stage:
    """Score the held-out pairs; print sample predictions; add accuracy and interval to the reward model's record."""
    directory = Path(settings.own.output_dir)
    batch_size = int(settings.trl.get("per_device_eval_batch_size", 8))

    def work() -> dict[str, Any]:
        from helpsteer_rloo.evaluation.cards import reward_model_card
        from helpsteer_rloo.evaluation.preference import judge, spread_sample, summarize
        from helpsteer_rloo.model.loading import load_reward_model, release

        model, record = load_reward_model(directory)
        judgements = judge(model, context.prepared.groups["validation"], batch_size)
        del model
        release()
        sample = [j.to_json() for j in spread_sample(judgements, settings.own.sample_predictions)]
        show(predictions_table(sample))
        heldout = summarize(judgements)
        write_json(directory / REWARD_MODEL_RECORD, {**record, "heldout": heldout, "sample_predictions": sample})
        write_text(directory / "README.md", reward_model_card({**record, "heldout": heldout}))
        low, high = heldout["interval"]
        say(f"Held-out accuracy {heldout['heldout_accuracy']:.3f} [{low:.3f}, {high:.3f}] on {len(judgements)} pairs.")
        return heldout

    return Stage("verification", {"sample_predictions": settings.own.sample_predictions}, work)


def rloo_stage(settings: Settings[RLOOKnobs], context: DataContext) -> Stage:
    """Train the policy against the reward model."""
    directory = Path(settings.own.output_dir)

    def work() -> dict[str, Any]:
        from helpsteer_rloo.evaluation.cards import policy_card
        from helpsteer_rloo.model.loading import release
        from helpsteer_rloo.training.policy import train_policy

        training = train_policy(settings, context.tokenizer, context.prepared.corpus.groups["train"])
        release()
        if not _is_main():
            return {}
        record = {
            "base_model": context.model,
            "adapter": training["adapter"],
            "dtype": training["dtype"],
            "reward_model": settings.own.reward_model_path,
            "settings": settings.describe(),
            "training": training,
            "provenance": provenance(),
        }
        write_text(directory / "README.md", policy_card(record))
        write_json(directory / POLICY_RECORD, record)
        return {"directory": str(directory), **training}

    inputs = {**_effective(settings), "reward_model": _digest(Path(settings.own.reward_model_path))}
    return Stage("rloo", inputs, work, artefacts=(directory / POLICY_RECORD,), directory=directory, distributed=True)


def evaluation_stage(
    run: RunDir,
    own: PipelineKnobs,
    settings: Settings[RLOOKnobs],
    context: DataContext,
    gold: Callable[[str, str, bool], float] | None,
) -> Stage:
    """Sample the untrained and the trained policy on held-out prompts with the same seeds, and compare."""
    inputs = {"evaluation_prompts": own.evaluation_prompts, "evaluation_batch_size": own.evaluation_batch_size}

    def work() -> dict[str, Any]:
        import json

        from helpsteer_rloo.data.preparation import rollout_prompts
        from helpsteer_rloo.evaluation.policy import EvaluationKnobs, PolicyPair, evaluate_policy

        record = read_json(Path(settings.own.output_dir) / POLICY_RECORD) or {}
        reward_record = read_json(Path(settings.own.reward_model_path) / REWARD_MODEL_RECORD) or {}
        counts: Counter[str] = Counter()
        room = reward_record["rendering"]["max_length"] - settings.own.response_length
        heldout = context.prepared.corpus.groups["validation"]
        groups = rollout_prompts(heldout, context.renderer, room, counts)[: own.evaluation_prompts]
        knobs = EvaluationKnobs(
            max_new_tokens=settings.own.response_length,
            temperature=float(settings.trl.get("temperature", 1.0)),
            top_p=float(settings.trl.get("top_p", 1.0)),
            top_k=int(settings.trl.get("top_k", 0)),
            batch_size=own.evaluation_batch_size,
            seed=own.seed,
        )
        pair = PolicyPair(context.model, Path(settings.own.output_dir), record["adapter"], record["dtype"])
        result, samples = evaluate_policy(pair, settings.own.reward_model_path, context.tokenizer, groups, knobs, gold)
        write_text(run.samples, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples))
        return result

    return Stage("evaluation", inputs, work, artefacts=(run.samples,))


def _is_main() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def _effective(settings: Settings[Any]) -> dict[str, Any]:
    """The settings that decide a stage's result; the data's own are inputs of the data stage."""
    data = {field.name for field in fields(DataKnobs)}
    described = settings.describe()
    return {k: v for k, v in described.items() if not k.startswith(_WITHOUT_EFFECT) and k not in data}


def _digest(directory: Path) -> str | None:
    """Identity of a finished reward model, apart from its verification."""
    record = read_json(directory / REWARD_MODEL_RECORD)
    if record is None:
        return None
    kept = {name: record[name] for name in ("rendering", "data", "training", "reload")}
    return hashlib.sha256(repr(kept).encode()).hexdigest()[:16]


# ---- runs ------------------------------------------------------------------------------------------------------------


def run_reward_model(settings: Settings[RewardKnobs]) -> None:
    """`reward_model_training.py`: data, reward model, verification; the record is kept beside the model."""
    run, context = _record_beside(settings.own.output_dir), data_context(settings)
    run_stages(
        run, [data_stage(run, context), reward_stage(settings, context), verification_stage(settings, context)], say
    )
    say(f"The reward model is in {settings.own.output_dir}.")
    say(f"Next: python rloo_helpsteer_training.py --reward_model_path {settings.own.output_dir}")


def run_rloo(settings: Settings[RLOOKnobs]) -> None:
    """`rloo_helpsteer_training.py`: data and RLOO; the record is kept beside the policy."""
    run, context = _record_beside(settings.own.output_dir), data_context(settings)
    _check_reward_model(settings)
    run_stages(run, [data_stage(run, context), rloo_stage(settings, context)], say)
    say(f"The policy is in {settings.own.output_dir}.")


def _record_beside(output_dir: str) -> RunDir:
    path = Path(output_dir)
    return RunDir(path.with_name(path.name + ".run"))


def _check_reward_model(settings: Settings[RLOOKnobs]) -> None:
    """Say at once, before any long work, when there is no reward model where one is expected."""
    path = Path(settings.own.reward_model_path)
    if not (path / REWARD_MODEL_RECORD).exists():
        raise ValueError(
            f"--reward_model_path {path}: no finished reward model there ({REWARD_MODEL_RECORD} is missing). Train one "
            "with reward_model_training.py, or give the directory of one that it trained."
        )


def run_pipeline(
    settings: PipelineSettings,
    before: Sequence[Stage] = (),
    gold: Callable[[str, str, bool], float] | None = None,
) -> None:
    """`train_pipeline.py`: all stages over one record; finished ones are not run again.

    Args:
        settings: Of the run and of its two training stages.
        before: Stages to run first, such as those that make the demo's world.
        gold: The true quality of an answer, if the world knows it.

    Raises:
        ValueError: the reward model is not better than chance and `allow_weak_reward_model` is off; or as the stages.
    """
    own, run = settings.own, RunDir(Path(settings.run_dir))
    run_stages(run, before, say)
    context = data_context(settings.reward)
    first = [*before, data_stage(run, context)]
    if own.rloo_only:
        _check_reward_model(settings.rloo)
    else:
        first += [reward_stage(settings.reward, context), verification_stage(settings.reward, context)]
    run_stages(run, first, say)
    stages = first
    if not own.reward_model_only:
        _refuse_weak_reward_model(settings)
        stages = [
            *first,
            rloo_stage(settings.rloo, context),
            evaluation_stage(run, own, settings.rloo, context, gold),
        ]
        run_stages(run, stages, say)
    summary = summarize_run(run, settings, [stage.name for stage in stages])
    write_json(run.summary, summary)
    show(results_table(summary))
    _say_next(settings, run)


def _refuse_weak_reward_model(settings: PipelineSettings) -> None:
    directory = Path(settings.rloo.own.reward_model_path)
    heldout = (read_json(directory / REWARD_MODEL_RECORD) or {}).get("heldout")
    if heldout is None:
        raise ValueError(
            f"{directory} was never verified on held-out pairs; run reward_model_training.py on it to the end first."
        )
    if heldout["better_than_chance"]:
        return
    low, high = heldout["interval"]
    message = (
        "The reward model is not significantly better than chance: held-out accuracy "
        f"{heldout['heldout_accuracy']:.3f}, 95 % interval {low:.3f} to {high:.3f}, "
        f"on {heldout['heldout_pairs']} pairs. "
    )
    if settings.own.allow_weak_reward_model:
        say(message + "Going on, as --allow_weak_reward_model says.")
        return
    raise ValueError(
        message + "RLOO would train the policy on noise. Look at: the sample predictions above; the number of pairs in "
        "data.json; how many pairs were cut to --max_length; the learning rate (--reward.learning_rate) and epochs "
        "(--reward_epochs). --allow_weak_reward_model goes on all the same."
    )


def summarize_run(run: RunDir, settings: PipelineSettings, names: Sequence[str]) -> dict[str, Any]:
    """Everything the run found out, from the stages' records."""
    records = {name: read_json(run.stage(name)) for name in names}
    outputs = {name: record["outputs"] for name, record in records.items() if record}
    reward = (read_json(Path(settings.rloo.own.reward_model_path) / REWARD_MODEL_RECORD) or {}).get("heldout")
    summary: dict[str, Any] = {
        "data": read_json(run.data_report),
        "reward_model": {"directory": settings.rloo.own.reward_model_path, **reward} if reward else None,
    }
    if "evaluation" in outputs:
        summary["policy"] = {"directory": settings.rloo.own.output_dir, **outputs["evaluation"]}
        summary["rloo"] = outputs["rloo"]
    return {
        **summary,
        "seconds": seconds_by_stage(run, names),
        "seed": settings.own.seed,
        "settings": asdict(settings.own),
        "provenance": provenance(),
    }


def _say_next(settings: PipelineSettings, run: RunDir) -> None:
    say(f"All results: {run.summary}")
    if settings.own.reward_model_only:
        say(f"Next: python train_pipeline.py --rloo_only --reward_model_dir {settings.rloo.own.reward_model_path}")
    else:
        say(f"Answers before and after, side by side: {run.samples}")
        say(f"The policy is in {settings.rloo.own.output_dir}; every rollout is in {settings.rloo.own.rollouts_dir}")
