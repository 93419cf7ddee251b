"""The run: the stages over one record, from preferences to a judged policy."""

import shlex
import sys
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from helpsteer_rloo.checks import prompt_room
from helpsteer_rloo.config import PipelineSettings, Settings, ensemble, flags_named_of
from helpsteer_rloo.console import conclude, results_table, say, warn
from helpsteer_rloo.events import RunFinished, RunPlanned, publish
from helpsteer_rloo.fitting import refuse_what_cannot_fit
from helpsteer_rloo.heartbeat import beating
from helpsteer_rloo.identity import reward_model_identity
from helpsteer_rloo.knobs import DEFAULT_MODEL, DataKnobs, RewardKnobs, RLOOKnobs
from helpsteer_rloo.processes import is_main_process, process_count
from helpsteer_rloo.provenance import command_line, provenance
from helpsteer_rloo.reporting import reported
from helpsteer_rloo.reward_record import check_reward_model
from helpsteer_rloo.run_dir import (
    REWARD_MODEL_RECORD,
    RunDir,
    locked,
    read_json,
    reward_stage_name,
    verification_name,
    write_json,
)
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
OF_BOTH_TRAININGS = ("model_name_or_path", "model_revision", "trust_remote_code", "dtype", "use_peft", "seed")


def run_reward_model(settings: Settings[RewardKnobs]) -> None:
    """`reward_model_training.py`: data, reward model, verification; the record is kept beside the model."""
    run, context = _record_beside(settings.own.output_dir), data_context(settings)
    made = [member.own.output_dir for member in ensemble(settings)]
    for directory in made:
        refuse_foreign(Path(directory))
    with reported(run), _only_process(run, *made):
        names = ["data", *_reward_stage_names(settings.own.ensemble)]
        _announce(run, names)
        opening = _Opening(run, {"reward": settings.describe()}, lambda done: _check_fit(settings, "reward", done))
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
    run, context = _record_beside(settings.own.output_dir), data_context(settings)
    _check_others(settings, _check_reward_model(settings, "--reward_model_path"))
    refuse_foreign(Path(settings.own.output_dir))
    with reported(run), _only_process(run, settings.own.output_dir):
        names = ["data", "rloo"]
        _announce(run, names)
        opening = _Opening(run, {"rloo": settings.describe()}, lambda done: _check_fit(settings, "rloo", done))
        stages = opening.stages(names, lambda: [data_stage(run, context), rloo_stage(settings, context)])
        outputs = run_stages(run, stages, say)
    conclude(f"The policy is in {settings.own.output_dir}.")
    publish(RunFinished({"rloo": outputs["rloo"]}))


def _announce(run: RunDir, names: Sequence[str]) -> None:
    """Tell which stages there are, and what they took where they have been run before."""
    if is_main_process():
        publish(RunPlanned(tuple(names), seconds_by_stage(run, names)))


def _check_fit(settings: Settings[Any], stage: str, finished: Collection[str]) -> None:
    """Refuse a training of one stage that cannot fit into memory.

    Raises:
        ValueError: it cannot.
    """
    from helpsteer_rloo.planning.request import request_of_reward, request_of_rloo

    request_of = request_of_reward if stage == "reward" else request_of_rloo
    refuse_what_cannot_fit(
        lambda rig: request_of(settings, rig),
        use_cpu=bool(settings.trl.get("use_cpu")),
        force=settings.own.force,
        prefix=stage,
        finished=finished,
    )


@dataclass(frozen=True)
class _Opening:
    """What comes before the work of a run: a look at whether it fits into memory, and the record that it has begun.

    Attributes:
        run: Where it is recorded.
        settings: What the record holds.
        check_fit: Refuses a run that cannot fit, given the stages that are finished.
    """

    run: RunDir
    settings: Mapping[str, Any]
    check_fit: Callable[[Collection[str]], None]

    def stages(self, names: Sequence[str], make: Callable[[], list[Stage]]) -> list[Stage]:
        """The stages of the run, which to make may take a download: a run that cannot fit is refused before.

        A stage with a record is taken for finished until its inputs are known. A run of which all stages are finished
        leaves its record as it is.

        Raises:
            ValueError: it cannot fit.
        """
        recorded = set(seconds_by_stage(self.run, names))
        if set(names) - recorded:
            self.check_fit(recorded)
        stages = make()
        finished = set(finished_stages(self.run, stages))
        if recorded - finished:
            self.check_fit(finished)
        if set(names) - finished:
            _record_start(self.run, self.settings, names)
        return stages


def _record_beside(output_dir: str) -> RunDir:
    path = Path(output_dir).resolve()
    return RunDir(path.with_name(path.name + ".run"))


def _record_start(run: RunDir, settings: Mapping[str, Any], stages: Sequence[str]) -> None:
    """Write down what the run was started with and for, to be looked at while it goes on and afterwards."""
    if is_main_process():
        what = {"command": command_line(sys.argv), "settings": dict(settings), "stages": list(stages)}
        write_json(run.start, {**what, "provenance": provenance()})


