import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from helpsteer_rloo.groups import TokenGroup
from helpsteer_rloo.model import forward
from helpsteer_rloo.model.forward import group_log_probs, score_groups, score_sequences
from helpsteer_rloo.model.heads import token_log_probs
from helpsteer_rloo.packing import PackedRow

SEQUENCES = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14], [15, 16, 17, 18]]


@pytest.fixture(scope="module")
def reward_model(tiny_base):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, dtype=torch.float64)
    return model.eval()


def plain_score(model, ids):
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return model.score(hidden[0, -1]).item()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_scores_equal_an_unpadded_forward_whatever_the_batch(reward_model, batch_size):
    expected = [plain_score(reward_model, ids) for ids in SEQUENCES]
    assert score_sequences(reward_model, SEQUENCES, batch_size) == pytest.approx(expected, rel=1e-6)


def test_a_sequence_that_ends_in_the_padding_id_is_scored_at_its_end(reward_model):
    pad = reward_model.config.pad_token_id
    ids = [5, 6, 7, pad]
    assert score_sequences(reward_model, [ids, [5] * 9], 2)[0] == pytest.approx(
        plain_score(reward_model, ids), rel=1e-6
    )


def test_scores_go_through_an_adapter_and_its_head(tiny_base):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1)
        expected = [model(input_ids=torch.tensor([ids])).logits.item() for ids in SEQUENCES]
    assert score_sequences(model, SEQUENCES, 3) == pytest.approx(expected, abs=1e-5)


def test_a_model_without_a_scalar_head_is_refused(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base)
    with pytest.raises(ValueError, match="no scalar head named 'score'"):
        score_sequences(model, SEQUENCES, 2)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_equal_a_plain_forward_in_float64(tiny_base, temperature):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64).eval()
    prompts, completions = [[5, 6, 7], [8], [9, 10, 11, 12]], [[20, 21], [22, 23, 24, 25], [26]]
    expected = []
    for prompt, completion in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + completion])).logits[0] / temperature
        log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        expected.append(log_probs[torch.arange(len(completion)), torch.tensor(completion)].sum().item())
    groups = [TokenGroup((), tuple(p), (tuple(c),)) for p, c in zip(prompts, completions, strict=True)]
    got = [own.sum().item() for (own,) in group_log_probs(model, groups, 8, temperature)]
    assert got == pytest.approx(expected, rel=1e-5)


def test_autocast_does_not_round_a_frozen_head():
    torch.manual_seed(0)
    hidden_CD, targets_C = torch.randn(9, 16, requires_grad=True), torch.arange(9)
    head = nn.Linear(16, 40, bias=False).requires_grad_(False)
    plain = token_log_probs(hidden_CD, head, targets_C).log_probs
    with torch.autocast("cpu", torch.bfloat16):
        rounded = token_log_probs(hidden_CD, head, targets_C).log_probs
    assert torch.equal(plain, rounded)
    gradients = [torch.autograd.grad(values.sum(), hidden_CD)[0] for values in (plain, rounded)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("bias", [False, True])
def test_scores_of_a_head_in_half_precision_are_not_rounded_to_it(bias):
    torch.manual_seed(0)
    hidden_BD, head = 10 * torch.randn(9, 16).bfloat16(), nn.Linear(16, 1, bias=bias).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores_B = forward._scores(head, hidden_BD)
    exact_B = copy.deepcopy(head).double()(hidden_BD.double())[:, 0]
    torch.testing.assert_close(scores_B.double(), exact_B, rtol=1e-5, atol=1e-5)
    assert not torch.equal(scores_B, scores_B.bfloat16().float())


def test_under_autocast_a_trained_head_rounds_alike_with_and_without_a_gradient():
    torch.manual_seed(0)
    hidden_CD, targets_C = torch.randn(9, 16), torch.arange(9)
    head = nn.Linear(16, 40, bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        trained = token_log_probs(hidden_CD, head, targets_C).log_probs
        with torch.no_grad():
            before = token_log_probs(hidden_CD, head, targets_C).log_probs
    assert trained.requires_grad
    torch.testing.assert_close(before, trained.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("multiple", "tokens"), [(1, 22), (4, 24), (5, 25), (64, 22)])
def test_what_fills_a_row_changes_nothing(tiny_base, multiple, tokens, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64)
    assert forward.prepare_packed(model)
    row = PackedRow(tuple(GROUPS))
    lengths, embed = [], model.model.embed_tokens
    handle = embed.register_forward_pre_hook(lambda _, args: lengths.append(args[0].numel()))
    monkeypatch.setattr(forward, "ROW_MULTIPLE", multiple)
    filled = forward.packed_log_probs(model, row)
    handle.remove()
    assert lengths == [tokens]
    gradients = torch.autograd.grad(filled.log_probs.sum(), embed.weight)
    monkeypatch.setattr(forward, "ROW_MULTIPLE", 1)
    plain = forward.packed_log_probs(model, row)
    torch.testing.assert_close(filled.log_probs, plain.log_probs, rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad(plain.log_probs.sum(), embed.weight)
    torch.testing.assert_close(gradients, expected, rtol=1e-6, atol=1e-9)


GROUPS = [
    TokenGroup((), (5, 6, 7), ((8,), (9, 10, 11), (12, 13))),
    TokenGroup((), (14,), ((15, 16),)),
    TokenGroup((), (17, 18), ((19,), (20,), (21, 22, 23), (24,), (25, 26))),
]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
@pytest.mark.parametrize("lora", [False, True])
def test_scores_of_groups_equal_those_of_their_sequences(tiny_base, batch_size, lora):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1).eval()
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(0, 0.1)
    expected = [[score_sequences(model, [g.sequence(i)], 1)[0] for i in range(len(g.continuation_ids))] for g in GROUPS]
    got = score_groups(model, GROUPS, batch_size)
    assert [len(scores) for scores in got] == [3, 1, 5]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    # and the model still reads padded batches right
    flat = score_sequences(model, [g.sequence(i) for g in GROUPS for i in range(len(g.continuation_ids))], 4)
    assert flat == pytest.approx([score for scores in expected for score in scores], abs=1e-5)


def test_a_model_with_attention_of_its_own_is_scored_sequence_by_sequence(tiny_base, monkeypatch):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1).eval()
    expected = score_groups(model, GROUPS, 4)
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    assert score_groups(model, GROUPS, 4) == [pytest.approx(scores, abs=1e-5) for scores in expected]
    assert model.config._attn_implementation == "sdpa"


def test_no_row_goes_through_the_models_own_head_unread(tiny_base):
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float64).eval()
    rows = []
    model.lm_head.forward = lambda x: rows.append(x.shape[:-1].numel()) or nn.Linear.forward(model.lm_head, x)
    group_log_probs(model, [TokenGroup((), (5, 6, 7), ((8, 9), (10,)))], None)
    assert rows == [0]
