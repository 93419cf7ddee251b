"""Which of several processes this is, as the launchers (`accelerate launch`, `torchrun`) tell it; and its memory."""

import os
import re
import resource
import sys
from pathlib import Path


def is_main_process() -> bool:
    """Whether this process writes the files and speaks to the user."""
    return os.environ.get("RANK", "0") == "0"


def process_count() -> int:
    """Processes in the run, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_sharding() -> str:
    """How the launcher was asked to share a model out over processes: ddp (not at all), fsdp, zero2 or zero3.

    Raises:
        ValueError: it was asked for something that is not planned.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        return _zero()
    if not _is_set("ACCELERATE_USE_FSDP"):
        return "ddp"
    if _is_set("FSDP_OFFLOAD_PARAMS"):
        raise ValueError("FSDP with weights in main memory (fsdp_offload_params) is not planned.")
    return "fsdp"


def _zero() -> str:
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none").lower() not in ("", "none"):
        raise ValueError("DeepSpeed by a file of its own (deepspeed_config_file) is not planned.")
    for what in ("OPTIMIZER", "PARAM"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none").lower() != "none":
            raise ValueError(f"DeepSpeed with offload_{what.lower()}_device is not planned.")
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("2", "3"):
        raise ValueError(f"DeepSpeed with zero_stage {stage} is not planned; 2 and 3 are.")
    return f"zero{stage}"


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")


def launched_precision() -> str:
    """The mixed precision that the launcher was asked for; "no" if none, as in this project's configurations."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def peak_memory() -> int:
    """Most bytes held so far: what torch has allocated on this process's GPU, or the resident set if it uses none.

    The latter from /proc where there is one: what `getrusage` tells begins with the size of the parent process.
    """
    torch = sys.modules.get("torch")  # not imported for this
    if torch is not None and torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status")
    text = status.read_text(encoding="ascii", errors="replace") if status.exists() else ""
    if found := re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE):
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
