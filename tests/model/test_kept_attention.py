"""Checkpointed layers on a CPU: attention is computed once, and gradients are those without checkpointing."""

import gc
import weakref

import pytest
import torch
from torch.utils.checkpoint import noop_context_fn

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model import shared_prefix_cpu
from helpsteer_rloo.model.forward import packed_hidden, prepare_packed
from helpsteer_rloo.model.kept_attention import keep_attention
from helpsteer_rloo.packing import PackedRow
from tests.model.test_attention import model  # noqa: F401 - the fixture

LONG = PackedRow((TokenGroup((), tuple(range(1, 60)) * 3, ((9, 10, 11) * 20, (12,))),))
SHORT = PackedRow((TokenGroup((), (5, 6, 7, 8), ((9, 10, 11), (12,))),))
LAYERS = 2


@pytest.fixture
def calls(monkeypatch):
    """How often attention was computed forward."""
    found = []
    compute = shared_prefix_cpu._forward
    monkeypatch.setattr(shared_prefix_cpu, "_forward", lambda *args: found.append(1) or compute(*args))
    return found


def checkpointed(net, **kwargs):
    assert prepare_packed(net)
    net.train().gradient_checkpointing_enable({"use_reentrant": False, **kwargs})
    assert len(net.model.layers) == LAYERS
    return net


def loss_of(net, row=LONG):
    hidden = packed_hidden(net, row, row.predicting_positions)
    return (hidden * torch.arange(hidden.numel(), dtype=hidden.dtype).view_as(hidden).sin()).sum()


def gradients(net, loss, **kwargs):
    net.zero_grad()
    loss.backward(**kwargs)
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("row", [LONG, SHORT], ids=["long", "short"])
def test_gradients_are_those_without_checkpointing(model, row):  # noqa: F811
    assert prepare_packed(model)
    expected = gradients(model, loss_of(model.train(), row))
    checkpointed(model)
    for _ in range(2):
        assert_equal(gradients(model, loss_of(model, row)), expected)


def test_graphs_side_by_side_have_each_their_own(model):  # noqa: F811
    other = PackedRow((TokenGroup((), tuple(range(1, 50)) * 4, ((2, 3, 4) * 15, (7, 8))),))
    checkpointed(model)
    expected = [gradients(model, loss_of(model, row)) for row in (LONG, other)]
    first, second = loss_of(model, LONG), loss_of(model, other)
    assert_equal(gradients(model, first), expected[0])
    assert_equal(gradients(model, second), expected[1])


def test_it_is_kept_however_checkpointing_is_turned_on_again(model, calls):  # noqa: F811
    checkpointed(model)
    for kwargs in ({}, {"every_n_layers": 2}):
        model.activation_checkpointing_disable()
        model.activation_checkpointing_enable({"use_reentrant": False}, **kwargs)
        gradients(model, loss_of(model))
        assert len(calls) == LAYERS
        calls.clear()


def test_attention_is_computed_once_a_layer(model, calls):  # noqa: F811
    gradients(model, loss_of(checkpointed(model)))
    assert len(calls) == LAYERS


def test_what_is_kept_is_let_go_of(model, monkeypatch):  # noqa: F811
    kept = weakref.WeakSet()
    compute = shared_prefix_cpu._forward

    def watched(*args):
        results = compute(*args)
        kept.add(results[1].untyped_storage())
        return results

    monkeypatch.setattr(shared_prefix_cpu, "_forward", watched)
    checkpointed(model)
    gc.disable()  # so that nothing is left to it
    try:
        loss = loss_of(model)
        assert len(kept) == LAYERS
        loss.backward()
        assert not kept
        loss = loss_of(model)
        del loss  # never sent backward
        assert not kept
    finally:
        gc.enable()


def test_a_graph_that_is_kept_can_be_sent_backward_again(model, calls):  # noqa: F811
    loss = loss_of(checkpointed(model))
    first = gradients(model, loss, retain_graph=True)
    assert_equal(gradients(model, loss), first)
    assert len(calls) == 2 * LAYERS  # the second time it is computed again


def test_reentrant_checkpointing_computes_it_again(model, calls):  # noqa: F811
    net = checkpointed(model, use_reentrant=True)
    gradients(net, loss_of(net))
    assert len(calls) == 2 * LAYERS


@pytest.mark.parametrize("given", [{"debug": True}, {"context_fn": noop_context_fn}], ids=["debug", "context"])
def test_what_a_caller_asks_of_checkpointing_stays(model, given):  # noqa: F811
    net = checkpointed(model, **given)
    before = [layer._gradient_checkpointing_func for layer in net.model.layers]
    keep_attention(net.model.layers)
    assert [layer._gradient_checkpointing_func for layer in net.model.layers] == before


def test_a_layer_that_is_not_checkpointed_keeps_nothing_beside_its_graph(model, calls):  # noqa: F811
    net = checkpointed(model)
    net.gradient_checkpointing_disable()
    gradients(net, loss_of(net))
    with torch.no_grad():
        loss_of(net.eval())
    assert len(calls) == 2 * LAYERS
