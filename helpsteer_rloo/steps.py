"""The stages of a run: what each depends on, does, and leaves behind."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpsteer_rloo.data.sources import content_digest, locate
from helpsteer_rloo.display.console import data_table, findings_table, predictions_table, say, show, watch_sentence
from helpsteer_rloo.identity import effective_settings, model_identity, reward_model_identity, tokenizer_identity
from helpsteer_rloo.processes import is_main_process
from helpsteer_rloo.records.places import BASE_IDENTITY
from helpsteer_rloo.records.provenance import provenance
from helpsteer_rloo.records.reward_model import (
    check_base_record,
    check_reward_model,
    read_heldout_prompts,
    read_reward_record,
)
from helpsteer_rloo.reward_functions import reward_functions_digest
from helpsteer_rloo.run_dir import (
    HELDOUT_PROMPTS,
    POLICY_RECORD,
    REWARD_MODEL_RECORD,
    RunDir,
    json_lines,
    read_record,
    verification_name,
    write_bytes,
    write_json,
    write_text,
)
from helpsteer_rloo.settings.checks import prompt_room
from helpsteer_rloo.settings.config import Settings
from helpsteer_rloo.settings.knobs import DataKnobs, PipelineKnobs, RewardKnobs, RLOOKnobs
from helpsteer_rloo.stages import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from helpsteer_rloo.data.preparation import Prepared
    from helpsteer_rloo.groups import TokenGroup
    from helpsteer_rloo.rendering import Renderer

WEIGHTS = "*.safetensors"
KEPT_PAIRS = 500
"""Held-out pairs that a run keeps with their scores, to be read."""
PROBES = 16
"""Held-out sequences whose scores a saved reward model must reproduce."""


@dataclass(frozen=True)
class DataContext:
    """A data set and a tokenizer, loaded when first used and shared by the stages of one process."""

    knobs: DataKnobs
    model: str
    revision: str | None
    trust_remote_code: bool

    @cached_property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """The tokenizer of the model that training starts from."""
        from helpsteer_rloo.model.loading import load_tokenizer

        return load_tokenizer(self.model, self.revision, trust_remote_code=self.trust_remote_code)

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
    return DataContext(
        settings.own, str(trl["model_name_or_path"]), trl.get("model_revision"), bool(trl.get("trust_remote_code"))
    )


def data_stage(run: RunDir, context: DataContext) -> Stage:
    """Read, split and tokenize the data; write and print its report."""
    knobs = {field.name: getattr(context.knobs, field.name) for field in fields(DataKnobs)}
    digest = content_digest(locate(context.knobs))

    def work() -> dict[str, Any]:
        report = context.prepared.report
        write_json(run.data_report, report)
        show(data_table(report))
        return {name: report[name] for name in ("rows", "pairs", "prompts", "fingerprint")}

    inputs = {
        **knobs,
        "dataset_name": f"content:{digest}",
        "tokenizer": tokenizer_identity(context.model, context.revision),
    }
    return Stage("data", inputs, work, artefacts=(run.data_report,))


def reward_stage(settings: Settings[RewardKnobs], context: DataContext, name: str = "reward_model") -> Stage:
    """Train a reward model, save it, and prove in a fresh process that the saved one is the trained one."""
    directory = Path(settings.own.output_dir)

    def work() -> dict[str, Any]:
        from helpsteer_rloo.data.preparation import half_of
        from helpsteer_rloo.evaluation import stock_scores
        from helpsteer_rloo.evaluation.reload import check_reload, fresh_process, rounding
        from helpsteer_rloo.model.loading import check_base
        from helpsteer_rloo.model.memory import release
        from helpsteer_rloo.training.lost_processes import lost_processes_explained
        from helpsteer_rloo.training.reward_model import train_reward_model
        from helpsteer_rloo.training.tracking import tracked
        from helpsteer_rloo.training.trl_configs import passed_on_explained

        check_base(context.model, context.tokenizer, trust_remote_code=context.trust_remote_code)
        prepared = context.prepared
        probes = [list(g.sequence(i)) for g in prepared.groups["validation"] for i in range(2)][:PROBES]
        with ExitStack() as held:
            # It imports its libraries, which takes it some seconds, while the model is trained.
            process = held.enter_context(fresh_process(stock_scores)) if is_main_process() else None
            with (
                passed_on_explained(settings.trl),
                lost_processes_explained(settings.own.output_dir),
                tracked(settings.trl.get("report_to"), directory),
            ):
                train = half_of(prepared.groups["train"], settings.own.half)
                training = train_reward_model(settings, context.tokenizer, train, prepared.groups["validation"], probes)
            release()
            scores, computed_in = training.pop("probe_scores"), training.pop("computed_in")
            _refuse_diverged(scores, directory)
            if process is None:
                return {}
            limit = rounding(scores, computed_in, training["base"]["dtype"])
            difference = check_reload(directory, probes, scores, training["base"], limit, process)
        say(f"Reloaded {directory} in a fresh process: {len(probes)} scores agree (to {difference:.2g}).")
        training["pairs"] = sum(len(group.preferences) for group in train)
        record = _reward_record(settings, context, training, {"sequences": len(probes), "max_difference": difference})
        write_text(directory / HELDOUT_PROMPTS, "".join(key + "\n" for key in prepared.heldout_prompts))
        write_json(directory / REWARD_MODEL_RECORD, record)
        return {"directory": str(directory), **training, "reload_difference": difference}

    return Stage(
        name,
        effective_settings(settings),
        work,
        artefacts=(directory / REWARD_MODEL_RECORD, directory / HELDOUT_PROMPTS),
        directory=directory,
        content=WEIGHTS,
        distributed=True,
        needs=("data",),
    )


def _refuse_diverged(scores: Sequence[float], directory: Path) -> None:
    if not all(math.isfinite(score) for score in scores):
        raise ValueError(
            "The reward model's scores are not finite: training diverged. Lower --learning_rate; the checkpoints in "
            f"{directory} are of no use."
        )


def _reward_record(
    settings: Settings[RewardKnobs], context: DataContext, training: Mapping[str, Any], reload: Mapping[str, Any]
) -> dict[str, Any]:
    report = context.prepared.report
    return {
        "base_model": context.model,
        "base": training["base"],
        BASE_IDENTITY: model_identity(training["base"]["name"]),
        "adapter": training["adapter"],
        "thinking": settings.own.thinking,
        "rendering": context.renderer.fingerprint(settings.own.max_length),
        "data": {
            "source": report["source"],
            "fingerprint": report["fingerprint"],
            "pairs": training["pairs"],
        },
        "settings": settings.describe(),
        "training": {name: training[name] for name in ("steps", "bad_steps", "last_metrics")},
        "reload": dict(reload),
        "provenance": provenance(),
    }


def verification_stage(
    run: RunDir, settings: Settings[RewardKnobs], context: DataContext, of: str = "reward_model"
) -> Stage:
    """Score the held-out pairs; print sample predictions; add accuracy and interval to the reward model's record."""
    directory = Path(settings.own.output_dir)
    batch_size = int(settings.trl.get("per_device_eval_batch_size", 8))

    def work() -> dict[str, Any]:
        from helpsteer_rloo.evaluation.cards import reward_model_card
        from helpsteer_rloo.evaluation.preference import spread_sample
        from helpsteer_rloo.evaluation.reward_model import judge_reward_model
        from helpsteer_rloo.model.loading import load_reward_model
        from helpsteer_rloo.model.memory import release

        model, record = load_reward_model(directory)
        judgements, heldout = judge_reward_model(
            model, context.renderer, context.prepared.groups["validation"], batch_size, settings.own.max_length
        )
        del model
        release()
        sample = [j.to_json() for j in spread_sample(judgements, settings.own.sample_predictions)]
        kept = (j.to_sample() for j in spread_sample(judgements, KEPT_PAIRS))
        write_bytes(run.pairs(of), json_lines(kept).encode("utf-8", "surrogatepass"))
        show(predictions_table(sample))
        show(findings_table(heldout["findings"]))
        write_json(directory / REWARD_MODEL_RECORD, {**record, "heldout": heldout, "sample_predictions": sample})
        write_text(directory / "README.md", reward_model_card({**record, "heldout": heldout}))
        low, high = heldout["interval"]
        accuracy = f"Held-out accuracy {heldout['heldout_accuracy']:.3f} [{low:.3f}, {high:.3f}]"
        say(f"{accuracy} on {len(judgements)} pairs of the {of.replace('_', ' ')}.")
        return heldout

    return Stage(
        verification_name(of),
        {"sample_predictions": settings.own.sample_predictions},
        work,
        needs=("data", of),
    )


