"""From the settings of a run to what is planned of it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpsteer_rloo.planning.memory import FLOAT32, Adapter, Quantization
from helpsteer_rloo.planning.request import EvaluationStage, Judge, Request, RewardStage, Rig, RLOOStage, Trained, Watch
from helpsteer_rloo.planning.shapes import shape_of
from helpsteer_rloo.records.reward_model import read_reward_record
from helpsteer_rloo.run_dir import read_json
from helpsteer_rloo.settings.checks import prompt_room
from helpsteer_rloo.settings.config import PipelineSettings, Settings, ensemble
from helpsteer_rloo.settings.knobs import RewardKnobs, RLOOKnobs
from helpsteer_rloo.sizes import DEFAULT_TOKENS, DEFAULT_TOKENS_CPU

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_STATES = {"adamw_torch": 2, "adamw_torch_fused": 2, "adafactor": 0, "sgd": 0, "adagrad": 1, "rmsprop": 1, "lion": 1}
"""Numbers that an optimizer keeps for a weight, each of the weight's type; of others, Adam's two are counted."""
_8BIT = 2
"""Bytes a weight of Adam's two states in 8 bits; the names of such optimizers end so."""


def request_of_pipeline(settings: PipelineSettings, rig: Rig) -> Request:
    """What a pipeline will run.

    Raises:
        ValueError: something of it cannot be planned; or the settings contradict each other.
    """
    own, trained = settings.own, dict[str, RewardStage]()
    if not own.rloo_only:
        members = ensemble(settings.reward)
        trained = {
            m.own.output_dir: stage for m, stage in zip(members, _reward_stages(settings.reward, rig), strict=True)
        }
    if settings.guard is not None:
        guard = dataclasses.replace(_reward_stage(settings.guard, rig, 1), name=GUARD)
        trained[settings.guard.own.output_dir] = guard
    rewards = tuple(trained.values())
    if own.reward_model_only:
        return Request(rig, rewards)
    longest = _trained_on(settings.rloo) if own.rloo_only else settings.reward.own.max_length
    rloo = _rloo_stage(settings.rloo, rig, trained, longest)
    evaluation = EvaluationStage(
        policy=rloo.trained,
        judges=judges_of_evaluation(rloo),
        prompts=own.evaluation_prompts,
        prompt=rloo.prompt,
        response=rloo.response,
        at_once=own.evaluation_batch_size,
        best_of=own.best_of,
    )
    return Request(rig, rewards, rloo, evaluation, settled=own.rloo_only)


def request_of_reward(settings: Settings[RewardKnobs], rig: Rig) -> Request:
    """What `reward_model_training.py` will run.

    Raises:
        ValueError: as `request_of_pipeline`.
    """
    return Request(rig, _reward_stages(settings, rig))


def request_of_rloo(settings: Settings[RLOOKnobs], rig: Rig) -> Request:
    """What `rloo_helpsteer_training.py` will run, against a reward model that is there.

    Raises:
        ValueError: as `request_of_pipeline`.
    """
    rloo = _rloo_stage(settings, rig, {}, _trained_on(settings))
    return Request(rig, rloo=rloo, settled=True)


def _trained(settings: Settings[Any], rig: Rig) -> Trained:
    """The model of a stage, with what it would be with LoRA."""
    if settings.trl.get("use_peft"):
        return _trained_as(settings, rig, use_peft=True)
    whole = _trained_as(settings, rig, use_peft=False)
    return dataclasses.replace(whole, adapted=_trained_as(settings, rig, use_peft=True))


def _trained_as(settings: Settings[Any], rig: Rig, *, use_peft: bool) -> Trained:
    trl, name = settings.trl, str(settings.trl["model_name_or_path"])
    quantization = quantization_of(trl, "use_bnb_nested_quant")
    weights = weight_bytes(use_peft, trl.get("dtype"), cpu=rig.cpu and quantization is None)
    adapter = Adapter(int(trl.get("lora_r") or 16), _targets(trl)) if use_peft else None
    half = trl.get("fp16") or trl.get("bf16", not rig.cpu)
    return Trained(
        name=name,
        shape=shape_of(name, trl.get("model_revision")),
        weights=weights,
        compute=min(weights, 2) if half else weights,
        adapter=adapter,
        checkpointing=bool(trl.get("gradient_checkpointing", True)),
        states=_states(str(trl.get("optim", "adamw_torch_fused")), FLOAT32 if adapter else weights),
        packed=settings.own.engine == "packed" and not rig.deepspeed,
        quantization=quantization,
    )


def quantization_of(given: Mapping[str, Any], nested: str) -> Quantization | None:
    """How a base is held by flags or by a record of them, in which `nested` names double quantization."""
    if given.get("load_in_8bit"):
        return Quantization(8)
    return Quantization(4, nested=bool(given.get(nested))) if given.get("load_in_4bit") else None


def weight_bytes(use_peft: bool, asked: Any, *, cpu: bool) -> int:
    """Bytes of a weight: of the type asked for, else a frozen base in bfloat16 on a GPU, the rest in float32."""
    if asked in (None, "auto"):
        return 2 if use_peft and not cpu else 4
    return BYTES[str(asked).removeprefix("torch.")]


