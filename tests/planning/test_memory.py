"""The bytes of a pass: what autograd really keeps, and what follows from the formulas for every setting."""

import itertools
import weakref
from dataclasses import replace

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import models
from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model import kept_attention, products, shared_prefix_cpu
from helpsteer_rloo.model.forward import packed_log_probs, packed_scores, prepare_packed, scalar_head
from helpsteer_rloo.packing import PackedRow
from helpsteer_rloo.planning.memory import (
    Adapter,
    Net,
    Row,
    holes_of_copies,
    inference_bytes,
    saved_bytes,
    training_bytes,
)
from helpsteer_rloo.planning.needs import SHORT_ROWS
from helpsteer_rloo.planning.shapes import QWEN3, Shape

SHAPE = Shape(96, 3, 4, 2, 32, 256, 512)
LENGTHS = (96, (80, 64, 80))


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    """A processor of another maker than Intel, on which large blocks of attention are products of oneDNN's."""
    monkeypatch.setattr(products, "is_intel", lambda: False)


def group():
    prompt, continuations = LENGTHS
    return TokenGroup((), tuple(range(2, 2 + prompt)), tuple((3,) * length for length in continuations))


def trained(dtype, lora, checkpointing, labels=None, shape=SHAPE):
    make = models.make_reward_model if labels else models.make_policy
    model = make(shape, dtype, 0)
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
def test_what_is_kept_for_the_backward_pass_is_what_autograd_keeps(stage, dtype, lora, checkpointing, monkeypatch):
    beside: list[int] = []

    def kept(compute):
        results = kept_attention.kept(compute)
        beside.extend(result.nbytes for result in results if kept_attention._pass.get() is not None)
        return results

    monkeypatch.setattr(shared_prefix_cpu, "kept", kept)
    model, row = trained(dtype, lora, checkpointing, labels=stage == "reward"), PackedRow((group(),))
    if stage == "reward":
        head = scalar_head(model)[1]
        found, read, states = counted(model, lambda: packed_scores(model, head, row).sum()), 3, 3
    else:
        found = counted(model, lambda: packed_log_probs(model, row).log_probs.sum())
        read, states = len(set(row.predicting_positions)), len(row.predicted_ids)
    net = Net(SHAPE, dtype.itemsize, dtype.itemsize, Adapter(models.LORA_RANK) if lora else None, cpu=True)
    tokens = len(row.input_ids)
    expected = saved_bytes(net, Row(tokens, read), checkpointing=checkpointing)
    expected += states * SHAPE.hidden * dtype.itemsize  # the states that the head was given, or their gradient
    assert found + sum(beside) == pytest.approx(expected, rel=0.03)
    assert bool(beside) == checkpointing


