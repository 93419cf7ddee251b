"""Before a run starts: whether it fits into the memory that is there."""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from helpsteer_rloo.display.console import say, warn
from helpsteer_rloo.processes import is_main_process, launched_sharding, process_count
from helpsteer_rloo.settings.config import PipelineSettings, Settings

if TYPE_CHECKING:
    from helpsteer_rloo.planning.request import Request, Rig


def check_fit(settings: Settings[Any], stage: str, finished: Collection[str]) -> None:
    """Refuse a training of one stage that cannot fit into memory.

    Raises:
        ValueError: it cannot.
    """
    from helpsteer_rloo.planning.requesting import request_of_reward, request_of_rloo

    request_of = request_of_reward if stage == "reward" else request_of_rloo
    refuse_what_cannot_fit(
        lambda rig: request_of(settings, rig),
        use_cpu=bool(settings.trl.get("use_cpu")),
        force=settings.own.force,
        prefix=stage,
        finished=finished,
    )


def check_fit_of_all(settings: PipelineSettings, finished: Collection[str]) -> None:
    """Refuse a run of which a stage cannot fit into memory.

    Raises:
        ValueError: it cannot.
    """
    from helpsteer_rloo.planning.requesting import request_of_pipeline

    refuse_what_cannot_fit(
        lambda rig: request_of_pipeline(settings, rig),
        use_cpu=bool(settings.reward.trl.get("use_cpu") or settings.rloo.trl.get("use_cpu")),
        force=settings.own.force,
        finished=finished,
    )


def refuse_what_cannot_fit(
    request_of: "Callable[[Rig], Request]",
    *,
    use_cpu: bool,
    force: bool,
    prefix: str | None = None,
    finished: Collection[str] = (),
) -> None:
    """Compare what a run needs with the memory of the main process's device.

    What is not known is said, and the run goes on. The main process decides for all: others, which wait for it, notice
    when it has ended.

    Args:
        request_of: What is to be run on a machine.
        use_cpu: Whether the run is told to leave GPUs alone.
        force: Whether to go on in any case.
        prefix: The stage of a script that takes the flags of one, whose names stand alone.
        finished: Stages that will not run again.

    Raises:
        ValueError: it cannot fit, by more than a prediction may be off, with what needs most and what would fit.
    """
    if not is_main_process():
        return
    from helpsteer_rloo.planning.machine import memory_here
    from helpsteer_rloo.planning.margin import cannot_fit, may_not_fit, worst_of
    from helpsteer_rloo.planning.needs import needs_of
    from helpsteer_rloo.planning.request import Rig, unfinished
    from helpsteer_rloo.planning.search import remedies
    from helpsteer_rloo.planning.verdict import advice, described, gib

    memory = memory_here(use_cpu=use_cpu)
    if memory is None:
        say("How much memory there is cannot be told; whether the run fits is not checked.")
        return
    try:
        request = unfinished(request_of(Rig(memory.cpu, process_count(), launched_sharding())), finished)
    except ValueError as error:
        say(f"Whether the run fits into memory is not checked: {error}")
        return
    needs = needs_of(request)
    if not needs or not may_not_fit(needs, memory.bytes):
        return
    said = f"{described(worst_of(needs))}, and there are {gib(memory.bytes)} GiB: {memory.what}."
    if not cannot_fit(needs, memory.bytes):
        warn(f"memory may run out. {said} helpsteer-rloo plan shows what takes it.")
    elif force:
        warn(f"the run cannot fit into memory, and goes on as --force says. {said}")
    else:
        fitting = advice(remedies(request, memory.bytes), prefix)
        raise ValueError(f"The run cannot fit into memory: {said}\n{fitting}\n--force starts it all the same.")
