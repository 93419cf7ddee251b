"""Processes of a run that lose another one: they stop, and say so."""

from collections.abc import Generator
from contextlib import contextmanager

import torch.distributed as dist

from helpsteer_rloo.processes import process_count

_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "Timed out waiting",
    "remote process exited",
)
"""What gloo and NCCL say where the other end of a connection is gone; they raise plain `RuntimeError`s as well."""


@contextmanager
def lost_processes_explained(directory: str) -> Generator[None]:
    """Within, processes work together; where one of them is gone, the others say so instead of gloo or NCCL.

    Args:
        directory: Of the checkpoints to go on from.

    Raises:
        ValueError: one is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if process_count() == 1 or not (isinstance(error, dist.DistError) or _tells_of_a_lost_process(error)):
            raise
        raise ValueError(
            f"Another of the {process_count()} processes has ended or cannot be reached, so this one stops too "
            f"({str(error).strip().splitlines()[-1]}). The other's output has the reason. The same command goes on "
            f"from the last checkpoint in {directory}, if there is one."
        ) from error


def _tells_of_a_lost_process(error: RuntimeError) -> bool:
    return any(sign in str(error) for sign in _SIGNS)
