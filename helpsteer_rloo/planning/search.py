"""The largest settings that fit, one at a time, and what to change where a run does not fit.

Looked at are values that the commands take. Memory grows with every setting but two, so that a bisection finds the
largest value: a longer response leaves less room for prompts, and more completions of a prompt need fewer of them at a
time. For these it finds an end of what fits. What is proposed has been computed to fit, with as much of the limit to
spare as a prediction may be off.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from helpsteer_rloo.planning.margin import may_not_fit, safe
from helpsteer_rloo.planning.needs import Need, needs_of
from helpsteer_rloo.planning.request import Judge, Request, Trained
from helpsteer_rloo.planning.requesting import judge_of, judges_of_evaluation
from helpsteer_rloo.settings.checks import leaves_room

SMALLEST_LENGTH, SMALLEST_RESPONSE = 64, 32
"""Tokens below which no limit is proposed."""
_HIGHEST_LENGTH, _HIGHEST_ROWS = 131_072, 4096
_FEW = 64
"""Values that are tried one by one."""

Values = Sequence[int]


@dataclass(frozen=True)
class Knob:
    """A setting that memory depends on.

    Attributes:
        flag: Its name, in the pipeline with that of the stage in front.
        get: Its value in a request; None where it has no effect, or would change what is finished.
        put: The request with another value.
        values: The values that can be proposed for a request, in ascending order.
    """

    flag: str
    get: Callable[[Request], int | None]
    put: Callable[[Request, int], Request]
    values: Callable[[Request], Values]
    highest: int | None = None
    """Where the looking ends, if the values themselves do not."""


def _max_length(request: Request) -> int | None:
    return request.rewards[0].max_length if request.rewards and not request.settled else None


def _with_max_length(request: Request, value: int) -> Request:
    rewards = tuple(replace(stage, max_length=value) for stage in request.rewards)
    return _with_lengths(replace(request, rewards=rewards), value, request.rloo.response if request.rloo else 0)


def _with_lengths(request: Request, longest: int, response: int) -> Request:
    """With a limit of a prompt and a completion together, and of completions: prompts may fill the rest."""
    rloo, judged = request.rloo, request.evaluation
    lengths = {"prompt": longest - response, "response": response}
    return replace(request, rloo=rloo and replace(rloo, **lengths), evaluation=judged and replace(judged, **lengths))


def _limits(request: Request) -> Values:
    """Values of max_length that leave room for a prompt."""
    possible = range(_from(SMALLEST_LENGTH, _max_length(request)), _HIGHEST_LENGTH + 1)
    response = request.rloo.response if request.rloo else 0
    return possible[bisect_left(possible, 1, key=lambda value: leaves_room(value, response)) :]


def _from(lowest: int, now: int | None) -> int:
    """Where to begin to look: a setting may be below what would be proposed."""
    return min(lowest, now or lowest)


def _with_response(request: Request, value: int) -> Request:
    return request if request.rloo is None else _with_lengths(request, request.rloo.longest, value)


def _responses(request: Request) -> Values:
    """Values of response_length that leave room for a prompt."""
    if request.rloo is None:
        return ()
    longest = request.rloo.longest
    possible = range(_from(SMALLEST_RESPONSE, request.rloo.response), longest + 1)
    return possible[: bisect_left(possible, 1, key=lambda value: not leaves_room(longest, value))]


def _with_k(request: Request, value: int) -> Request:
    rloo = request.rloo
    return replace(request, rloo=rloo and replace(rloo, k=min(value, rloo.completions), group=value))


def _ks(request: Request) -> Values:
    """Completions of a prompt of which whole groups make up a batch of rollouts, and the present number."""
    if request.rloo is None:
        return ()
    rollouts = request.rloo.rollouts
    dividing = (k for k in range(2, min(rollouts, _HIGHEST_ROWS) + 1) if rollouts % k == 0)
    return sorted({*dividing, request.rloo.group})


def _with_packed(stage: str) -> Callable[[Request, int], Request]:
    def put(request: Request, value: int) -> Request:
        if stage == "reward":
            return replace(request, rewards=tuple(replace(one, packed_tokens=value) for one in request.rewards))
        return replace(request, rloo=request.rloo and replace(request.rloo, packed_tokens=value))

    return put


def _with_forward_batch(request: Request, value: int) -> Request:
    rloo = request.rloo
    return replace(request, rloo=rloo and replace(rloo, forward_batch=value))


def _with_judged_at_once(request: Request, value: int) -> Request:
    judged = request.evaluation
    return replace(request, evaluation=judged and replace(judged, at_once=value))


def _with_verified_at_once(request: Request, value: int) -> Request:
    return replace(request, rewards=tuple(replace(one, scored_at_once=value) for one in request.rewards))


def _tokens(now: Callable[[Request], int | None]) -> Callable[[Request], Values]:
    return lambda request: range(_from(SMALLEST_LENGTH, now(request)), _HIGHEST_LENGTH + 1)


def _rows(request: Request) -> Values:
    return range(1, _HIGHEST_ROWS + 1)


def _reward_tokens(request: Request) -> int | None:
    return request.rewards[0].packed_tokens if request.rewards and not request.settled else None


def _rloo_tokens(request: Request) -> int | None:
    return request.rloo.packed_tokens if request.rloo else None


KNOBS = (
    Knob("max_length", _max_length, _with_max_length, _limits, _HIGHEST_LENGTH),
    Knob("reward.packed_tokens", _reward_tokens, _with_packed("reward"), _tokens(_reward_tokens), _HIGHEST_LENGTH),
    Knob(
        "reward.per_device_eval_batch_size",
        lambda r: r.rewards[0].scored_at_once if r.rewards else None,
        _with_verified_at_once,
        _rows,
        _HIGHEST_ROWS,
    ),
    Knob("rloo.response_length", lambda r: r.rloo.response if r.rloo else None, _with_response, _responses),
    Knob("rloo.rloo_k", lambda r: r.rloo.group if r.rloo else None, _with_k, _ks, _HIGHEST_ROWS),
    Knob("rloo.packed_tokens", _rloo_tokens, _with_packed("rloo"), _tokens(_rloo_tokens), _HIGHEST_LENGTH),
    Knob(
        "rloo.local_rollout_forward_batch_size",
        lambda r: r.rloo.forward_batch if r.rloo else None,
        _with_forward_batch,
        _rows,
        _HIGHEST_ROWS,
    ),
    Knob(
        "evaluation_batch_size",
        lambda r: r.evaluation.at_once if r.evaluation else None,
        _with_judged_at_once,
        _rows,
        _HIGHEST_ROWS,
    ),
)
_LOWERED_LAST = ("rloo.response_length", "rloo.rloo_k", "max_length")
"""Settings that change what is learned. The limit of all comes after that of responses, which bounds it."""
LOWERED = sorted(KNOBS, key=lambda knob: _LOWERED_LAST.index(knob.flag) if knob.flag in _LOWERED_LAST else -1)


@dataclass(frozen=True)
class Room:
    """A setting, its value, and the largest that fits, all others as they are, with a margin; None if none does."""

    flag: str
    value: int
    largest: int | None
    capped: bool
    """Whether the largest is the end of what was looked at."""


def fits(request: Request, limit: float) -> bool:
    """Whether every stage of a run fits into so many bytes even if the prediction is as far off as it may be."""
    return not may_not_fit(needs_of(request), limit)


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


def _largest_of(knob: Knob, request: Request, limit: float, most: int | None = None) -> int | None:
    """The largest value that fits, up to `most`; looked for from the present one on if that does, else below it."""
    values = knob.values(request)
    if most is not None:
        values = values[: bisect_right(values, most)]

    def holds(place: int) -> bool:
        return fits(knob.put(request, values[place]), limit)

    place, end = min(bisect_left(values, knob.get(request) or 0), len(values) - 1), len(values) - 1
    if len(values) <= _FEW:
        return next((values[place] for place in range(end, -1, -1) if holds(place)), None)
    while not holds(place):
        if place == 0:
            return None
        place, end = place // 2, place - 1
    found = largest(holds, place, end)
    return None if found is None else values[found]


@dataclass(frozen=True)
class Remedy:
    """Flags, as pairs of name and value, with which the run fits."""

    flags: tuple[tuple[str, str], ...]
    needs: tuple[Need, ...]


def remedies(request: Request, limit: float, most: int = 4) -> list[Remedy]:
    """Changes with which a run fits, the lightest first; none if it does, or if nothing that is known helps."""
    if fits(request, limit):
        return []
    found: list[Remedy] = []
    for flags, changed in _changes(request):
        if len(found) < most and (remedy := _lowered(flags, changed, limit)):
            found.append(remedy)
    return found


Flags = tuple[tuple[str, str], ...]


def _changes(request: Request) -> Iterator[tuple[Flags, Request]]:
    """The request as it is, with what trades time for memory, with LoRA, and shared out over more GPUs."""
    yield (), request
    light, checkpointing = _for_all(request, _checkpointed), _checkpointing_flags(request)
    if checkpointing:
        yield checkpointing, light
    adapted, adapters = _for_all(request, _adapted), _adapter_flags(request)
    if adapters:
        yield adapters, adapted
        if checkpointing:
            yield (*adapters, *checkpointing), _for_all(adapted, _checkpointed)
    if not request.rig.cpu:
        now, sharding = request.rig.processes, request.rig.sharding
        for processes in (2, 4, 8):
            if processes > now or (processes == now and sharding == "ddp"):
                rig = replace(request.rig, processes=processes, sharding="fsdp" if sharding == "ddp" else sharding)
                shared = (("gpus", str(processes)), ("sharding", rig.sharding))
                yield (*shared, *checkpointing), replace(light, rig=rig)


def _lowered(flags: Flags, request: Request, limit: float) -> Remedy | None:
    """What a change comes to alone, or with settings lowered until it fits, and each raised again as far as it goes."""
    changed, lowered = request, dict[str, Knob]()
    for knob in (*LOWERED, *LOWERED):  # twice, since one may make way for another
        excess, values, now = _excess(changed, limit), knob.values(changed), knob.get(changed)
        if excess and now is not None and values and values[0] < now:
            least = knob.put(changed, values[0])
            if _excess(least, limit) <= excess:
                changed, lowered = least, {**lowered, knob.flag: knob}
    if _excess(changed, limit):
        return None
    for knob in reversed(lowered.values()):
        highest = _largest_of(knob, changed, limit, knob.get(request))
        changed = changed if highest is None else knob.put(changed, highest)
    now = {flag: str(knob.get(changed)) for flag, knob in lowered.items() if knob.get(changed) != knob.get(request)}
    return Remedy((*flags, *now.items()), tuple(needs_of(changed))) if flags or now else None


def _excess(request: Request, limit: float) -> float:
    """Bytes that its stages need over what may be planned with."""
    return sum(max(0.0, need.worst.total - safe(limit)) for need in needs_of(request))


# ---- changes of the models -------------------------------------------------------------------------------------------


def _in_training(request: Request) -> dict[str, Trained]:
    """The models that are yet to be trained, by the name in front of the flags of their stage."""
    found = {} if request.settled or not request.rewards else {"reward": request.rewards[0].trained}
    return found if request.rloo is None else {**found, "rloo": request.rloo.trained}


def _checkpointing_flags(request: Request) -> Flags:
    lacking = [stage for stage, trained in _in_training(request).items() if not trained.checkpointing]
    return tuple((f"{stage}.gradient_checkpointing", "true") for stage in lacking)


def _adapter_flags(request: Request) -> Flags:
    lacking = [stage for stage, trained in _in_training(request).items() if trained.adapter is None]
    names = ["use_peft"] if len(lacking) > 1 else [f"{stage}.use_peft" for stage in lacking]
    return tuple((name, "true") for name in names)


def _for_all(request: Request, change: Callable[[Trained], Trained]) -> Request:
    """With another model in every stage that is yet to train one."""
    rloo, judged = request.rloo, request.evaluation
    rewards = request.rewards
    if not request.settled:
        rewards = tuple(replace(stage, trained=change(stage.trained)) for stage in rewards)
    if rloo is None:
        return replace(request, rewards=rewards)
    policy, trained_here = change(rloo.trained), {stage.name: judge_of(stage) for stage in rewards}

    def changed(judge: Judge) -> Judge:
        return replace(trained_here.get(judge.stage or "", judge), name=judge.name).beside(policy)

    guard = None if rloo.guard is None else changed(rloo.guard)
    rloo = replace(rloo, trained=policy, judges=tuple(map(changed, rloo.judges)), guard=guard)
    judged = judged and replace(judged, policy=policy, judges=judges_of_evaluation(rloo))
    return replace(request, rewards=rewards, rloo=rloo, evaluation=judged)


def _checkpointed(trained: Trained) -> Trained:
    return replace(trained, checkpointing=True)


def _adapted(trained: Trained) -> Trained:
    return trained if trained.adapted is None else replace(trained.adapted, checkpointing=trained.checkpointing)
