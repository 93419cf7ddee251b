"""Matrix products on CPUs by oneDNN, where PyTorch would call something slower.

PyTorch leaves float32 products to MKL, which uses half of the vector width of processors that are not Intel's: 238
against 555 GFLOP/s on an AMD EPYC with AVX-512. On Intel's own, oneDNN is the slower one, by a twentieth to a half. Who
is asked depends on the maker alone, since the two round differently and a measurement would choose now one, now the
other. Half precision goes through oneDNN in any case, but its weights are laid out anew for every product unless that
is done ahead. The operators are PyTorch's own and not promised: they are probed before they are used, and without them
everything is `torch.nn.functional.linear`.

Nothing here is differentiable.
"""

import platform
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import linear

LEAST_MULTIPLICATIONS = 2**22
"""Smaller float32 products are left to PyTorch: oneDNN makes a program for every new shape, in about 0.4 ms."""


def product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The product x Wᵀ + b, `[…, I]` to `[…, O]`, of tensors in one dtype, as they are or as transposed views."""
    return (onednn_product if _is_faster(x, weight_OI) else linear)(x, weight_OI, bias_O)


def _is_faster(x: Tensor, weight_OI: Tensor) -> bool:
    return (
        x.numel() * weight_OI.shape[0] >= LEAST_MULTIPLICATIONS
        and x.dtype == weight_OI.dtype
        and _is_dense(x)
        and _is_dense(weight_OI)
        and onednn_leads(x)
    )


def onednn_leads(x: Tensor) -> bool:
    """Whether large products with a tensor of this device and dtype are faster by oneDNN than as PyTorch computes them.

    Elsewhere than on x86 it has no float32 products of its own for weights that are not laid out.
    """
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and platform.machine().lower() in ("x86_64", "amd64")
        and not is_intel()
        and has_onednn(torch.float32)
    )


def _is_dense(tensor: Tensor) -> bool:
    """Whether nothing lies between the elements: for others, such as slices, oneDNN can be a thousand times slower."""
    return tensor.is_contiguous() or (tensor.ndim == 2 and tensor.T.is_contiguous())


def laid_out(weight_OI: Tensor, rows: int) -> Tensor:
    """A copy of a weight in the layout of oneDNN's products with so many rows, for the functions below alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows)


def onednn_product(x: Tensor, weight: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The product x Wᵀ + b, `[…, I]` to `[…, O]`, with a weight as it is or `laid_out`."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias_O, "none", [], "")


@cache
def is_intel() -> bool:
    """Whether the processor is Intel's, as far as PyTorch tells."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "intel" in str(capabilities.get("cpu_name", "")).lower()


def gains_by_layout(weight_OI: Tensor, rows: int) -> bool:
    """Whether a product with so many rows is faster if the weight is laid out for oneDNN ahead."""
    large = weight_OI.dtype != torch.float32 or rows * weight_OI.numel() >= LEAST_MULTIPLICATIONS
    return weight_OI.device.type == "cpu" and large and has_onednn(weight_OI.dtype)


@cache
def has_onednn(dtype: torch.dtype) -> bool:
    """Whether this build and processor have oneDNN's products for a dtype, and they are right."""
    if dtype not in (torch.float32, torch.bfloat16) or not torch.backends.mkldnn.is_available():
        return False
    with torch.device("cpu"):
        shift, x = torch.eye(16, dtype=dtype).roll(1, 0), torch.arange(32, dtype=dtype).view(2, 16)
    try:
        ahead = onednn_product(x, laid_out(shift, 2))
        back = onednn_product(x, shift.T)
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return torch.equal(ahead, x.roll(1, 1)) and torch.equal(back, x.roll(-1, 1))