@contextmanager
def _only_process(run: RunDir, *directories: str) -> Generator[None]:
    """The locks of a run and of the directories it makes, held by its main process; it shows others that it lives."""
    if not is_main_process():
        yield
        return
    with ExitStack() as held:
        held.enter_context(locked(run.lock, run.root))
        for directory in map(Path, directories):  # which runs of several names share
            held.enter_context(locked(directory.with_name(f".{directory.name}.lock"), directory))
        if process_count() > 1:
            held.enter_context(beating(run.heartbeat))
        yield


def _check_reward_model(settings: Settings[RLOOKnobs], flag: str) -> int:
    """Look at the reward model before any work; the longest sequence it was trained on."""
    trusted = bool(settings.trl.get("trust_remote_code"))
    record = check_reward_model(settings.own.reward_model_path, flag, trusted=trusted)
    longest = int(record["rendering"]["max_length"])
    prompt_room(longest, settings.own.response_length)
    return longest


def _check_others(
    settings: Settings[RLOOKnobs], longest: int, *, own_guard: bool = False, own_members: bool = False
) -> None:
    """Look at the guard and the ensemble before any work, but for those that the run trains itself.

    They have to read what the reward model does, which was trained on sequences of `longest` tokens, and to be others.

    Raises:
        ValueError: one is not to be used, or the same as another.
    """
    own, seen = settings.own, _names(settings.own.reward_model_path)
    given = [] if own_members else [(directory, "--reward_ensemble") for directory in own.ensemble_members]
    if own.guard_reward_model is not None and not own_guard:
        given.append((own.guard_reward_model, "--guard_reward_model"))
    for directory, flag in given:
        if seen & _names(directory):
            raise ValueError(f"{flag} {directory} is a reward model that this run has already; give another one.")
        seen |= _names(directory)
        trusted = bool(settings.trl.get("trust_remote_code"))
        record = check_reward_model(directory, flag, trusted=trusted)
        limit = record["rendering"]["max_length"]
        if record["thinking"] != settings.own.thinking:
            mode = "with" if record["thinking"] else "without"
            raise ValueError(f"{flag} {directory} was trained {mode} --thinking; give one that was trained alike.")
        if limit < longest:
            raise ValueError(
                f"{flag} {directory} was trained on at most {limit} tokens, the reward model on {longest}: give one "
                "that was trained with the same --max_length."
            )


def _names(directory: str) -> set[Path | str]:
    """What tells a reward model from others, also from its copy."""
    identity = reward_model_identity(Path(directory))
    return {Path(directory).resolve(), *([identity] if identity else [])}


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
            longest = _check_reward_model(settings.rloo, "--reward_model_dir")
        own_members = settings.reward.own.ensemble > 1 and not own.rloo_only
        _check_others(settings.rloo, longest, own_guard=settings.guard is not None, own_members=own_members)
    made = [] if own.rloo_only else [member.own.output_dir for member in ensemble(settings.reward)]
    made += [settings.guard.own.output_dir] if settings.guard else []
    made += [] if own.reward_model_only else [settings.rloo.own.output_dir]
    for directory in made:
        refuse_foreign(Path(directory))
    with reported(run), _only_process(run, *made):
        _run_all(settings, run, before, gold)


def _run_all(
    settings: PipelineSettings,
    run: RunDir,
    before: Sequence[Stage],
    gold: Callable[[str, str, bool], float] | None,
) -> None:
    own = settings.own
    names = [*(stage.name for stage in before), *stage_names(settings)]
    _announce(run, names)
    run_stages(run, before, say)
    context = data_context(settings.reward)

    def of_policy() -> list[Stage]:
        """The stages of the policy, whose inputs are what the reward model is by now."""
        rloo = rloo_stage(settings.rloo, context, judged_on=own.evaluation_prompts)
        return [rloo, evaluation_stage(run, own, settings.rloo, context, gold)]

    def planned() -> list[Stage]:
        first = [*before, *_first_stages(run, settings, context)]
        return first if own.reward_model_only else [*first, *of_policy()]

    opening = _Opening(run, _described(settings), lambda finished: _check_fit_of_all(settings, finished))
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


def _check_fit_of_all(settings: PipelineSettings, finished: Collection[str]) -> None:
    """Refuse a run of which a stage cannot fit into memory.

    Raises:
        ValueError: it cannot.
    """
    from helpsteer_rloo.planning.request import request_of_pipeline

    refuse_what_cannot_fit(
        lambda rig: request_of_pipeline(settings, rig),
        use_cpu=bool(settings.reward.trl.get("use_cpu") or settings.rloo.trl.get("use_cpu")),
        force=settings.own.force,
        finished=finished,
    )


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
    """Everything the run found out, from the stages' records."""
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
        "provenance": provenance(),
    }


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
