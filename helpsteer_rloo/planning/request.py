"""What is planned: the stages of a run with the sizes that memory and time depend on, as records."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from helpsteer_rloo.planning.memory import FLOAT32, Adapter, Quantization
from helpsteer_rloo.planning.shapes import Shape
from helpsteer_rloo.run_dir import verification_name


@dataclass(frozen=True, slots=True)
class Rig:
    """What a run is on: a CPU or GPUs, how many processes, and how they share a model.

    `ddp` shares nothing, `zero2` gradients and optimizer, `fsdp` and `zero3` weights too.
    """

    cpu: bool = False
    processes: int = 1
    sharding: str = "ddp"

    @property
    def weights_over(self) -> int:
        """Processes that the weights are shared out over."""
        return self.processes if self.sharding in ("fsdp", "zero3") else 1

    @property
    def states_over(self) -> int:
        """Processes that gradients and optimizer are shared out over."""
        return self.processes if self.sharding != "ddp" else 1

    @property
    def deepspeed(self) -> bool:
        """Whether TRL's own passes run, which DeepSpeed needs."""
        return self.sharding.startswith("zero")


@dataclass(frozen=True, slots=True)
class Trained:
    """A model as its training holds it.

    Attributes:
        name: Of the model that training starts from.
        shape: Its dimensions.
        weights: Bytes of a weight.
        compute: Bytes of a number in its linear layers.
        adapter: LoRA, which then is all that is trained.
        checkpointing: Whether layers are computed again in the backward pass.
        states: Bytes of the optimizer for a trained weight.
        packed: Whether passes are the engine's own; TRL's need more than is planned here.
        quantization: How the base is held, where its weights have fewer bits.
        adapted: The same with LoRA as the flags describe it, where all weights are trained.
    """

    name: str
    shape: Shape
    weights: int
    compute: int
    adapter: Adapter | None
    checkpointing: bool
    states: int
    packed: bool
    quantization: Quantization | None = None
    adapted: "Trained | None" = None

    @property
    def trained_bytes(self) -> int:
        """Of a trained weight; adapters are always held in float32."""
        return self.weights if self.adapter is None else FLOAT32


@dataclass(frozen=True, slots=True)
class RewardStage:
    """Training of a reward model and its verification.

    `pairs` is what a process takes in an optimizer step, `batch` in a pass of TRL's; `scored_at_once` are responses.
    """

    name: str
    trained: Trained
    max_length: int
    batch: int
    pairs: int
    packed_tokens: int
    scored_at_once: int
    epochs: float
    pairs_of_all: int
    """Of an optimizer step, on all processes."""
    half: bool = False
    there: bool = False
    """Whether the training is finished, and the verification is to come."""


@dataclass(frozen=True, slots=True)
class Judge:
    """A reward model as RLOO and the judgement use it; `shared` if it stands on the policy's own base.

    `base` names the model that it was made from, and `stage` the one that trains it in this run, if one does. `name`
    is what it is in RLOO: of several each has its own.
    """

    shape: Shape
    weights: int
    adapter: Adapter | None
    base: str = ""
    stage: str | None = None
    shared: bool = False
    name: str = "reward model"
    quantization: Quantization | None = None

    def beside(self, policy: Trained) -> "Judge":
        """As it is held in the training of a policy: on its base if both are adapters on the same one."""
        same = Path(self.base).resolve() == Path(policy.name).resolve()  # an adapter records its base's absolute path
        held = (self.weights, self.quantization) == (policy.weights, policy.quantization)
        alike = bool(policy.adapter and self.adapter and held)
        return dataclasses.replace(self, shared=policy.packed and alike and same)


def named(what: str, judge: Judge, judges: Collection[Judge]) -> str:
    """What a reward model does, which several are told apart by name in."""
    return what if len(judges) == 1 else f"{what}: {judge.name}"


@dataclass(frozen=True, slots=True)
class Watch:
    """Measurements of the policy along its training: on so many prompts, and so often.

    There is one before the first optimizer step, one every `every` steps, and one behind the last.
    """

    prompts: int
    every: int

    def measurements(self, steps: int) -> int:
        """How many there are in a run of so many steps.

        >>> Watch(128, 50).measurements(100), Watch(128, 50).measurements(101)
        (3, 4)
        """
        return 1 + -(-steps // self.every)


@dataclass(frozen=True, slots=True)
class RLOOStage:
    """Training of the policy. Lengths are the longest that can occur; counts are of one process.

    Attributes:
        trained: The policy.
        judges: Reward model and further ones of an ensemble; they score every rollout.
        guard: Scores what is measured along the training, and no rollout.
        reference: Whether KL is used.
        prompt: Tokens of a prompt.
        response: Tokens of a completion.
        k: Completions of a prompt that are computed together.
        batch: Completions in one of TRL's passes.
        completions: In an optimizer step.
        rollouts: In a batch of rollouts.
        forward_batch: Completions that are to be sampled or scored at once.
        packed_tokens: Budget of a row.
        watch: What is measured along the training, one completion of each prompt; None if nothing is.
        steps: Optimizer steps in all.
        epochs: How often a completion is trained on.
        group: Completions of a prompt, whoever computes them.
        vllm: Whether vLLM samples.
    """

    trained: Trained
    judges: tuple[Judge, ...]
    guard: Judge | None
    reference: bool
    prompt: int
    response: int
    k: int
    batch: int
    completions: int
    rollouts: int
    forward_batch: int
    packed_tokens: int
    watch: Watch | None
    steps: int
    epochs: int
    group: int
    vllm: bool

    @property
    def at_once(self) -> int:
        """Completions that are sampled or scored at once: at least those of a prompt, and no more than there are."""
        return min(max(self.group, self.forward_batch), self.rollouts)

    @property
    def watched_at_once(self) -> int:
        """Completions that are sampled or scored at once when the policy is watched, each of a prompt of its own."""
        return min(max(self.group, self.forward_batch), self.watch.prompts) if self.watch else 0

    @property
    def scoring(self) -> tuple[Judge, ...]:
        """All that score in the training, the guard last."""
        return self.judges if self.guard is None else (*self.judges, self.guard)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, which is the limit of the reward model."""
        return self.prompt + self.response


@dataclass(frozen=True, slots=True)
class EvaluationStage:
    """Judgement of the policy, on the main process, with one model in memory at a time.

    `judges` are the reward model, of an ensemble the first, and the guard if there is one.
    """

    policy: Trained
    judges: tuple[Judge, ...]
    prompts: int
    prompt: int
    response: int
    at_once: int
    best_of: int


@dataclass(frozen=True, slots=True)
class Request:
    """All stages of a run, in their order; `settled` if there is a reward model by now, so that its settings stay."""

    rig: Rig
    rewards: tuple[RewardStage, ...] = ()
    rloo: RLOOStage | None = None
    evaluation: EvaluationStage | None = None
    settled: bool = False


def unfinished(request: Request, finished: Collection[str]) -> Request:
    """What is left of a run.

    Args:
        request: All of it.
        finished: Names of the stages of the pipeline that are done.
    """
    rewards: list[RewardStage] = []
    for stage in request.rewards:
        name = stage.name.replace(" ", "_")
        if not {name, verification_name(name)} <= set(finished):
            rewards.append(dataclasses.replace(stage, there=name in finished))
    there = len(rewards) < len(request.rewards) or any(stage.there for stage in rewards)
    return Request(
        request.rig,
        tuple(rewards),
        None if "rloo" in finished else request.rloo,
        None if "evaluation" in finished else request.evaluation,
        settled=request.settled or there,
    )
