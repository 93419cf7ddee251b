"""Exponentials, on CPUs as powers of two: those of e are MKL's, which take four times as long on an AMD EPYC.

x log2(e) is rounded before 2 is raised to it, so that e^x may be off by |x| 2^-24 of itself in float32, by |x| 2^-53 in
float64.
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
