"""A device that is not the CPU, for machines that have no other: its tensors have real values, which the CPU holds.

PyTorch lets a process register one device of its own. This one computes with the CPU's kernels, but refuses operations
on tensors of both devices, as a GPU does, so that a tensor left on the CPU by mistake is found without one. As the
registration cannot be undone, tests run on it in a process of their own, with this module as a plugin that puts every
trainer there:

    python -m pytest -p tests.elsewhere tests/training/test_pairs.py
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "elsewhere"
_aten = torch.ops.aten
_MIXED = (_aten._to_copy.default, _aten.copy_.default, _aten.index.Tensor)
"""Operations that take tensors from one device to the other, and one whose indices may lie on the CPU."""


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
torch.__future__.set_swap_module_params_on_conversion(True)  # modules that move keep the class of their tensors
torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes them on the CPU and moves them
DEVICE = torch.device(NAME, 0)


class Elsewhere(torch.Tensor):
    """A tensor of this device, and the one of the CPU that holds its values."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Elsewhere":
        sizes: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = cls._make_wrapper_subclass(cls, held.size(), dtype=held.dtype, device=DEVICE, **sizes)
        tensor.held = held
        return tensor

    @property
    def data(self) -> torch.Tensor:
        """The same values without a gradient."""
        return self.detach()

    @data.setter
    def data(self, other: "Elsewhere") -> None:
        self.held = other.held

    def tolist(self) -> Any:
        """As any tensor's."""
        return self.held.tolist()

    def untyped_storage(self) -> torch.UntypedStorage:
        """By which tensors that share memory are told."""
        return self.held.untyped_storage()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Files hold the values alone."""
        return self.detach().cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Compute with the CPU's kernels."""
        return _run(func, args, kwargs or {})


class WithElsewhere(TorchDispatchMode):
    """While it is entered, tensors can be made on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        """Compute with the CPU's kernels, if only to make a tensor."""
        return _run(func, args, kwargs or {})


def _run(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operation, on the device that it belongs to.

    Raises:
        RuntimeError: it was given tensors of both devices, other than numbers of the CPU.
    """
    leaves = pytree.tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    asked = [leaf.type for leaf in leaves if isinstance(leaf, torch.device)]
    away = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, Elsewhere)}
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim]
    if away and here and func not in _MIXED:
        raise RuntimeError(f"{func} was given tensors of the CPU and of {DEVICE}.")
    on_cpu = pytree.tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, dict(kwargs)))
    held_args, held_kwargs = pytree.tree_map_only(Elsewhere, lambda tensor: tensor.held, on_cpu)
    result = func(*held_args, **held_kwargs)
    if asked[:1] == ["cpu"] or not (away or asked):
        return result

    def placed(held: torch.Tensor) -> torch.Tensor:
        return away[id(held)] if id(held) in away else Elsewhere(held)  # what is written in place was given

    return pytree.tree_map_only(torch.Tensor, placed, result)


@pytest.fixture(autouse=True, scope="session")
def everything_elsewhere():
    """Trainers put their models on the device."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"
    finish = transformers.TrainingArguments.__post_init__

    def elsewhere(self: Any) -> None:
        self.use_cpu = self.dataloader_pin_memory = False
        finish(self)

    transformers.TrainingArguments.__post_init__ = elsewhere
    with WithElsewhere():
        yield
