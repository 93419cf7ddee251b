"""The bytes of a pass: what autograd really keeps, and what follows from the formulas for every setting."""

import weakref

import peft
import pytest
import torch

from benchmarks import models
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.forward import packed_log_probs, packed_scores, prepare_packed, scalar_head
from helpsteer_rloo.packing import PackedRow
from helpsteer_rloo.planning.memory import Adapter, Net, Row, saved_bytes
from helpsteer_rloo.planning.shapes import Shape

SHAPE = Shape(96, 3, 4, 2, 32, 256, 512)
LENGTHS = (96, (80, 64, 80))


def group():
    prompt, continuations = LENGTHS
    return TokenGroup((), tuple(range(2, 2 + prompt)), tuple((3,) * length for length in continuations))


def trained(dtype, lora, checkpointing, labels=None):
    make = models.make_reward_model if labels else models.make_policy
    model = make(SHAPE, dtype, 0)
    if lora:
        model = peft.get_peft_model(model, models.make_lora("SEQ_CLS" if labels else "CAUSAL_LM"))
        model.enable_input_require_grads()
    inner = model.get_base_model() if lora else model
    if checkpointing:
        inner.gradient_checkpointing_enable({"use_reentrant": False})
    assert prepare_packed(model)
    return model.train()


class Kept:
    def __init__(self, tensor):
        self.tensor = tensor


def counted(model, run):
    """Bytes of the storages that autograd holds once a pass is over, weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    alive = weakref.WeakSet()

    def keep(tensor):
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        loss = run()
    assert loss.requires_grad
    storages = {kept.tensor.untyped_storage().data_ptr(): kept.tensor.untyped_storage() for kept in alive}
    return sum(storage.nbytes() for place, storage in storages.items() if place not in weights)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", ["reward", "rloo"])
def test_what_is_kept_for_the_backward_pass_is_what_autograd_keeps(stage, dtype, lora, checkpointing):
    model, row = trained(dtype, lora, checkpointing, labels=stage == "reward"), PackedRow((group(),))
    if stage == "reward":
        head = scalar_head(model)[1]
        found, read, states = counted(model, lambda: packed_scores(model, head, row).sum()), 3, 3
    else:
        found = counted(model, lambda: packed_log_probs(model, row).log_probs.sum())
        read, states = len(set(row.predicting_positions)), len(row.predicted_ids)
    net = Net(SHAPE, dtype.itemsize, dtype.itemsize, Adapter(models.LORA_RANK) if lora else None, cpu=True)
    expected = saved_bytes(net, Row(len(row.input_ids), read), checkpointing=checkpointing)
    expected += states * SHAPE.hidden * dtype.itemsize  # the states that the head was given, or their gradient
    assert found == pytest.approx(expected, rel=0.03)