def allocated(run):
    """The most bytes of tensors that exist at one time within a run, beyond those before it."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as found:
        run()
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


LARGER = Shape(192, 3, 6, 2, 32, 512, 4096)


@pytest.mark.parametrize(
    ("stage", "dtype", "lora", "checkpointing"),
    [
        ("reward", torch.float32, True, False),
        ("rloo", torch.float32, True, True),
        ("rloo", torch.float32, False, False),
        ("reward", torch.bfloat16, False, True),
        ("rloo", torch.bfloat16, True, False),
    ],
)
def test_the_most_that_exists_in_a_pass_and_its_backward_is_what_is_predicted(stage, dtype, lora, checkpointing):
    prompt, lengths = (16, (496, 496)) if stage == "reward" else (256, (128, 128, 128, 128))
    row = PackedRow((TokenGroup((), tuple(range(2, 2 + prompt)), tuple((3,) * length for length in lengths)),))
    model = trained(dtype, lora, checkpointing, labels=stage == "reward", shape=LARGER)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    if stage == "reward":
        head = scalar_head(model)[1]
        found, read, predicted = allocated(lambda: packed_scores(model, head, row).sum().backward()), len(lengths), 0
    else:
        found = allocated(lambda: packed_log_probs(model, row).log_probs.sum().backward())
        read = predicted = len(row.predicted_ids)
    net = Net(LARGER, dtype.itemsize, dtype.itemsize, Adapter(models.LORA_RANK) if lora else None, cpu=True)
    expected = training_bytes(net, Row(len(row.input_ids), read, predicted), checkpointing=checkpointing)
    assert expected.activations + expected.head == pytest.approx(found, rel=0.12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", ["reward", "rloo"])
def test_the_most_that_exists_in_a_pass_without_gradient_is_what_is_predicted(stage, dtype):
    row = PackedRow((TokenGroup((), tuple(range(2, 258)), ((3,) * 128,) * 4),))
    model = trained(dtype, True, False, labels=stage == "reward", shape=LARGER)
    with torch.no_grad():
        if stage == "reward":
            head = scalar_head(model)[1]
            found, predicted = allocated(lambda: packed_scores(model, head, row)), 0
        else:
            found, predicted = allocated(lambda: packed_log_probs(model, row)), 512
    net = Net(LARGER, dtype.itemsize, dtype.itemsize, Adapter(models.LORA_RANK), cpu=True)
    expected = inference_bytes(net, Row(len(row.input_ids), predicted or 4, predicted))
    assert expected.activations + expected.head == pytest.approx(found, rel=0.15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [(16, (112, 112)), (112, (16,) * 4), (64, (64,) * 8)], ids=str)
def test_short_rows_keep_more_than_is_counted_and_no_more_than_is_said(dtype, lengths):
    prompt, continuations = lengths
    groups = (TokenGroup((), tuple(range(2, 2 + prompt)), tuple((3,) * length for length in continuations)),) * 2
    row, model = PackedRow(groups), trained(dtype, True, False)
    found = counted(model, lambda: packed_log_probs(model, row).log_probs.sum())
    net = Net(SHAPE, dtype.itemsize, dtype.itemsize, Adapter(models.LORA_RANK), cpu=True)
    read = len(set(row.predicting_positions))
    expected = saved_bytes(net, Row(len(row.input_ids), read), checkpointing=False)
    assert 1.2 < found / expected < SHORT_ROWS


# ---- what follows for every setting ----------------------------------------------------------------------------------

sizes = st.integers(1, 6000)
nets = st.builds(
    Net,
    st.sampled_from([SHAPE, LARGER, *QWEN3.values()]),
    st.just(4),
    st.sampled_from([2, 4]),
    st.sampled_from([None, Adapter(16), Adapter(64, ("q_proj",))]),
    st.booleans(),
)


@given(nets, sizes, sizes, sizes, st.integers(0, 500), st.booleans())
def test_more_tokens_never_need_less(net, tokens, read, predicted, more, checkpointing):
    small = Row(tokens, min(read, tokens), min(predicted, tokens))
    large = Row(tokens + more, min(read, tokens) + more // 2, min(predicted, tokens) + more)
    for bytes_of in (
        lambda row: training_bytes(net, row, checkpointing=checkpointing),
        lambda r: inference_bytes(net, r),
    ):
        assert 0 < bytes_of(small).total <= bytes_of(large).total


@given(nets, sizes)
def test_checkpointing_never_keeps_more(net, tokens):
    row = Row(tokens, tokens, tokens)
    assert saved_bytes(net, row, checkpointing=True) < saved_bytes(net, row, checkpointing=False)


# ---- what sampling leaves in the heap --------------------------------------------------------------------------------


WIDE = Shape(768, 12, 12, 4, 64, 2048, 16_384, tied=True)
TOGETHER, OUTPUT, GATES, DOWN = 768 * 1280, 768 * 768, 768 * 4096, 2048 * 768


@pytest.mark.parametrize(
    ("width", "tokens", "layer"),
    [
        (4, 256, OUTPUT),  # 0.8 MiB of hidden states, and 2 MiB of alignment
        (4, 1024, TOGETHER + OUTPUT),
        (4, 2048, TOGETHER + OUTPUT + DOWN),
        (4, 20_000, TOGETHER + OUTPUT + DOWN + GATES),
        (2, 1024, TOGETHER + OUTPUT + DOWN),
    ],
)
def test_copies_leave_holes_where_hidden_states_do_not_fit_into_their_room(width, tokens, layer):
    net = Net(WIDE, width, width, Adapter(16), cpu=True)
    assert holes_of_copies(net, tokens) == 12 * layer * width
    assert holes_of_copies(replace(net, cpu=False), tokens) == 0


def test_what_the_system_takes_back_leaves_no_holes():
    """Every copy of a layer of the 8B model has 32 MiB or more, which glibc never has in its heap."""
    assert holes_of_copies(Net(QWEN3["Qwen/Qwen3-8B"], 2, 2, Adapter(16), cpu=True), 100_000) == 0
