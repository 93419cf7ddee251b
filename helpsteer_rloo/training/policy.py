"""Training of the policy: from the flags of `rloo_helpsteer_training.py` to a finished `RLOOTrainer` run."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase

from helpsteer_rloo.checkpoints import step_of
from helpsteer_rloo.data.helpsteer3 import prompt_key
from helpsteer_rloo.data.preparation import rollout_prompts
from helpsteer_rloo.groups import PromptGroup, TokenGroup
from helpsteer_rloo.model.loading import Base, read_reward_record
from helpsteer_rloo.model.roles import GUARD_ADAPTER, REWARD_ADAPTER
from helpsteer_rloo.processes import process_count
from helpsteer_rloo.records.reward_model import read_heldout_prompts
from helpsteer_rloo.rendering import Renderer
from helpsteer_rloo.reward_functions import load_reward_functions
from helpsteer_rloo.run_dir import WATCH
from helpsteer_rloo.settings.checks import prompt_room
from helpsteer_rloo.settings.config import Settings
from helpsteer_rloo.settings.flags import FlagValue
from helpsteer_rloo.settings.knobs import RLOOKnobs
from helpsteer_rloo.training.ledger import discard_rollouts_from
from helpsteer_rloo.training.rloo import RLOOConfig, RLOOTrainer
from helpsteer_rloo.training.running import save_final, train_to_the_end
from helpsteer_rloo.training.scorer import EnsembleScorer, RewardModelScorer
from helpsteer_rloo.training.trl_configs import build_args, build_model_setup
from helpsteer_rloo.training.watch import PolicyWatch, WatchRules


def train_policy(
    settings: Settings[RLOOKnobs],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[PromptGroup],
    heldout: list[PromptGroup],
) -> dict[str, Any]:
    """Train a policy against the reward model in `reward_model_path`, going on from the newest checkpoint.

    Prompts that the reward model was verified on are left out, prompts too long for the reward model's limit are cut
    at turn boundaries, those that a cut makes equal to one of the `heldout` prompts are left out, and all are counted.

    Returns:
        `steps`, `bad_steps` (those of them that were skipped), `prompts` (counts by reason), `base`, `adapter`,
        `shared_base` (whether the reward model stands on the policy's base) and the last logged metrics.

    Raises:
        ValueError: the reward model is missing, renders text differently, or leaves no room for a completion.
    """
    own = settings.own
    record = read_reward_record(own.reward_model_path)
    args = rloo_args(settings, record)  # before any model, since it decides which device is this process's
    renderer = check_rendering(own, record, tokenizer)
    counts: Counter[str] = Counter()
    room = prompt_room(record["rendering"]["max_length"], own.response_length)
    groups = training_prompts(own, renderer, room, prompts, counts)
    groups = _without(groups, rollout_prompts(heldout, renderer, room, Counter()), counts)
    watched, groups = _set_apart(groups, own.watch_prompts, counts) if own.watched else ([], groups)
    setup = build_model_setup(settings, args, task_type="CAUSAL_LM")
    args.model_init_kwargs = setup.init_kwargs
    directories = (own.reward_model_path, *own.ensemble_members)
    scorers = [_scorer(own, directory, tokenizer) for directory in directories]
    reward = EnsembleScorer(scorers, worst=own.score_of_ensemble == "worst") if own.ensemble_members else scorers[0]
    trainer = RLOOTrainer(
        model=setup.base.name,
        reward_funcs=[reward, *load_reward_functions(own.reward_functions)],
        args=args,
        train_dataset=_prompt_dataset(groups),
        processing_class=tokenizer,
        quantization_config=setup.quantization,
        peft_config=setup.peft,
    )
    for number, (scorer, directory) in enumerate(zip(scorers, directories, strict=True), start=1):
        name = REWARD_ADAPTER if number == 1 else f"{REWARD_ADAPTER}-{number}"
        scorer.role = trainer.reward_role(directory, setup.base, name)
    watch = _watch(trainer, settings, setup.base, watched) if watched else None
    bad_steps = _train(trainer, own, watch)
    save_final(trainer)
    return {
        "steps": trainer.state.global_step,
        "bad_steps": bad_steps,
        "episodes": trainer.state.global_step * _episodes_a_step(args, own),
        "prompts": dict(counts),
        "base": asdict(setup.base),
        "adapter": setup.peft is not None,
        "shared_base": all(scorer.role and scorer.role.adapter is not None for scorer in scorers),
        "last_metrics": _last_metrics(trainer.state.log_history),
        **({"watch": watch.summary()} if watch else {}),
    }


def _scorer(own: RLOOKnobs, directory: str, tokenizer: PreTrainedTokenizerBase) -> RewardModelScorer:
    """The scorer of a trained reward model, which has none yet."""
    record = read_reward_record(directory)
    check_rendering(own, record, tokenizer, directory)
    limit = record["rendering"]["max_length"]
    return RewardModelScorer(None, batch_size=own.local_rollout_forward_batch_size, max_length=limit)


def _watch(
    trainer: RLOOTrainer,
    settings: Settings[RLOOKnobs],
    base: Base,
    prompts: list[TokenGroup],
) -> PolicyWatch:
    """What watches the policy on its own prompts, with the guard if there is one."""
    own, guard = settings.own, None
    if own.guard_reward_model is not None:
        guard = _scorer(own, own.guard_reward_model, cast(PreTrainedTokenizerBase, trainer.processing_class))
        guard.role = trainer.reward_role(own.guard_reward_model, base, GUARD_ADAPTER)
    steps = own.steps_between(settings.trl["save_steps"], trainer.args.max_steps)
    rules = WatchRules(steps, own.on_alarm, own.max_kl)
    watch = PolicyWatch(trainer, prompts, guard, rules, Path(own.output_dir) / WATCH)
    trainer.add_callback(watch)
    return watch


def _train(trainer: RLOOTrainer, own: RLOOKnobs, watch: PolicyWatch | None) -> int:
    """Train to the end, or to where the watch ends it; what lies behind the checkpoint is discarded and made again."""

    def begin(checkpoint: Path | None) -> bool:
        step = step_of(checkpoint) if checkpoint else 0
        if trainer.accelerator.is_main_process and trainer.rollouts_dir is not None:
            discard_rollouts_from(trainer.rollouts_dir, step)
        return watch is not None and watch.begin(step)

    try:
        bad_steps = train_to_the_end(trainer, own.max_bad_steps, begin)
        if watch is not None:
            watch.finish()
        return bad_steps
    except RuntimeError as error:
        if "probability tensor contains" not in str(error):
            raise
        raise ValueError(
            f"The policy diverged at step {trainer.state.global_step}: its probabilities are no longer numbers. "
            "Lower --learning_rate, or raise --kl_coef."
        ) from error


def _episodes_a_step(args: RLOOConfig, own: RLOOKnobs) -> float:
    return cast(int, args.generation_batch_size) / (own.num_ppo_epochs * own.num_mini_batches)


def _last_metrics(history: list[dict[str, float]]) -> dict[str, float]:
    names = ("reward", "objective", "kl_per_completion", "missing_eos", "entropy", "completions/mean_length", "loss")
    logged = [row for row in history if "reward" in row]
    return {name: logged[-1][name] for name in names if name in logged[-1]} if logged else {}


def check_rendering(
    own: RLOOKnobs, record: dict[str, Any], tokenizer: PreTrainedTokenizerBase, directory: str | None = None
) -> Renderer:
    """The reward model's rendering on the policy's tokenizer; refused if it makes other ids of the same text.

    Raises:
        ValueError: template, tokenizer, thinking mode or end of turn differ, with the ones that do.
    """
    directory = directory or own.reward_model_path
    if own.thinking != record["thinking"]:
        mode = "with" if record["thinking"] else "without"
        raise ValueError(f"The reward model in {directory} was trained {mode} --thinking; give the same setting here.")
    renderer = Renderer(tokenizer, thinking=record["thinking"])
    different = renderer.differences(record["rendering"])
    if different:
        raise ValueError(
            f"The reward model in {directory} was trained with another rendering than the policy's: "
            f"{', '.join(different)} differ. Scores of text it would read differently mean nothing. Start the policy "
            f"from the model family that the reward model was trained from ({record['base_model']}), or train a reward "
            "model for this policy."
        )
    return renderer


def training_prompts(
    own: RLOOKnobs, renderer: Renderer, room: int, prompts: list[PromptGroup], counts: Counter[str]
) -> list[TokenGroup]:
    """The prompts to sample for: not held out by the reward model, cut to `room` tokens, each once."""
    heldout = read_heldout_prompts(own.reward_model_path)
    allowed = [group for group in prompts if prompt_key(group.prompt) not in heldout]
    counts["heldout_by_reward_model"] = len(prompts) - len(allowed)
    return rollout_prompts(allowed, renderer, room, counts)


def _set_apart(groups: list[TokenGroup], most: int, counts: Counter[str]) -> tuple[list[TokenGroup], list[TokenGroup]]:
    """At most so many prompts, at even distances and no more than a quarter of all, and the others.

    Raises:
        ValueError: they are too few for an interval, or for all processes.
    """
    count, needed = min(most, len(groups) // 4), 2 * process_count()
    if count < needed:
        raise ValueError(
            f"Of {len(groups)} prompts only a quarter can be kept out of training to watch the policy on, and {needed} "
            "are needed. Use more data, or leave out --guard_reward_model, --watch_steps and --max_kl."
        )
    apart = {len(groups) * number // count for number in range(count)}
    counts["watched"] = count
    counts["prompts"] -= count
    parts: tuple[list[TokenGroup], list[TokenGroup]] = ([], [])
    for place, group in enumerate(groups):
        parts[0 if place in apart else 1].append(group)
    return parts


def _without(groups: list[TokenGroup], heldout: list[TokenGroup], counts: Counter[str]) -> list[TokenGroup]:
    """Leave out prompts that a cut has made equal to a held-out one; refuse to train on nothing."""
    judged = {group.prompt_ids for group in heldout}
    kept = [group for group in groups if group.prompt_ids not in judged]
    counts["heldout_after_cut"] = len(groups) - len(kept)
    counts["prompts"] = len(kept)
    if not kept:
        raise ValueError(f"No prompt is left to train on ({dict(counts)}); lower --response_length or use more data.")
    return kept


def rloo_args(settings: Settings[RLOOKnobs], record: dict[str, Any]) -> RLOOConfig:
    """The flags of the published scripts as `RLOOConfig`: E completions in all, B a batch of rollouts."""
    own = settings.own
    _check_generation(settings.trl)
    per_device = int(settings.trl["per_device_train_batch_size"])
    accumulation = int(settings.trl["gradient_accumulation_steps"])
    return build_args(
        RLOOConfig,
        settings,
        output_dir=own.output_dir,
        max_steps=own.optimizer_steps(per_device, accumulation, process_count()),
        num_generations=own.rloo_k,
        num_iterations=own.num_ppo_epochs,
        steps_per_generation=accumulation * own.num_mini_batches,
        beta=own.kl_coef,
        epsilon=own.cliprange,
        max_completion_length=own.response_length,
        chat_template_kwargs={"enable_thinking": record["thinking"]},
        missing_eos_penalty=own.missing_eos_penalty,
        length_penalty=own.length_penalty,
        kl_estimator=own.kl_estimator,
        kl_in=own.kl_in,
        target_kl=own.target_kl,
        importance_correction=own.importance_correction,
        importance_cap=own.importance_cap,
        rollout_forward_batch_size=own.local_rollout_forward_batch_size,
        engine=own.engine,
        packed_tokens=own.packed_tokens,
        rollouts_dir=own.rollouts_dir or str(Path(own.output_dir) / "rollouts"),
    )


def _check_generation(trl: Mapping[str, FlagValue]) -> None:
    """Refuse names that transformers' `generate` would pass over in silence."""
    given = trl.get("generation_kwargs")
    if not isinstance(given, dict) or trl.get("use_vllm"):
        return
    unknown = sorted(given.keys() - vars(GenerationConfig()).keys())
    if unknown:
        raise ValueError(f"--generation_kwargs has keys that generate does not know: {', '.join(map(repr, unknown))}.")


def _prompt_dataset(groups: list[TokenGroup]) -> Dataset:
    return Dataset.from_list([{"prompt": [{"role": m.role, "content": m.content} for m in g.prompt]} for g in groups])
