"""Operations and seconds of every stage, from lengths, dimensions and the rate of the hardware.

Counted are products: linear layers, attention, the vocabulary head. What else a step does (norms, the optimizer, the
loop) is in the utilisation that the rate is multiplied with. Sampling reads all weights and caches for every token, and
takes the longer of reading and computing. Completions are counted at full length, so that sampling and the passes over
them are at the upper end.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from helpsteer_rloo.planning.lengths import Corpus
from helpsteer_rloo.planning.request import (
    EvaluationStage,
    Judge,
    Request,
    RewardStage,
    RLOOStage,
    Trained,
    Watch,
    named,
)
from helpsteer_rloo.planning.shapes import Shape, Work, backward_flops, forward_flops, head_flops, linear_flops

TERA, GIGA = 1e12, 1e9


@dataclass(frozen=True, slots=True)
class Rate:
    """What the hardware reaches, on each process, and where that is known from.

    Attributes:
        half: Operations a second on half precision.
        single: Operations a second on float32.
        reading: Bytes a second from memory.
        source: In words.
    """

    half: float
    single: float
    reading: float
    source: str

    def of(self, width: int) -> float:
        """Operations a second on numbers of so many bytes."""
        return self.half if width < 4 else self.single


@dataclass(frozen=True, slots=True)
class Part:
    """Of a stage: passes of one kind, over all processes.

    `seconds` are those of the run, None without a rate; `tokens` go through the body, `steps` are of the optimizer.
    """

    stage: str
    name: str
    tokens: float
    flops: float
    seconds: float | None
    steps: int = 0


def parts_of(request: Request, corpus: Corpus, rate: Rate | None) -> list[Part]:
    """Every part of every stage, in order."""
    found = [part for stage in request.rewards for part in _reward(stage, request, corpus, rate)]
    if request.rloo is not None:
        found += _rloo(request.rloo, request, corpus, rate)
    if request.evaluation is not None:
        found += _evaluation(request.evaluation, corpus, rate)
    return found


def _adapter(trained: Trained | Judge) -> int:
    return 0 if trained.adapter is None else trained.adapter.parameters(trained.shape)


def step_flops(trained: Trained, work: Work, predicted: float, *, cpu: bool) -> float:
    """Forward, backward and what checkpointing computes again, of a training pass; on a CPU that is without attention.

    The vocabulary head: twice if it is frozen, value and gradient; four times if it is trained, since it is run again.
    """
    shape, adapter = trained.shape, _adapter(trained)
    forward = forward_flops(shape, work, adapter)
    head = (4 if trained.adapter is None else 2) * head_flops(shape, predicted)
    again = (linear_flops(shape, work, adapter) if cpu else forward) if trained.checkpointing else 0
    return forward + again + backward_flops(shape, work, adapter) + head


def _reward(stage: RewardStage, request: Request, corpus: Corpus, rate: Rate | None) -> list[Part]:
    trained, processes = stage.trained, request.rig.processes
    pairs = corpus.pairs * (0.5 if stage.half else 1) * stage.epochs
    work = corpus.work_a_pair * pairs
    flops = step_flops(trained, work, 0, cpu=request.rig.cpu)
    steps = round(pairs / stage.pairs_of_all) or 1
    held = corpus.work_a_pair * corpus.heldout_pairs
    check = forward_flops(trained.shape, held, _adapter(trained))
    return [
        Part(stage.name, "training", work.tokens, flops, _seconds(flops, trained.compute, rate, processes), steps),
        Part(stage.name, "verification", held.tokens, check, _seconds(check, trained.weights, rate, 1)),
    ]


def _seconds(flops: float, width: int, rate: Rate | None, processes: int) -> float | None:
    return None if rate is None else flops / rate.of(width) / processes


def _rloo(stage: RLOOStage, request: Request, corpus: Corpus, rate: Rate | None) -> list[Part]:
    trained, processes, shape = stage.trained, request.rig.processes, stage.trained.shape
    batches = -(-stage.steps * stage.completions // (stage.rollouts * stage.epochs))
    completions = batches * stage.rollouts * processes
    work = _sampled(corpus, stage.k, stage.response) * (completions / stage.k)
    predicted = completions * stage.response
    forward = forward_flops(shape, work, _adapter(trained))
    drawing = _Drawing(shape, trained.weights, stage.at_once, round(corpus.prompt), stage.response)
    parts = [drawing.part("RLOO", (completions / stage.k, completions), rate, processes, "sampling")]
    parts += _scores("RLOO", "scores", stage.judges, work, rate, processes)
    if stage.reference:
        flops = forward + head_flops(shape, predicted)
        parts.append(Part("RLOO", "reference", work.tokens, flops, _seconds(flops, trained.compute, rate, processes)))
    flops = step_flops(trained, work, predicted, cpu=request.rig.cpu) * stage.epochs
    seconds = _seconds(flops, trained.compute, rate, processes)
    parts.append(Part("RLOO", "training", work.tokens * stage.epochs, flops, seconds, stage.steps))
    return parts if stage.watch is None else [*parts, *_watch(stage, stage.watch, corpus, rate, processes)]


def _sampled(corpus: Corpus, completions: int, response: int) -> Work:
    """A prompt of mean length with so many completions."""
    return Work.of_group(round(corpus.prompt), [response] * completions)


def _scores(
    stage: str, name: str, judges: Sequence[Judge], work: Work, rate: Rate | None, processes: int
) -> Iterator[Part]:
    """A pass of each reward model, which several are told apart by name in."""
    for judge in judges:
        flops = forward_flops(judge.shape, work, _adapter(judge))
        seconds = _seconds(flops, judge.weights, rate, processes)
        yield Part(stage, named(name, judge, judges), work.tokens, flops, seconds)


def _watch(stage: RLOOStage, watch: Watch, corpus: Corpus, rate: Rate | None, processes: int) -> list[Part]:
    """The measurements along the training.

    For each of its prompts, which are at most a quarter of all, a completion is sampled, scored by every reward model
    and by the guard, and given its log-probability under policy and reference.
    """
    trained, shape = stage.trained, stage.trained.shape
    each = max(1, min(watch.prompts, round(corpus.prompts) // 4))
    prompts = each * watch.measurements(stage.steps)
    work = _sampled(corpus, 1, stage.response) * prompts
    rows = min(stage.watched_at_once, each)
    drawing = _Drawing(shape, trained.weights, rows, round(corpus.prompt), stage.response)
    passes = 2 * (forward_flops(shape, work, _adapter(trained)) + head_flops(shape, prompts * stage.response))
    seconds = _seconds(passes, trained.compute, rate, processes)
    guard = () if stage.guard is None else (stage.guard,)
    return [
        drawing.part("RLOO", (prompts, prompts), rate, processes, "watch: sampling"),
        *_scores("RLOO", "watch: scores", stage.judges, work, rate, processes),
        *_scores("RLOO", "watch: guard", guard, work, rate, processes),
        Part("RLOO", "watch: log-probabilities", 2 * work.tokens, passes, seconds),
    ]


@dataclass(frozen=True)
class _Drawing:
    """Sampling of `rows` completions at a time on prompts of one length; weights of so many bytes."""

    shape: Shape
    weights: int
    rows: int
    prompt: int
    response: int

    def part(self, stage: str, drawn: tuple[float, float], rate: Rate | None, processes: int, name: str) -> Part:
        """Reading of each prompt, and then a pass over all weights for each token of `rows` completions.

        `drawn` are prompts and completions.
        """
        s, (prompts, completions) = self.shape, drawn
        reading = forward_flops(s, Work.of_group(self.prompt, []) * prompts)
        tokens = completions * self.response
        attended = tokens * (self.prompt + self.response / 2)
        decoding = forward_flops(s, Work(tokens, attended)) + head_flops(s, tokens)
        seconds = None
        if rate is not None:
            held = (s.body_parameters() + s.embedding_parameters()) * self.weights
            cache = self.rows * (self.prompt + self.response / 2) * s.layers * 2 * s.keys * self.weights
            read = (tokens / self.rows) * (held + cache) / rate.reading
            computed = decoding / rate.of(self.weights)
            seconds = (reading / rate.of(self.weights) + max(read, computed)) / processes
        return Part(stage, name, prompts * self.prompt + tokens, reading + decoding, seconds)


def _evaluation(stage: EvaluationStage, corpus: Corpus, rate: Rate | None) -> list[Part]:
    policy, prompt = stage.policy, round(corpus.prompt)
    answers, each = stage.prompts * (2 + stage.best_of), stage.prompts
    drawing = _Drawing(policy.shape, policy.weights, min(stage.at_once, each), prompt, stage.response)
    alone = _sampled(corpus, 1, stage.response)
    passes = 2 * forward_flops(policy.shape, alone * each, _adapter(policy))
    passes += 2 * head_flops(policy.shape, each * stage.response)
    return [
        drawing.part("evaluation", (answers, answers), rate, 1, "sampling"),
        Part(
            "evaluation",
            "log-probabilities",
            2 * alone.tokens * each,
            passes,
            _seconds(passes, policy.weights, rate, 1),
        ),
        *_scores("evaluation", "scores", stage.judges, alone * answers, rate, 1),
    ]
