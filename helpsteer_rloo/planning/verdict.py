"""Whether a run fits, said in words: what needs most, of what that is made, and what fits instead."""

from collections.abc import Sequence

from helpsteer_rloo.planning.margin import SAID, worst_of
from helpsteer_rloo.planning.needs import Need
from helpsteer_rloo.planning.search import Remedy

GIB = 2**30
_SHOWN = 0.005
"""GiB from which two digits behind the point show something."""
_NAMED_ITEMS = 4


def described(need: Need) -> str:
    """The worst moment of a stage, and the largest things in it."""
    phase = need.worst
    largest = sorted(phase.items.items(), key=lambda item: -item[1])[:_NAMED_ITEMS]
    items = ", ".join(f"{name} {gib(size)}" for name, size in largest)
    return f"{need.stage} needs {gib(phase.total)} GiB ({phase.name}: {items})"


def gib(size: float) -> str:
    """Bytes as GiB, in few digits.

    >>> gib(25 * 2**30), gib(3 * 2**28), gib(2**20), gib(0)
    ('25.0', '0.75', '< 0.01', '0')
    """
    value = size / GIB
    if 0 < value < _SHOWN:
        return "< 0.01"
    return f"{value:,.{0 if value == 0 else 1 if value >= 9.995 else 2}f}"


def flags_of(remedy: Remedy, prefix: str | None) -> str:
    """The flags of a remedy as a command takes them.

    Args:
        remedy: What fits.
        prefix: None in the pipeline; in a script of one stage the name of that stage, whose flags stand alone.
    """
    before = "" if prefix is None else f"{prefix}."
    return " ".join(f"--{name.removeprefix(before)} {value}" for name, value in remedy.flags)


_TO_SPARE = f" with the {SAID} to spare that a prediction may be off"
_OF_THE_LAUNCHER = ("gpus", "sharding")
_LAUNCHED = {
    "fsdp": "FSDP2 (configs/accelerate/fsdp2.yaml)",
    "zero2": "DeepSpeed (configs/accelerate/deepspeed_zero2.yaml)",
    "zero3": "DeepSpeed (configs/accelerate/deepspeed_zero3.yaml)",
}


def advice(found: Sequence[Remedy], prefix: str | None) -> str:
    """What fits instead, in one sentence each; what more GPUs would do is asked of the launcher."""
    if not found:
        return f"No smaller setting that is known here fits{_TO_SPARE}: take a smaller model, or more memory."
    lines = []
    for remedy in found:
        own = Remedy(tuple(flag for flag in remedy.flags if flag[0] not in _OF_THE_LAUNCHER), remedy.needs)
        launcher = dict(remedy.flags)
        parts = [flags_of(own, prefix)] if own.flags else []
        parts += [f"{launcher['gpus']} GPUs with {_LAUNCHED[launcher['sharding']]}"] if "gpus" in launcher else []
        lines.append(f"  {' and '.join(parts)}: {gib(worst_of(remedy.needs).worst.total)} GiB")
    return "\n".join([f"This fits{_TO_SPARE}:", *lines])
