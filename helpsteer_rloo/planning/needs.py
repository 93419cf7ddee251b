"""What every stage of a run holds in memory at its worst moments, on each process.

The worst row is planned for, not the mean one: pairs of two responses at `max_length` on a short prompt, prompts as
long as there is room for, completions of full length.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from helpsteer_rloo.planning.memory import (
    Net,
    PassBytes,
    Row,
    drawing_bytes,
    holes_of_copies,
    inference_bytes,
    joined_linears,
    training_bytes,
)
from helpsteer_rloo.planning.request import EvaluationStage, Judge, Request, RewardStage, Rig, RLOOStage, Trained, named
from helpsteer_rloo.planning.requesting import judge_of
from helpsteer_rloo.sizes import MOST_COPIED_BYTES, PASS_TOKENS, ROW_TOKENS, SHORT

SHORTEST_PROMPT = 16
"""Tokens of the shortest prompt to expect: what a chat template takes, and a word or two."""
ROW_MULTIPLE = 16
"""On a CPU rows are filled up to a multiple of this."""
LIBRARY_BYTES, CONTEXT_BYTES = 0.08 * 2**30, 0.8 * 2**30
"""Of libraries, kernels and their buffers: on a CPU as measured, on CUDA, whose context it is, assumed."""
SLACK_CPU, SLACK = 0.02, 0.05
"""Share of tensors that the allocator holds besides: on a CPU as measured, on CUDA assumed."""
HOLES = "holes in the heap"
SHORT_ROWS = 2.2
"""On a CPU, how many times what is counted a row of short sequences keeps at most, as measured."""

Items = Mapping[str, float]


@dataclass(frozen=True)
class Phase:
    """A moment of a stage: bytes by what they are of."""

    name: str
    items: Items

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.items.values())


@dataclass(frozen=True)
class Need:
    """What a stage needs, by its moments; `notes` say what of it is not known well."""

    stage: str
    phases: tuple[Phase, ...]
    notes: tuple[str, ...] = ()

    @property
    def worst(self) -> Phase:
        """The moment that needs most."""
        return max(self.phases, key=lambda phase: phase.total)


def needs_of(request: Request) -> list[Need]:
    """What each stage needs, in their order."""
    found = [need for stage in request.rewards for need in reward_needs(stage, request.rig)]
    if request.rloo is not None:
        found.append(rloo_need(request.rloo, request.rig))
    if request.evaluation is not None:
        found.append(evaluation_need(request.evaluation, request.rig))
    return found


def reward_needs(stage: RewardStage, rig: Rig) -> list[Need]:
    """Training of a reward model, and scoring of the held-out pairs by what was saved of it."""
    trained, parameters = stage.trained, stage.trained.shape.classifier_parameters()
    row = reward_row(stage, rig)
    held = _Held(trained, parameters, rig)
    phases = held.training([row], many=stage.pairs > 1)
    judge = judge_of(stage)
    tokens = -(-stage.scored_at_once // 2) * 2 * stage.max_length
    scoring = _phase("scoring", rig, _model(judge), _scores(judge, Row(tokens, stage.scored_at_once), rig))
    verification = Need(f"{stage.name}: verification", (scoring,))
    notes = _notes(trained, rig, stage.max_length)
    return [verification] if stage.there else [Need(stage.name, phases, notes), verification]


def reward_row(stage: RewardStage, rig: Rig) -> Row:
    """The largest packed row of pairs: as many as the budget takes, or one; under TRL's passes a padded batch."""
    if not stage.trained.packed:
        return Row(2 * stage.batch * stage.max_length, 2 * stage.batch)
    pair = max(2, 2 * stage.max_length - SHORTEST_PROMPT)
    tokens = max(pair, min(stage.packed_tokens, stage.pairs * pair))
    return Row(_filled(tokens, rig), 2 * -(-tokens // pair))


def rloo_need(stage: RLOOStage, rig: Rig) -> Need:
    """Training of the policy: sampling, scores, reference, and the passes that train."""
    trained, parameters = stage.trained, stage.trained.shape.causal_parameters()
    others = _beside_the_policy(stage, rig)
    held = _Held(trained, parameters, rig, others)
    between = (held.standing, others, held.whole)
    drawn, scored, rows = drawings(stage), scored_row(stage), rloo_rows(stage, rig)
    sampler = replace(held.net, compute=held.net.weights)  # nothing of it is under autocast

    def left(tokens: int) -> Items:
        """What sampling has left behind for a pass over a row of so many."""
        return {HOLES: holes_of_copies(sampler, tokens)} if drawn and copied(sampler) else {}

    phases: list[Phase] = []
    if drawn:
        phases.append(_phase("sampling", rig, *between, _most([sampling_items(sampler, one) for one in drawn])))
    for judge in stage.scoring:
        found = _scores(judge, scored, rig)
        phases.append(_phase(named("scores", judge, stage.scoring), rig, *between, left(scored.tokens), found))
    longest = left(max(row.tokens for row in rows))
    if stage.reference:
        found = _worst([inference_bytes(held.net, row) for row in rows])
        phases.append(_phase("reference", rig, *between, longest, found))
    phases += held.training(rows, many=stage.completions > stage.k, left=longest)
    notes = ("vLLM samples: what it takes is its own setting.",) if stage.vllm else ()
    return Need("RLOO", tuple(phases), (*_notes(trained, rig, stage.longest), *notes))


def rloo_rows(stage: RLOOStage, rig: Rig) -> list[Row]:
    """The largest packed rows of rollouts: one group of the longest prompt, and a full one of short prompts."""
    if not stage.trained.packed:
        return [Row(stage.batch * (stage.prompt + stage.response), stage.batch * stage.response, stage.batch)]
    group, drawn = stage.prompt + stage.k * stage.response, stage.completions * stage.response
    groups = -(-stage.completions // stage.k)
    full = min(stage.packed_tokens, groups * group)
    return [
        Row(_filled(tokens, rig), predicted, predicted)
        for tokens, predicted in ((group, stage.k * stage.response), (full, min(full, drawn)))
    ]


def scored_row(stage: RLOOStage) -> Row:
    """The row that a reward model is given: whole groups, or when the policy is watched single completions."""
    tokens = -(-stage.at_once // stage.k) * stage.prompt + stage.at_once * stage.response
    return Row(max(tokens, stage.watched_at_once * stage.longest), max(stage.at_once, stage.watched_at_once))


@dataclass(frozen=True, slots=True)
class Drawn:
    """What is sampled at once: completions (`rows`) of so many prompts, and the tokens of one of each."""

    prompts: int
    rows: int
    prompt: int
    response: int


def drawings(stage: RLOOStage) -> list[Drawn]:
    """What the embedded sampler takes at once: several completions of each prompt, and where RLOO is watched one."""
    rollouts = [] if stage.vllm else [(-(-stage.at_once // stage.k), stage.at_once)]
    alone = [(stage.watched_at_once, stage.watched_at_once)] if stage.watch else []
    return [Drawn(prompts, rows, stage.prompt, stage.response) for prompts, rows in (*rollouts, *alone)]


def evaluation_need(stage: EvaluationStage, rig: Rig) -> Need:
    """Judgement of the policy, with one model in memory at a time, whole on the main process."""
    policy, alone = stage.policy, replace(rig, processes=1, sharding="ddp")
    net = _net(policy, rig, compute=policy.weights)
    weights = {"base weights": _base_bytes(policy, policy.shape.causal_parameters())}
    one = stage.prompt + stage.response
    row = Row(_filled(max(one, min(PASS_TOKENS, stage.prompts * one)), rig), PASS_TOKENS, PASS_TOKENS)
    rows = min(stage.at_once, stage.prompts)
    phases = [
        _phase("sampling", alone, weights, sampling_items(net, Drawn(rows, rows, stage.prompt, stage.response))),
        _phase("log-probabilities", alone, weights, _items(inference_bytes(net, row))),
    ]
    for judge in stage.judges:
        row = Row(stage.at_once * one, stage.at_once)
        name = named("scores", judge, stage.judges)
        phases.append(_phase(name, alone, _model(judge), _scores(judge, row, alone)))
    return Need("evaluation", tuple(phases))


# ---- what stays -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Held:
    """A model in training: what its weights, optimizer and gradients are, beside `others`."""

    trained: Trained
    parameters: int
    rig: Rig
    others: Items | None = None

    @property
    def net(self) -> Net:
        return _net(self.trained, self.rig, self.trained.compute)

    @property
    def changed(self) -> int:
        """Weights that are trained."""
        adapter = self.trained.adapter
        return self.parameters if adapter is None else adapter.parameters(self.trained.shape)

    @property
    def standing(self) -> Items:
        """Weights and optimizer; gradients come and go."""
        trained, rig = self.trained, self.rig
        frozen = 0 if trained.adapter is None else _base_bytes(trained, self.parameters)
        # DeepSpeed holds weights in half precision, and shares out float32 ones with the optimizer's states
        states = trained.states + (4 if rig.deepspeed and trained.adapter is None else 0)
        width = trained.compute if rig.deepspeed else trained.trained_bytes
        return {
            "base weights": frozen / rig.weights_over,
            "trained weights": self.changed * width / rig.weights_over,
            "optimizer": self.changed * states / rig.states_over,
        }

    @property
    def gradients(self) -> Items:
        """Of the weights trained; data parallelism has them a second time, in the buckets that it exchanges."""
        twice = 2 if self.rig.processes > 1 and self.rig.sharding == "ddp" else 1
        return {"gradients": twice * self.changed * self.trained.trained_bytes / self.rig.states_over}

    @property
    def whole(self) -> Items:
        """Where weights are shared out: all of them, for passes without gradient."""
        if self.rig.weights_over == 1:
            return {}
        if self.trained.adapter is None:  # gathered in the type that they are computed with
            return {"gathered weights": self.parameters * self.trained.compute}
        return {"gathered weights": _base_bytes(self.trained, self.parameters)}

    @property
    def gathered(self) -> Items:
        """Where weights are shared out: what is whole in a pass that trains, two layers and what is outside of them."""
        if self.rig.weights_over == 1:
            return {}
        layer, shape = self.trained.shape.layer_parameters(), self.trained.shape
        outside = self.parameters - shape.layers * layer
        width = self.trained.compute if self.trained.adapter is None else self.trained.weights
        return {"gathered weights": (2 * layer + outside) * width}

    @property
    def cast(self) -> Items:
        """All trained weights in half precision, which autocast keeps until a forward pass is over."""
        kept = self.net.autocast and self.trained.adapter is None and not self.trained.checkpointing
        return {"weights in half precision": self.parameters * self.trained.compute} if kept else {}

    def training(self, rows: Sequence[Row], *, many: bool, left: Items | None = None) -> tuple[Phase, ...]:
        """The worst row's pass, and the end of a backward pass, where all gradients exist.

        With `many` rows a step, those of earlier rows exist in a pass too, and meet the new ones. (A step of several
        groups may happen to be one row, and then needs less by its gradients.) `left` is what sampling has left behind.
        """
        around = (self.standing, self.others or {}, self.gathered, left or {})
        found = [training_bytes(self.net, row, checkpointing=self.trained.checkpointing) for row in rows]
        before = self.gradients if many or self.trained.adapter is not None else {}
        phases = [_phase("pass and backward", self.rig, *around, before, self.cast, _worst(found))]
        if self.trained.adapter is None:
            embedding = self.trained.shape.embedding_parameters() * self.trained.weights
            new = {"activations": float(embedding)} if many else {}
            phases.append(_phase("end of the backward pass", self.rig, *around, self.gradients, new))
        return tuple(phases)


def _net(trained: Trained, rig: Rig, compute: int) -> Net:
    return Net(trained.shape, trained.weights, compute, trained.adapter, rig.cpu, trained.quantization is not None)


def _base_bytes(model: Trained | Judge, parameters: int) -> float:
    """Of all weights, in fewer bits where they are held so."""
    saved = model.quantization.saved(model.shape, model.weights) if model.quantization else 0.0
    return parameters * model.weights - saved


def _model(judge: Judge) -> Items:
    """A reward model of its own."""
    adapter = judge.adapter.parameters(judge.shape) * 4.0 if judge.adapter else 0.0
    return {"base weights": _base_bytes(judge, judge.shape.classifier_parameters()), "reward adapters": adapter}


def _beside_the_policy(stage: RLOOStage, rig: Rig) -> Items:
    """Reference and reward models, whole where they are models of their own, else as adapters."""
    trained, items = stage.trained, dict[str, float]()
    if stage.reference and trained.adapter is None:
        items["reference model"] = trained.shape.causal_parameters() * trained.weights / rig.weights_over
    for judge in stage.scoring:
        for kind, size in _model(judge).items():
            named = "reward models" if kind == "base weights" else kind
            items[named] = items.get(named, 0.0) + (0.0 if judge.shared and kind == "base weights" else size)
    return items


# ---- passes ---------------------------------------------------------------------------------------------------------


def _scores(judge: Judge, row: Row, rig: Rig) -> Items:
    net = Net(judge.shape, judge.weights, judge.weights, judge.adapter, rig.cpu, judge.quantization is not None)
    return _items(inference_bytes(net, Row(_filled(row.tokens, rig), row.read)))


def sampling_items(net: Net, drawn: Drawn) -> Items:
    """Caches and the worst moment of sampling: prompts being read, or the end of the longest completions."""
    s, prompts = net.shape, drawn.prompts
    a_token = s.layers * 2 * s.keys * net.weights
    reading = Row(min(prompts * drawn.prompt, max(ROW_TOKENS, drawn.prompt)), prompts)
    of_prompts, own = prompts * drawn.prompt * a_token, drawn.rows * drawn.response * a_token
    at_start = {"key and value caches": float(of_prompts), **_items(inference_bytes(net, reading))}
    moment = own / s.layers + drawing_bytes(net, drawn.rows)  # one layer's cache grows at a time
    at_end = {"key and value caches": float(of_prompts + own), "activations": moment}
    return {**_most([at_start, at_end]), "copies for sampling": copied(net)}


def copied(net: Net) -> float:
    """Weights that sampling holds once more: with adapters folded in, side by side, and on CPUs laid out for few rows.

    All of them or none: none where that would be too much. What is held in fewer bits is not copied.
    """
    s = net.shape
    everything = (s.embedding_parameters() + (0 if net.quantized else s.body_parameters())) * net.weights
    if everything > MOST_COPIED_BYTES:
        return 0.0
    if net.cpu:
        return float(everything)
    if net.quantized:
        return 0.0
    joined = sum(size for names, size in joined_linears(s).items() if len(names) > 1)
    return float(joined * s.layers * net.weights)


def _items(found: PassBytes) -> Items:
    return {"activations": found.activations, "vocabulary head": found.head, HOLES: found.holes}


def _worst(found: Sequence[PassBytes]) -> Items:
    return _items(max(found, key=lambda one: one.total))


def _most(found: Sequence[Items]) -> Items:
    return max(found, key=lambda items: sum(items.values()))


def _filled(tokens: int, rig: Rig) -> int:
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE if rig.cpu else tokens


def _phase(name: str, rig: Rig, *parts: Items) -> Phase:
    """A moment of what its parts hold together, with what device and allocator take."""
    items: dict[str, float] = {}
    for part in parts:
        for kind, size in part.items():
            items[kind] = items.get(kind, 0.0) + size
    fixed, share = (LIBRARY_BYTES, SLACK_CPU) if rig.cpu else (CONTEXT_BYTES, SLACK)
    items["allocator and libraries"] = fixed + share * sum(items.values())
    return Phase(name, {kind: size for kind, size in items.items() if size})


def _notes(trained: Trained, rig: Rig, longest: int) -> tuple[str, ...]:
    least = "whose activations are more than is counted here: this is the least."
    if trained.quantization is not None:
        return (f"On a base in {trained.quantization.bits} bits adapters run as PEFT runs them, {least}",)
    if trained.packed:
        short = f"On a CPU, rows of sequences of at most {SHORT} tokens keep up to {SHORT_ROWS} times what is counted."
        return (short,) if rig.cpu and longest <= SHORT else ()
    engine = "DeepSpeed runs" if rig.deepspeed else "--engine trl runs"
    return (f"{engine} TRL's own passes, {least}",)
