"""The machine at hand: how much memory there is for a run, and how fast it computes."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpsteer_rloo.planning.time import Rate

_MEASURED_SIZE, _COPIED_BYTES = 2048, 2**28
_DRIVERS = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
"""Devices of GPUs: of NVIDIA's driver, of Windows' subsystem, of AMD's. Without one, torch is not loaded to ask it."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What a process may take, in bytes, of what, and whether that is the memory of a CPU."""

    bytes: float
    what: str
    cpu: bool


def memory_here(*, use_cpu: bool) -> Memory | None:
    """What is free on this process's GPU, or in main memory if there is none or none is to be used; None if unknown."""
    on_gpu = None if use_cpu or not any(map(os.path.exists, _DRIVERS)) else _memory_of_gpu()
    if on_gpu is not None:
        return on_gpu
    free = available_memory()
    if free is None:
        return None
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    shared = f", shared by {here} processes" if here > 1 else ""
    no_gpu = "" if use_cpu else "; no GPU is seen here"
    return Memory(free / here, f"free main memory{shared}{no_gpu}", cpu=True)


def _memory_of_gpu() -> Memory | None:
    import torch

    if not torch.cuda.is_available():
        return None
    device = int(os.environ.get("LOCAL_RANK", "0"))
    free, whole = torch.cuda.mem_get_info(device)
    used = f" ({whole / 2**30:.1f} GiB in all, the rest is in use)" if free < 0.95 * whole else ""
    return Memory(free, f"{torch.cuda.get_device_name(device)}{used}", cpu=False)


def available_memory(root: Path = Path("/")) -> float | None:
    """Bytes that may still be taken of main memory, by the system and by the control groups of this process.

    Args:
        root: Where `proc` and `sys` are.
    """
    limits = [*_system(root), *_control_groups(root)]
    if limits:
        return min(limits)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return None


def _system(root: Path) -> list[float]:
    found = _numbers(root / "proc/meminfo", ":").get("MemAvailable")
    return [] if found is None else [found * 1024.0]


def _control_groups(root: Path) -> list[float]:
    """What is left of the limit of every control group that the process is in, of version 2 or 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left: list[float] = []
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            left += _left(root / "sys/fs/cgroup", path, ("memory.max", "memory.current", "inactive_file"))
        elif "memory" in kinds.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            left += _left(root / "sys/fs/cgroup/memory", path, names)
    return left


def _left(top: Path, path: str, names: tuple[str, str, str]) -> list[float]:
    """Of a group and of those that it lies in: limit less use, where pages of files that can be dropped are no use."""
    limit_file, use_file, droppable = names
    group, found = top / path.strip("/"), list[float]()
    while True:
        limit, use = _number(group / limit_file), _number(group / use_file)
        if limit is not None and use is not None:
            found.append(limit - max(0, use - _numbers(group / "memory.stat", " ").get(droppable, 0)))
        if group == top or top not in group.parents:
            return found
        group = group.parent


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # "max" is no number, and no limit
        return None


def _numbers(path: Path, separator: str) -> dict[str, int]:
    """The first number of each line of a file, by the name in front of it."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    pairs = (line.partition(separator) for line in lines)
    return {name: int(rest.split()[0]) for name, _, rest in pairs if rest.split() and rest.split()[0].isdigit()}


def measured_rate(*, use_cpu: bool) -> Rate:
    """The rates of a large product in half precision and in float32, and of copying, on this machine."""
    import torch

    device = torch.device("cpu" if use_cpu or not torch.cuda.is_available() else "cuda")

    def product(dtype: torch.dtype) -> float:
        left, right = (torch.randn(_MEASURED_SIZE, _MEASURED_SIZE, device=device).to(dtype) for _ in range(2))
        return 2 * _MEASURED_SIZE**3 / _best(lambda: torch.mm(left, right), device)

    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    reading = 2 * _COPIED_BYTES / _best(lambda: target.copy_(source), device)
    what = f"measured on this {device.type}: products of {_MEASURED_SIZE} x {_MEASURED_SIZE}"
    return Rate(product(torch.bfloat16), product(torch.float32), reading, what)


def _best(work: Callable[[], Any], device: Any) -> float:
    """Seconds of the best of three runs after one to warm up."""
    import torch

    def seconds() -> float:
        begin = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    return min([seconds() for _ in range(4)][1:])
