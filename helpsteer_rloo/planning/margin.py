"""How far a prediction may be off, and what a plan may say of a limit by that."""

from collections.abc import Sequence

from helpsteer_rloo.planning.needs import Need

TOLERANCE = 0.15
"""How far a prediction may be off: what is over a limit by more is refused, and what fits has so much to spare."""
SAID = f"{100 * TOLERANCE:.0f} %"
"""The same in words."""


def worst_of(needs: Sequence[Need]) -> Need:
    """The stage that needs most."""
    return max(needs, key=lambda need: need.worst.total)


def cannot_fit(needs: Sequence[Need], limit: float) -> bool:
    """Whether a stage is over a limit by more than a prediction may be off."""
    return worst_of(needs).worst.total > (1 + TOLERANCE) * limit


def may_not_fit(needs: Sequence[Need], limit: float) -> bool:
    """Whether a stage is about at a limit, or over it."""
    return worst_of(needs).worst.total > safe(limit)


def safe(limit: float) -> float:
    """What may be planned with: what is left of a limit if a prediction is as far off as it may be."""
    return (1 - TOLERANCE) * limit
