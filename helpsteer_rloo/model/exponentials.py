"""Exponentials, on CPUs as powers of two: those of e are MKL's, which take four times as long on an AMD EPYC.

The exponent is rounded once more, so that a result may be off by its size times half the last place: 1e-6 of itself
where it is e^-16 in float32.
"""

import math

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)


def exp(x: Tensor, out: Tensor) -> Tensor:
    """The exponential of x, written to `out`, which may be x itself; nothing here is differentiable."""
    if x.device.type != "cpu":
        return torch.exp(x, out=out)
    return torch.mul(x, LOG2_E, out=out).exp2_()