def _targets(trl: Mapping[str, Any]) -> tuple[str, ...] | None:
    given = trl.get("lora_target_modules")
    names = [given] if isinstance(given, str) else list(given or [])
    return None if not names or "all-linear" in names else tuple(map(str, names))


def _states(optimizer: str, width: int) -> int:
    return _8BIT if optimizer.endswith("8bit") else width * _STATES.get(optimizer, 2)


def _packed_tokens(settings: Settings[Any], rig: Rig) -> int:
    return settings.own.packed_tokens or (DEFAULT_TOKENS_CPU if rig.cpu else DEFAULT_TOKENS)


def _reward_stages(settings: Settings[RewardKnobs], rig: Rig) -> tuple[RewardStage, ...]:
    return tuple(_reward_stage(member, rig, number) for number, member in enumerate(ensemble(settings), 1))


def _reward_stage(settings: Settings[RewardKnobs], rig: Rig, number: int) -> RewardStage:
    trl = settings.trl
    batch = int(trl["per_device_train_batch_size"])
    pairs = batch * int(trl["gradient_accumulation_steps"])
    return RewardStage(
        name=_numbered(number),
        trained=_trained(settings, rig),
        max_length=settings.own.max_length,
        batch=batch,
        pairs=pairs,
        packed_tokens=_packed_tokens(settings, rig),
        scored_at_once=int(trl.get("per_device_eval_batch_size", 8)),
        epochs=float(trl["num_train_epochs"]),
        pairs_of_all=pairs * rig.processes,
        half=settings.own.half != "all",
    )


def _rloo_stage(
    settings: Settings[RLOOKnobs], rig: Rig, trained_here: Mapping[str, RewardStage], longest: int
) -> RLOOStage:
    own, trl, trained = settings.own, settings.trl, _trained(settings, rig)
    batch, accumulation = int(trl["per_device_train_batch_size"]), int(trl["gradient_accumulation_steps"])
    steps = own.optimizer_steps(batch, accumulation, rig.processes)
    judges = [judge.beside(trained) for judge in _judges(settings, trained_here)]
    completions = batch * accumulation
    rollouts = completions * own.num_mini_batches
    return RLOOStage(
        trained=trained,
        judges=tuple(judge for judge in judges if judge.name != GUARD),
        guard=next((judge for judge in judges if judge.name == GUARD), None),
        reference=own.kl_coef > 0,
        prompt=prompt_room(longest, own.response_length),
        response=own.response_length,
        k=min(own.rloo_k, completions),
        batch=batch,
        completions=completions,
        rollouts=rollouts,
        forward_batch=own.local_rollout_forward_batch_size,
        packed_tokens=_packed_tokens(settings, rig),
        watch=Watch(own.watch_prompts, own.steps_between(trl["save_steps"], steps)) if own.watched else None,
        steps=steps,
        epochs=own.num_ppo_epochs,
        group=own.rloo_k,
        vllm=bool(trl.get("use_vllm")),
    )


def judge_of(stage: RewardStage) -> Judge:
    """The reward model that a stage of the run trains."""
    model = stage.trained
    return Judge(model.shape, model.weights, model.adapter, model.name, stage.name, quantization=model.quantization)


def judges_of_evaluation(rloo: RLOOStage) -> tuple[Judge, ...]:
    """The reward models that judge a finished policy, each a model of its own."""
    first = (rloo.judges[0], *([] if rloo.guard is None else [rloo.guard]))
    return tuple(dataclasses.replace(judge, shared=False) for judge in first)


GUARD = "guard"


def _judges(settings: Settings[RLOOKnobs], trained: Mapping[str, RewardStage]) -> list[Judge]:
    """The reward models of an RLOO training, the guard last: those that the run trains, by directory, or is given."""
    own = settings.own
    named = {_numbered(number): at for number, at in enumerate([own.reward_model_path, *own.ensemble_members], 1)}
    if own.guard_reward_model:
        named[GUARD] = own.guard_reward_model
    found = {name: judge_of(trained[at]) if at in trained else _recorded(at) for name, at in named.items()}
    return [dataclasses.replace(judge, name=name) for name, judge in found.items()]


def _numbered(number: int) -> str:
    return "reward model" if number == 1 else f"reward model {number}"


def _recorded(directory: str) -> Judge:
    record = read_reward_record(directory)
    base = record["base"]
    weights, adapter = BYTES[base.get("dtype", "float32")], None
    if record["adapter"]:
        config = read_json(Path(directory) / "adapter_config.json") or {}
        names = config.get("target_modules")
        adapter = Adapter(int(config.get("r") or 16), tuple(names) if isinstance(names, list) else None)
    name = base["name"] if adapter else directory
    quantization = quantization_of(base.get("quantization") or {}, "bnb_4bit_use_double_quant")
    return Judge(shape_of(name, base.get("revision")), weights, adapter, name, quantization=quantization)


def _trained_on(settings: Settings[RLOOKnobs]) -> int:
    """The longest sequence that the reward model was trained on."""
    return int(read_reward_record(settings.own.reward_model_path)["rendering"]["max_length"])