def rloo_stage(settings: Settings[RLOOKnobs], context: DataContext, judged_on: int = 0) -> Stage:
    """Train the policy against the reward model, once it is sure that there are prompts to judge it on.

    `judged_on` is the number of held-out prompts that an evaluation is to use afterwards; 0 if there is none.
    """
    directory = Path(settings.own.output_dir)
    model = str(settings.trl["model_name_or_path"])

    def work() -> dict[str, Any]:
        from helpsteer_rloo.evaluation.cards import policy_card
        from helpsteer_rloo.model.loading import check_base, load_tokenizer
        from helpsteer_rloo.model.memory import release
        from helpsteer_rloo.training.lost_processes import lost_processes_explained
        from helpsteer_rloo.training.policy import train_policy
        from helpsteer_rloo.training.tracking import tracked
        from helpsteer_rloo.training.trl_configs import passed_on_explained

        trusted = bool(settings.trl.get("trust_remote_code"))
        check_reward_model(settings.own.reward_model_path, "--reward_model_path", trusted=trusted)
        if settings.own.guard_reward_model:
            check_reward_model(settings.own.guard_reward_model, "--guard_reward_model", trusted=trusted)
        if judged_on:
            heldout_prompts(settings, context, judged_on)
        revision = settings.trl.get("model_revision")
        other = model != context.model
        tokenizer = load_tokenizer(model, revision, trust_remote_code=trusted) if other else context.tokenizer
        check_base(model, tokenizer, trust_remote_code=trusted, samples=True)
        groups = context.prepared.corpus.groups
        with (
            passed_on_explained(settings.trl),
            lost_processes_explained(settings.own.output_dir),
            tracked(settings.trl.get("report_to"), directory),
        ):
            training = train_policy(settings, tokenizer, groups["train"], groups["validation"])
        release()
        if not is_main_process():
            return {}
        if "watch" in training:
            say(watch_sentence(training["watch"]))
        record = _policy_record(settings, training)
        write_text(directory / "README.md", policy_card(record))
        write_json(directory / POLICY_RECORD, record)
        return {"directory": str(directory), **training}

    inputs = {
        **effective_settings(settings),
        "reward_functions": reward_functions_digest(settings.own.reward_functions),
        "reward_model": reward_model_identity(Path(settings.own.reward_model_path)),
        "ensemble": [reward_model_identity(Path(name)) for name in settings.own.ensemble_members],
        "guard": settings.own.guard_reward_model and reward_model_identity(Path(settings.own.guard_reward_model)),
    }
    return Stage(
        "rloo",
        inputs,
        work,
        artefacts=(directory / POLICY_RECORD,),
        directory=directory,
        content=WEIGHTS,
        companions=(Path(settings.own.rollouts_dir),) if settings.own.rollouts_dir else (),
        distributed=True,
        needs=("data",),
    )


