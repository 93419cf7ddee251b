"""GPUs as their makers describe them, and the names that they go by."""

import re
from dataclasses import dataclass

from helpsteer_rloo.planning.time import GIGA, TERA, Rate
from helpsteer_rloo.settings.flags import unknown_name


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU: dense bf16 and float32 in TFLOP/s and GB/s of memory by its maker, and its memory.

    `size` is the memory in the maker's GB, `memory` what a program is told of it in GiB: less, since the driver takes
    its part, and on an L4 or L40S a sixteenth goes into error correction.
    """

    half: float
    single: float
    size: int
    memory: float
    bandwidth: float


GPUS = {
    "a100": Gpu(312, 19.5, 80, 79.1, 2039),
    "a100-40gb": Gpu(312, 19.5, 40, 39.3, 1555),
    "a100-pcie": Gpu(312, 19.5, 80, 79.1, 1935),
    "a100-40gb-pcie": Gpu(312, 19.5, 40, 39.3, 1555),
    "h100": Gpu(989, 67, 80, 79.1, 3350),
    "h100-pcie": Gpu(756, 51, 80, 79.1, 2000),
    "h200": Gpu(989, 67, 141, 139.7, 4800),
    "l4": Gpu(121, 30.3, 24, 22.0, 300),
    "l40s": Gpu(362, 91.6, 48, 44.3, 864),
    "rtx3090": Gpu(71, 35.6, 24, 23.5, 936),
    "rtx4090": Gpu(165, 82.6, 24, 23.5, 1008),
}
"""SXM versions where nothing else is said. Memory is what PyTorch's messages on such cards give as all of it, the least
that was seen, rounded down; none of them was at hand."""
UTILISATION, READING = 0.4, 0.6
"""Shares of the makers' figures that are assumed to be reached, of products and of memory."""


def rate_of(name: str) -> Rate:
    """What a GPU of the table is assumed to reach."""
    gpu = GPUS[name]
    shares = (f"{100 * share:.0f} % of" for share in (UTILISATION, READING))
    source = f"{name}: {next(shares)} {gpu.half:g} TFLOP/s, {next(shares)} {gpu.bandwidth:g} GB/s, assumed"
    half, single = UTILISATION * gpu.half * TERA, UTILISATION * gpu.single * TERA
    return Rate(half, single, READING * gpu.bandwidth * GIGA, source)


_SAID_BESIDE = re.compile(r"nvidia|geforce|tesla|gpu|sxm\d?|hbm\d?e?|gddr\dx?")
"""Words of a full name that tell no two of the table apart."""
_SIZE = re.compile(r"(\d+)g(?:i?b)?")


def known_gpu(name: str) -> str:
    """The name in the table of a GPU as people and drivers spell it.

    >>> known_gpu("RTX 4090"), known_gpu("NVIDIA H100 80GB HBM3"), known_gpu("NVIDIA A100-SXM4-40GB")
    ('rtx4090', 'h100', 'a100-40gb')

    Raises:
        ValueError: it is not in the table, with the nearest that is.
    """
    asked, size = _model_and_size(name)
    for known, gpu in GPUS.items():
        model, own_size = _model_and_size(known)
        if model == asked and size in (own_size, gpu.size):
            return known
    spelled = asked if size is None else f"{asked}-{size}gb"
    unknown = unknown_name(spelled, GPUS, "GPU")
    raise ValueError(
        f"--gpu_name: {unknown}{'' if unknown.endswith('?') else '.'} Known are {', '.join(GPUS)}. Of another one give "
        "--gpu_memory_gb, and to be told times --tflops and --bandwidth_gbs."
    )


def _model_and_size(name: str) -> tuple[str, int | None]:
    """What is left of a name without what all makers' names have, as one word, and the GB that it says."""
    joined = re.sub(r"(\d)\s+(?=gi?b\b)", r"\1", name.lower())
    words = [word for word in re.split(r"[^a-z0-9]+", joined) if word and not _SAID_BESIDE.fullmatch(word)]
    sizes = [int(found[1]) for word in words if (found := _SIZE.fullmatch(word))]
    return "".join(word for word in words if not _SIZE.fullmatch(word)), sizes[0] if sizes else None
