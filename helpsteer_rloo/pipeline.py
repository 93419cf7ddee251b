"""The run: the stages over one record, from preferences to a judged policy."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from helpsteer_rloo.display.console import conclude, results_table, say, warn
from helpsteer_rloo.display.live_report import reported
from helpsteer_rloo.events import RunFinished, publish
from helpsteer_rloo.fitting import check_fit, check_fit_of_all
from helpsteer_rloo.given_models import check_given_reward_model, check_other_reward_models
from helpsteer_rloo.opening import Opening, announce, only_process, record_beside
from helpsteer_rloo.processes import is_main_process
from helpsteer_rloo.records.provenance import provenance
from helpsteer_rloo.run_dir import (
    REWARD_MODEL_RECORD,
    RunDir,
    read_json,
    reward_stage_name,
    verification_name,
    write_json,
)
from helpsteer_rloo.settings.config import PipelineSettings, Settings, ensemble, flags_named_of
from helpsteer_rloo.settings.knobs import DEFAULT_MODEL, DataKnobs, RewardKnobs, RLOOKnobs
from helpsteer_rloo.stages import Stage, finished_stages, refuse_foreign, run_stages, seconds_by_stage
from helpsteer_rloo.steps import (
    DataContext,
    data_context,
    data_stage,
    evaluation_stage,
    reward_stage,
    rloo_stage,
    verification_stage,
)

RESULTS = ("reward_model", "policy", "rloo", "seconds")
"""Of the summary, what a run came to."""
OF_BOTH_TRAININGS = (
    *("model_name_or_path", "model_revision", "trust_remote_code", "dtype", "use_peft", "seed"),
    *("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bnb_4bit_quant_storage"),
)


def run_reward_model(settings: Settings[RewardKnobs]) -> None:
    """`reward_model_training.py`: data, reward model, verification; the record is kept beside the model."""
    run, context = record_beside(settings.own.output_dir), data_context(settings)
    made = [member.own.output_dir for member in ensemble(settings)]
    for directory in made:
        refuse_foreign(Path(directory))
    with reported(run), only_process(run, *made):
        names = ["data", *_reward_stage_names(settings.own.ensemble)]
        announce(run, names)
        opening = Opening(run, {"reward": settings.describe()}, lambda done: check_fit(settings, "reward", done))
        stages = opening.stages(names, lambda: [data_stage(run, context), *_reward_stages(run, settings, context)])
        outputs = run_stages(run, stages, say)
    heldout = outputs["verification"]
    low, high = heldout["interval"]
    accuracy = f"{heldout['heldout_accuracy']:.3f} [{low:.3f}, {high:.3f}]"
    conclude(f"The reward model is in {settings.own.output_dir}; held-out accuracy {accuracy}.")
    publish(RunFinished({"reward_model": {"directory": settings.own.output_dir, **heldout}}))
    if not heldout["better_than_chance"]:
        warn(_weakness(heldout) + "RLOO against it would train the policy on noise.")
    say(f"Next: {rloo_command(settings)}")


def _reward_stages(run: RunDir, settings: Settings[RewardKnobs], context: DataContext) -> list[Stage]:
    """Training and verification of a reward model, or of each one of an ensemble."""
    stages: list[Stage] = []
    for number, member in enumerate(ensemble(settings), start=1):
        name = reward_stage_name(number)
        stages += [reward_stage(member, context, name), verification_stage(run, member, context, of=name)]
    return stages


def _reward_stage_names(count: int) -> list[str]:
    """Names of the stages that make and verify so many reward models."""
    models = [reward_stage_name(number) for number in range(1, count + 1)]
    return [name for model in models for name in (model, verification_name(model))]


def run_rloo(settings: Settings[RLOOKnobs]) -> None:
    """`rloo_helpsteer_training.py`: data and RLOO; the record is kept beside the policy."""
    run, context = record_beside(settings.own.output_dir), data_context(settings)
    check_other_reward_models(settings, check_given_reward_model(settings, "--reward_model_path"))
    refuse_foreign(Path(settings.own.output_dir))
    with reported(run), only_process(run, settings.own.output_dir):
        names = ["data", "rloo"]
        announce(run, names)
        opening = Opening(run, {"rloo": settings.describe()}, lambda done: check_fit(settings, "rloo", done))
        stages = opening.stages(names, lambda: [data_stage(run, context), rloo_stage(settings, context)])
        outputs = run_stages(run, stages, say)
    conclude(f"The policy is in {settings.own.output_dir}.")
    publish(RunFinished({"rloo": outputs["rloo"]}))


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
    with flags_named_of("rloo"):
        longest = settings.reward.own.max_length
        if own.rloo_only:
            longest = check_given_reward_model(settings.rloo, "--reward_model_dir")
        own_members = settings.reward.own.ensemble > 1 and not own.rloo_only
        check_other_reward_models(settings.rloo, longest, own_guard=settings.guard is not None, own_members=own_members)
    made = [] if own.rloo_only else [member.own.output_dir for member in ensemble(settings.reward)]
    made += [settings.guard.own.output_dir] if settings.guard else []
    made += [] if own.reward_model_only else [settings.rloo.own.output_dir]
    for directory in made:
        refuse_foreign(Path(directory))
    with reported(run), only_process(run, *made):
        _run_all(settings, run, before, gold)


def _run_all(
    settings: PipelineSettings,
    run: RunDir,
    before: Sequence[Stage],
    gold: Callable[[str, str, bool], float] | None,
) -> None:
    own = settings.own
    names = [*(stage.name for stage in before), *stage_names(settings)]
    announce(run, names)
    run_stages(run, before, say)
    context = data_context(settings.reward)

    def of_policy() -> list[Stage]:
        """The stages of the policy, whose inputs are what the reward model is by now."""
        rloo = rloo_stage(settings.rloo, context, judged_on=own.evaluation_prompts)
        return [rloo, evaluation_stage(run, own, settings.rloo, context, gold)]

    def planned() -> list[Stage]:
        first = [*before, *_first_stages(run, settings, context)]
        return first if own.reward_model_only else [*first, *of_policy()]

    opening = Opening(run, _described(settings), lambda finished: check_fit_of_all(settings, finished))
    first = [stage for stage in opening.stages(names, planned) if stage.name not in ("rloo", "evaluation")]
    run_stages(run, first, say)
    stages = [*first, *of_policy()]
    if not own.reward_model_only:
        _refuse_weak_reward_model(settings)
        _warn_of_a_weak_guard(settings)
        run_stages(run, stages, say)
    summary = summarize_run(run, settings, finished_stages(run, stages))
    if is_main_process():
        write_json(run.summary, summary)
    conclude(results_table(summary))
    publish(RunFinished({name: summary[name] for name in RESULTS if name in summary}))
    _say_next(settings, run)


def _first_stages(run: RunDir, settings: PipelineSettings, context: DataContext) -> list[Stage]:
    """Data, and the reward models that the run trains."""
    stages = [data_stage(run, context)]
    if not settings.own.rloo_only:
        stages += _reward_stages(run, settings.reward, context)
    if settings.guard:
        guard = reward_stage(settings.guard, context, "guard")
        stages += [guard, verification_stage(run, settings.guard, context, of="guard")]
    return stages


def stage_names(settings: PipelineSettings) -> list[str]:
    """Names of the stages of a run in order, known before the data and models are there that the stages are made of."""
    own, names = settings.own, ["data"]
    if not own.rloo_only:
        names += _reward_stage_names(settings.reward.own.ensemble)
    if settings.guard:
        names += ["guard", verification_name("guard")]
    return names if own.reward_model_only else [*names, "rloo", "evaluation"]


def _refuse_weak_reward_model(settings: PipelineSettings) -> None:
    directory = Path(settings.rloo.own.reward_model_path)
    heldout = (read_json(directory / REWARD_MODEL_RECORD) or {}).get("heldout")
    if heldout is None:
        raise ValueError(
            f"{directory} was never verified on held-out pairs; run reward_model_training.py on it to the end first."
        )
    if heldout["better_than_chance"]:
        return
    message = _weakness(heldout)
    if settings.own.allow_weak_reward_model:
        warn(message + "Going on, as --allow_weak_reward_model says.")
        return
    raise ValueError(
        message + "RLOO would train the policy on noise. Look at: the sample predictions above; the number of pairs in "
        "data.json; how many pairs were cut to --max_length; the learning rate (--reward.learning_rate) and epochs "
        "(--reward_epochs). --allow_weak_reward_model goes on all the same."
    )


def _warn_of_a_weak_guard(settings: PipelineSettings) -> None:
    guard = settings.rloo.own.guard_reward_model
    heldout = (read_json(Path(guard) / REWARD_MODEL_RECORD) or {}).get("heldout") if guard else None
    if heldout and not heldout["better_than_chance"]:
        warn(f"the guard in {guard} is not significantly better than chance, and cannot tell when to stop.")


def _weakness(heldout: dict[str, Any]) -> str:
    low, high = heldout["interval"]
    return (
        "The reward model is not significantly better than chance: held-out accuracy "
        f"{heldout['heldout_accuracy']:.3f}, 95 % interval {low:.3f} to {high:.3f}, "
        f"on {heldout['heldout_pairs']} pairs. "
    )


def summarize_run(run: RunDir, settings: PipelineSettings, names: Sequence[str]) -> dict[str, Any]:
    """Everything the run found out, from the stages' records.

    The provenance is that of the start that made it: where no stage had to be run, what is recorded of an earlier one.
    """
    records = {name: read_json(run.stage(name)) for name in names}
    outputs = {name: record["outputs"] for name, record in records.items() if record}
    reward = (read_json(Path(settings.rloo.own.reward_model_path) / REWARD_MODEL_RECORD) or {}).get("heldout")
    summary: dict[str, Any] = {
        "data": read_json(run.data_report),
        "reward_model": {"directory": settings.rloo.own.reward_model_path, **reward} if reward else None,
    }
    if {"rloo", "evaluation"} <= outputs.keys():
        summary["policy"] = {"directory": settings.rloo.own.output_dir, **outputs["evaluation"]}
        summary["rloo"] = outputs["rloo"]
    return {
        **summary,
        "seconds": seconds_by_stage(run, names),
        "seed": settings.own.seed,
        "settings": _described(settings),
        "provenance": _provenance_of(run) or provenance(),
    }


def _provenance_of(run: RunDir) -> Any:
    """What the results of a run were made with, if that is recorded; in older runs the summary alone says it."""
    return (read_json(run.start) or read_json(run.summary) or {}).get("provenance")


def _described(settings: PipelineSettings) -> dict[str, Any]:
    """All settings of a run, by stage."""
    return {
        "pipeline": asdict(settings.own),
        "reward": settings.reward.describe(),
        "rloo": settings.rloo.describe(),
    }


def _say_next(settings: PipelineSettings, run: RunDir) -> None:
    conclude(f"All results: {run.summary}")
    if settings.own.reward_model_only:
        say("Next: the same command with --reward_model_only false; what is finished is not run again.")
    else:
        say(f"Answers before and after, side by side: {run.samples}")
        say(f"The policy is in {settings.rloo.own.output_dir}; every rollout is in {settings.rloo.own.rollouts_dir}")


def rloo_command(settings: Settings[RewardKnobs]) -> str:
    """The command that goes on from a reward model, with what both trainings share and was not left at its default."""
    names = (field.name for field in fields(DataKnobs))
    given = {name: getattr(settings.own, name) for name in names}
    shared = {name: value for name, value in given.items() if value != getattr(RewardKnobs(), name)}
    trl, own_default = settings.trl, {"model_name_or_path": DEFAULT_MODEL}
    shared |= {name: trl[name] for name in OF_BOTH_TRAININGS if name in trl and trl[name] != own_default.get(name)}
    if members := [member.own.output_dir for member in ensemble(settings)[1:]]:
        shared["reward_ensemble"] = ",".join(members)
    if RLOOKnobs().response_length > settings.own.max_length // 2:
        shared["response_length"] = settings.own.max_length // 2
    words = ["python", "rloo_helpsteer_training.py", "--reward_model_path", settings.own.output_dir]
    for name, value in shared.items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return shlex.join(words)