def _policy_record(settings: Settings[RLOOKnobs], training: Mapping[str, Any]) -> dict[str, Any]:
    judges = {
        "reward_model": settings.own.reward_model_path,
        "guard_reward_model": settings.own.guard_reward_model,
    }
    return {
        "base_model": str(settings.trl["model_name_or_path"]),
        "base": training["base"],
        BASE_IDENTITY: model_identity(training["base"]["name"]),
        "adapter": training["adapter"],
        "reward_model": settings.own.reward_model_path,
        "judges": {name: str(Path(directory).resolve()) if directory else None for name, directory in judges.items()},
        "judge_identities": {
            name: reward_model_identity(Path(directory)) if directory else None for name, directory in judges.items()
        },
        "settings": settings.describe(),
        "training": dict(training),
        "provenance": provenance(),
    }


def heldout_prompts(settings: Settings[RLOOKnobs], context: DataContext, most: int) -> tuple[list["TokenGroup"], Any]:
    """Prompts to judge a policy on: held out from the reward model and the policy alike, short enough for both.

    Returns:
        At most `most` prompts, and the counts of those left out.

    Raises:
        ValueError: none is left, or the reward model renders prompts differently.
    """
    from helpsteer_rloo.data.helpsteer3 import prompt_key
    from helpsteer_rloo.data.preparation import rollout_prompts

    directory = Path(settings.own.reward_model_path)
    record = read_reward_record(directory)
    if record["thinking"] != context.knobs.thinking:
        mode = "with" if record["thinking"] else "without"
        raise ValueError(f"The reward model in {directory} was trained {mode} --thinking; give the same setting here.")
    keys = read_heldout_prompts(directory)
    split = context.prepared.corpus.groups["validation"]
    unseen = [group for group in split if prompt_key(group.prompt) in keys]
    counts = Counter({"seen_by_reward_model": len(split) - len(unseen)})
    room = prompt_room(record["rendering"]["max_length"], settings.own.response_length)
    groups = rollout_prompts(unseen, context.renderer, room, counts)[:most]
    if not groups:
        raise ValueError(
            f"No held-out prompt is left to judge the policy on ({dict(counts)}): hold out more "
            "(--validation_fraction), or lower --rloo.response_length."
        )
    return groups, dict(counts)


