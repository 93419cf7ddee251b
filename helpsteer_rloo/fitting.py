"""Before a run starts: whether it fits into the memory that is there."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from helpsteer_rloo.console import say
from helpsteer_rloo.processes import launched_sharding, process_count

if TYPE_CHECKING:
    from helpsteer_rloo.planning.request import Request, Rig


def refuse_what_cannot_fit(
    request_of: "Callable[[Rig], Request]", *, use_cpu: bool, force: bool, prefix: str | None = None
) -> None:
    """Compare what a run needs with the memory of this process's device, before anything is downloaded.

    What is not known is said, and the run goes on.

    Args:
        request_of: What is to be run on a machine.
        use_cpu: Whether the run is told to leave GPUs alone.
        force: Whether to go on in any case.
        prefix: The stage of a script that takes the flags of one, whose names stand alone.

    Raises:
        ValueError: it cannot fit, by more than a prediction may be off, with what needs most and what would fit.
    """
    from helpsteer_rloo.planning.machine import memory_here
    from helpsteer_rloo.planning.needs import needs_of
    from helpsteer_rloo.planning.request import Rig
    from helpsteer_rloo.planning.search import remedies
    from helpsteer_rloo.planning.verdict import advice, cannot_fit, described, gib, may_not_fit, worst_of

    memory = memory_here(use_cpu=use_cpu)
    if memory is None:
        say("How much memory there is cannot be told; whether the run fits is not checked.")
        return
    try:
        request = request_of(Rig(memory.cpu, process_count(), launched_sharding()))
    except ValueError as error:
        say(f"Whether the run fits into memory is not checked: {error}")
        return
    needs = needs_of(request)
    if not may_not_fit(needs, memory.bytes):
        return
    said = f"{described(worst_of(needs))}, and there are {gib(memory.bytes)} GiB: {memory.what}."
    if not cannot_fit(needs, memory.bytes):
        say(f"WARNING: memory may run out. {said} helpsteer-rloo plan shows what takes it.")
    elif force:
        say(f"WARNING: the run cannot fit into memory, and goes on as --force says. {said}")
    else:
        fitting = advice(remedies(request, memory.bytes), prefix)
        raise ValueError(f"The run cannot fit into memory: {said}\n{fitting}\n--force starts it all the same.")
