"""Matrix products on CPUs by oneDNN, where PyTorch would call something slower.

PyTorch leaves float32 products to MKL, which uses half of the vector width of processors that are not Intel's: 238
against 555 GFLOP/s on an AMD EPYC with AVX-512. Half precision goes through oneDNN in any case, but its weights are
laid out anew for every product unless that is done ahead. The operators are PyTorch's own and not promised: they are
probed before they are used, and without them everything is `torch.nn.functional.linear`.

Nothing here is differentiable.
"""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

LEAST_MULTIPLICATIONS = 2**22
"""Smaller products are left to PyTorch: oneDNN makes a program for every new shape, in about 0.4 ms."""


def product(x_RI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The product x Wᵀ + b, `[R, O]`, of matrices in one dtype; W in any layout, such as a transposed view."""
    return (_onednn if _is_faster(x_RI, weight_OI) else linear)(x_RI, weight_OI, bias_O)


def _is_faster(x_RI: Tensor, weight_OI: Tensor) -> bool:
    return (
        x_RI.device.type == "cpu"
        and x_RI.dtype == torch.float32
        and x_RI.shape[0] * weight_OI.numel() >= LEAST_MULTIPLICATIONS
        and lays_out(torch.float32)
    )


def _onednn(x: Tensor, weight: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias_O, "none", [], "")


def laid_out(weight_OI: Tensor, rows: int) -> Tensor:
    """A copy of a weight in the layout of oneDNN's products with so many rows; for `product_of_laid_out` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows)


def product_of_laid_out(x: Tensor, weight: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The product x Wᵀ + b, `[…, I]` to `[…, O]`, with a weight that is `laid_out`."""
    return _onednn(x, weight, bias_O)


def add_product_of_laid_out(result: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """A result plus x Wᵀ in one pass, with a weight that is `laid_out`."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, result, weight, None, "add")


@cache
def lays_out(dtype: torch.dtype) -> bool:
    """Whether this build and processor have oneDNN's products for a dtype."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    weight, x = torch.eye(16, dtype=dtype), torch.arange(32, dtype=dtype).view(2, 16)
    try:
        packed = laid_out(weight, 2)
        doubled = add_product_of_laid_out(product_of_laid_out(x, packed), x, packed)
        return torch.equal(doubled, x + x) and torch.equal(_onednn(x, weight.T), x)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
