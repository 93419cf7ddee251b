"""The largest settings that fit, one at a time, and what to change where a run does not fit.

Memory grows with every setting, so that a bisection finds the largest value. What is proposed has been computed to fit.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from helpsteer_rloo.planning.memory import Adapter
from helpsteer_rloo.planning.needs import Need, needs_of
from helpsteer_rloo.planning.request import Request, Trained

SMALLEST_LENGTH = 64
"""Tokens below which no length limit is proposed."""
_HIGHEST_LENGTH, _HIGHEST_ROWS, _HIGHEST_K = 131_072, 4096, 256


@dataclass(frozen=True)
class Knob:
    """A setting that memory grows with.

    Attributes:
        flag: Its name, in the pipeline with that of the stage in front.
        get: Its value in a request; None where it has no effect.
        put: The request with another value.
        lowest: The smallest value that is proposed.
        highest: The largest one.
    """

    flag: str
    get: Callable[[Request], int | None]
    put: Callable[[Request, int], Request]
    lowest: int
    highest: int


def _max_length(request: Request) -> int | None:
    if request.rewards:
        return request.rewards[0].max_length
    return None  # a reward model that is there has its own


def _with_max_length(request: Request, value: int) -> Request:
    change = value - (_max_length(request) or value)
    rewards = tuple(replace(stage, max_length=value) for stage in request.rewards)
    longer = replace(request, rewards=rewards)
    return _with_prompts(longer, change)


def _with_prompts(request: Request, change: int) -> Request:
    rloo, judged = request.rloo, request.evaluation
    return replace(
        request,
        rloo=rloo and replace(rloo, prompt=max(1, rloo.prompt + change)),
        evaluation=judged and replace(judged, prompt=max(1, judged.prompt + change)),
    )


def _with_response(request: Request, value: int) -> Request:
    """Prompts stay: their limit is what a longer response leaves of max_length, which is asked for apart."""
    rloo, judged = request.rloo, request.evaluation
    return replace(
        request, rloo=rloo and replace(rloo, response=value), evaluation=judged and replace(judged, response=value)
    )


def _with_k(request: Request, value: int) -> Request:
    rloo = request.rloo
    if rloo is None:
        return request
    completions = max(value, rloo.completions)
    rollouts = max(completions, rloo.rollouts)
    changed = replace(rloo, k=value, group=value, completions=completions, rollouts=rollouts)
    return replace(request, rloo=replace(changed, at_once=max(value, rloo.at_once)))


def _with_packed(stage: str) -> Callable[[Request, int], Request]:
    def put(request: Request, value: int) -> Request:
        if stage == "reward":
            return replace(request, rewards=tuple(replace(one, packed_tokens=value) for one in request.rewards))
        return replace(request, rloo=request.rloo and replace(request.rloo, packed_tokens=value))

    return put


def _with_at_once(request: Request, value: int) -> Request:
    rloo = request.rloo
    return replace(request, rloo=rloo and replace(rloo, at_once=max(value, rloo.k)))


def _with_judged_at_once(request: Request, value: int) -> Request:
    judged = request.evaluation
    return replace(request, evaluation=judged and replace(judged, at_once=value))


def _with_verified_at_once(request: Request, value: int) -> Request:
    return replace(request, rewards=tuple(replace(one, scored_at_once=value) for one in request.rewards))


KNOBS = (
    Knob("max_length", _max_length, _with_max_length, SMALLEST_LENGTH, _HIGHEST_LENGTH),
    Knob(
        "reward.packed_tokens",
        lambda r: r.rewards[0].packed_tokens if r.rewards else None,
        _with_packed("reward"),
        SMALLEST_LENGTH,
        _HIGHEST_LENGTH,
    ),
    Knob(
        "reward.per_device_eval_batch_size",
        lambda r: r.rewards[0].scored_at_once if r.rewards else None,
        _with_verified_at_once,
        1,
        _HIGHEST_ROWS,
    ),
    Knob(
        "rloo.response_length",
        lambda r: r.rloo.response if r.rloo else None,
        _with_response,
        SMALLEST_LENGTH // 2,
        _HIGHEST_LENGTH,
    ),
    Knob("rloo.rloo_k", lambda r: r.rloo.k if r.rloo else None, _with_k, 2, _HIGHEST_K),
    Knob(
        "rloo.packed_tokens",
        lambda r: r.rloo.packed_tokens if r.rloo else None,
        _with_packed("rloo"),
        SMALLEST_LENGTH,
        _HIGHEST_LENGTH,
    ),
    Knob(
        "rloo.local_rollout_forward_batch_size",
        lambda r: r.rloo.at_once if r.rloo else None,
        _with_at_once,
        1,
        _HIGHEST_ROWS,
    ),
    Knob(
        "evaluation_batch_size",
        lambda r: r.evaluation.at_once if r.evaluation else None,
        _with_judged_at_once,
        1,
        _HIGHEST_ROWS,
    ),
)


@dataclass(frozen=True)
class Room:
    """A setting, its value, and the largest one that fits with all others as they are; None if none does."""

    flag: str
    value: int
    largest: int | None
    capped: bool
    """Whether the largest is the end of what was looked at."""


def fits(request: Request, limit: float) -> bool:
    """Whether every stage of a run needs no more than so many bytes."""
    return all(need.worst.total <= limit for need in needs_of(request))


def largest(holds: Callable[[int], bool], lowest: int, highest: int) -> int | None:
    """The largest number for which something holds that holds for all smaller ones; None if it does for none.

    >>> largest(lambda n: n * n <= 50, 1, 100), largest(lambda n: n < 0, 1, 100)
    (7, None)
    """
    if not holds(lowest):
        return None
    while lowest < highest:
        middle = (lowest + highest + 1) // 2
        lowest, highest = (middle, highest) if holds(middle) else (lowest, middle - 1)
    return lowest


def room_of(request: Request, limit: float) -> list[Room]:
    """How far each setting can go alone."""
    present = [(knob, value) for knob in KNOBS if (value := knob.get(request)) is not None]
    found = [(knob, value, _largest_of(knob, request, limit)) for knob, value in present]
    return [Room(knob.flag, value, most, most == knob.highest) for knob, value, most in found]


def _largest_of(knob: Knob, request: Request, limit: float) -> int | None:
    """The largest value that fits, looked for from the present one on if that does."""
    lowest = max(knob.lowest, knob.get(request) or 0) if fits(request, limit) else knob.lowest
    return largest(lambda value: fits(knob.put(request, value), limit), lowest, knob.highest)


@dataclass(frozen=True)
class Remedy:
    """Flags, as pairs of name and value, with which the run fits."""

    flags: tuple[tuple[str, str], ...]
    needs: tuple[Need, ...]


def remedies(request: Request, limit: float, most: int = 4) -> list[Remedy]:
    """Changes with which a run fits, the lightest first; none if it fits, or if nothing that is known helps."""
    if fits(request, limit):
        return []
    found: list[Remedy] = []
    for flags, changed in _changes(request):
        if len(found) == most:
            break
        found += _with_lengths(flags, changed, limit)
    return found


Flags = tuple[tuple[str, str], ...]


def _changes(request: Request) -> Iterator[tuple[Flags, Request]]:
    """The request as it is, with what trades time for memory, with LoRA, and shared out over more GPUs."""
    yield (), request
    light = _for_all(request, _checkpointed)
    if light != request:
        yield (("gradient_checkpointing", "true"),), light
    adapted = _for_all(request, lambda trained: _adapted(trained, cpu=request.rig.cpu))
    if adapted != request:
        yield (("use_peft", "true"),), adapted
        if _for_all(adapted, _checkpointed) != adapted:
            yield (("use_peft", "true"), ("gradient_checkpointing", "true")), _for_all(adapted, _checkpointed)
    if not request.rig.cpu:
        for processes in (2, 4, 8):
            if processes > request.rig.processes or request.rig.sharding == "ddp":
                rig = replace(request.rig, processes=processes, sharding="fsdp")
                yield (("gpus", str(processes)), ("sharding", "fsdp")), replace(light, rig=rig)


def _with_lengths(flags: Flags, request: Request, limit: float) -> list[Remedy]:
    """What a change comes to alone, or with the settings lowered that have to be."""
    if fits(request, limit):
        return [Remedy(flags, tuple(needs_of(request)))] if flags else []
    lowered: list[tuple[str, str]] = []
    for knob in KNOBS:
        value = knob.get(request)
        if value is None or value <= knob.lowest:
            continue
        least = knob.put(request, knob.lowest)
        if fits(least, limit):
            best = _largest_of(knob, request, limit) or knob.lowest
            changed = knob.put(request, best)
            return [Remedy((*flags, *lowered, (knob.flag, str(best))), tuple(needs_of(changed)))]
    return []


def _for_all(request: Request, change: Callable[[Trained], Trained]) -> Request:
    rloo, judged = request.rloo, request.evaluation
    rewards = tuple(replace(stage, trained=change(stage.trained)) for stage in request.rewards)
    changed = replace(
        request,
        rewards=rewards,
        rloo=rloo and replace(rloo, trained=change(rloo.trained)),
        evaluation=judged and replace(judged, policy=change(judged.policy)),
    )
    return _shared(changed) if rewards else changed


def _shared(request: Request) -> Request:
    """Reward models that the run trains itself stand on the policy's base, if both are adapters of one kind."""
    rloo, judged = request.rloo, request.evaluation
    if rloo is None:
        return request
    judges = tuple(
        replace(
            judge,
            weights=stage.trained.weights,
            adapter=stage.trained.adapter,
            shared=bool(
                rloo.trained.adapter
                and stage.trained.adapter
                and (stage.trained.name, stage.trained.weights) == (rloo.trained.name, rloo.trained.weights)
            ),
        )
        for judge, stage in zip(rloo.judges, request.rewards, strict=False)
    )
    alone = tuple(replace(judge, shared=False) for judge in judges)
    return replace(request, rloo=replace(rloo, judges=judges), evaluation=judged and replace(judged, judges=alone))


def _checkpointed(trained: Trained) -> Trained:
    return replace(trained, checkpointing=True)


def _adapted(trained: Trained, *, cpu: bool) -> Trained:
    """With LoRA of the usual rank; a frozen base is held in bfloat16 on a GPU."""
    if trained.adapter is not None:
        return trained
    weights = trained.weights if cpu else min(2, trained.weights)
    compute = min(weights, trained.compute)
    return replace(trained, adapter=Adapter(16), weights=weights, compute=compute, states=8)