def _domains(context: DataContext) -> dict[str, str]:
    """The domain of each held-out prompt by its last turn, which no cut changes; of two with the same, the first's."""
    domains: dict[str, str] = {}
    for group in context.prepared.corpus.groups["validation"]:
        for preference in group.preferences[:1]:
            domains.setdefault(group.prompt[-1].content, preference.domain)
    return domains


def evaluation_stage(
    run: RunDir,
    own: PipelineKnobs,
    settings: Settings[RLOOKnobs],
    context: DataContext,
    gold: Callable[[str, str, bool], float] | None,
) -> Stage:
    """Sample the untrained and the trained policy on held-out prompts with the same seeds, and compare."""
    names = ("evaluation_prompts", "evaluation_batch_size", "best_of")
    inputs = {name: getattr(own, name) for name in names}

    def work() -> dict[str, Any]:
        from helpsteer_rloo.evaluation.policy import EvaluationKnobs, Judges, PolicyPair, evaluate_policy
        from helpsteer_rloo.model.loading import Base

        path = Path(settings.own.output_dir) / POLICY_RECORD
        record = read_record(path, {"base": dict, "adapter": bool}) or {}
        check_base_record(path, record["base"])
        groups, counts = heldout_prompts(settings, context, own.evaluation_prompts)
        knobs = EvaluationKnobs(
            max_new_tokens=settings.own.response_length,
            temperature=float(settings.trl.get("temperature", 1.0)),
            top_p=float(settings.trl.get("top_p", 1.0)),
            top_k=int(settings.trl.get("top_k", 0)),
            batch_size=own.evaluation_batch_size,
            seed=own.seed,
            best_of=own.best_of,
        )
        pair = PolicyPair(Base(**record["base"]), Path(settings.own.output_dir), record["adapter"])
        judges = Judges(settings.own.reward_model_path, settings.own.guard_reward_model, gold)
        result, samples = evaluate_policy(pair, judges, context.tokenizer, groups, knobs)
        domains = _domains(context)
        rows = ({**row, "domain": domains.get(row["prompt"][-1]["content"])} for row in samples)
        write_text(run.samples, json_lines(rows))
        return {**result, "heldout_prompts": counts}

    return Stage("evaluation", inputs, work, artefacts=(run.samples,), needs=("data", "rloo"))
