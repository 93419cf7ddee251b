"""Where a device runs out of memory: telling, giving back what is not needed, and trying again with less at once."""

import gc
import sys
import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def release() -> None:
    """Give memory of deleted models and failed passes back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that a device has no memory left; on a CPU torch has no class of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


class AtOnce:
    """How much of something a device has memory for at once, learned where it runs out."""

    def __init__(self) -> None:
        self.most = sys.maxsize

    def run(self, run: Callable[[int], Result], size: int, least: int) -> Result:
        """Run something in parts of a size, and again in parts of half that size as often as memory runs out.

        Args:
            run: Of a size; to be of no effect if it fails.
            size: To begin with, if there was memory for so much before.
            least: Smaller ones make no difference.

        Raises:
            RuntimeError: there is not even memory for parts of the least size.
        """
        size = max(least, min(size, self.most))
        while True:
            try:
                return run(size)
            except RuntimeError as error:
                if size <= least or not is_out_of_memory(error):
                    raise
            size = self.most = max(least, size // 2)
            release()
            warnings.warn(f"The device ran out of memory: going on with {size} at once.", stacklevel=3)
