import copy

import pytest
import torch

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model.attention import use_shared_prefix
from helpsteer_rloo.model.forward import packed_hidden, prepare_packed
from helpsteer_rloo.model.last_layer import narrow_last_layer
from helpsteer_rloo.packing import PackedRow
from tests.model.test_attention import model  # noqa: F401 - the fixture

ROW = PackedRow((TokenGroup((), (5, 6, 7, 8), ((9, 10, 11), (12,))), TokenGroup((), (3,), ((4, 4), (2, 2, 2)))))


def hidden_and_gradients(net, positions):
    net.zero_grad()
    hidden = packed_hidden(net, ROW, positions)
    weights = torch.arange(hidden.numel(), dtype=hidden.dtype).view_as(hidden).sin()
    (hidden * weights).sum().backward()
    return hidden.detach(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("positions", [ROW.last_positions, ROW.predicting_positions])
def test_what_is_read_and_its_gradients_are_the_whole_layers(model, positions, checkpointing):  # noqa: F811
    whole = copy.deepcopy(model)
    use_shared_prefix(whole)  # and takes `read` for one more keyword that nobody knows
    assert prepare_packed(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    (ours, our_gradients), (theirs, their_gradients) = (hidden_and_gradients(m, positions) for m in (model, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-10, atol=1e-10, msg=name)


def test_only_what_is_read_is_computed(model):  # noqa: F811
    prepare_packed(model)
    rows = []
    model.model.layers[-1].mlp.down_proj.register_forward_hook(lambda _m, inputs, _o: rows.append(inputs[0].shape[1]))
    packed_hidden(model, ROW, ROW.predicting_positions)
    packed_hidden(model, ROW, ROW.last_positions)
    assert rows == [len(set(ROW.predicting_positions)), len(ROW.last_positions)]
    assert len(set(ROW.predicting_positions)) < len(ROW.predicting_positions)


def test_other_calls_are_as_before(model):  # noqa: F811
    ids = torch.tensor([[3, 4, 5]])
    before = model(input_ids=ids).logits
    narrow_last_layer(model.model)
    narrow_last_layer(model.model)
    assert torch.equal(model(input_ids=ids).logits, before)
    with pytest.raises((IndexError, RuntimeError)):
        model.model(input_ids=ids, read=torch.tensor([7]))
    assert torch.equal(model(input_ids=ids).logits, before)
