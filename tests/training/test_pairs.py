import copy
import itertools
import warnings

import pytest
import torch
import trl
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import AutoModelForSequenceClassification
from transformers.models.qwen3 import modeling_qwen3

from helpsteer_rloo.groups import Preference, TokenGroup
from helpsteer_rloo.settings.knobs import RewardKnobs
from helpsteer_rloo.training.packed import deal
from helpsteer_rloo.training.pair_data import pair_dataset
from helpsteer_rloo.training.pairs import GroupSampler, Pair, StepShape, collate_pairs, fill_batches, pack_pairs
from helpsteer_rloo.training.reward import RewardConfig, RewardTrainer
from tests.model.test_attention import norm_in_float64


def batched(items, size):
    """Lists of `size` items; the last may be shorter."""
    items = iter(items)
    return list(iter(lambda: list(itertools.islice(items, size)), []))


def random_ids(generator, low, high):
    length = int(torch.randint(low, high + 1, (1,), generator=generator))
    return torch.randint(3, 60, (length,), generator=generator).tolist()


def pair_rows(seed, prompts=5, margins=False):
    """Rows as in HelpSteer3: some prompts come with several pairs, some responses stand in several pairs."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for group in range(prompts):
        prompt = random_ids(generator, 1, 9)
        responses = [random_ids(generator, 1, 8) for _ in range(4)]
        for _ in range(1 + int(torch.randint(0, 3, (1,), generator=generator))):
            a, b = torch.randperm(4, generator=generator)[:2].tolist()
            row = {"chosen_ids": prompt + responses[a], "rejected_ids": prompt + responses[b], "group": group}
            rows.append({**row, "margin": float(a + 1) / 2} if margins else row)
    return rows


def make_trainer(trainer_class, tiny_base, tokenizer, directory, rows, **changes):
    settings = {
        "output_dir": str(directory),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_length": None,
    }
    lora = changes.pop("lora", False)
    config = trl.RewardConfig if trainer_class is trl.RewardTrainer else RewardConfig
    torch.manual_seed(0)
    return trainer_class(
        model=AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, dtype=torch.float64),
        args=config(**{**settings, **changes}),
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
        peft_config=LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", r=2) if lora else None,
    )


LOGGED = ("loss", "grad_norm", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "num_tokens")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_checkpointing": False},
        {"center_rewards_coefficient": 0.1},
        {"margins": True},
        {"lora": True},
        {"packed_tokens": 12},
        {"packed_tokens": 1},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1},
    ],
)
def test_three_steps_equal_trls_in_float64(tiny_base, tokenizer, tmp_path, monkeypatch, changes):
    """Weights, loss, gradient norm and every metric of TRL's own trainer, on the same pairs in the same order."""
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", norm_in_float64)
    changes = dict(changes)
    rows = pair_rows(3, prompts=8, margins=changes.pop("margins", False))
    budget = {name: changes.pop(name) for name in ("packed_tokens",) if name in changes}
    results = []
    for trainer_class, own in ((RewardTrainer, budget), (trl.RewardTrainer, {})):
        trainer = make_trainer(trainer_class, tiny_base, tokenizer, tmp_path, rows, **changes, **own)
        trainer.train()
        history = [row for row in trainer.state.log_history if "loss" in row]
        weights = {name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad}
        results.append(([[row[name] for name in LOGGED] for row in history], weights))
    (ours, our_weights), (theirs, their_weights) = results
    assert len(ours) == 3
    for our_row, their_row in zip(ours, theirs, strict=True):
        # TRL logs minima and maxima of micro-batches, which are others where pairs on one prompt were brought together
        assert our_row[:5] == pytest.approx(their_row[:5], rel=1e-6)
        assert our_row[7] == their_row[7]
    assert our_weights.keys() == their_weights.keys()
    for name, weight in our_weights.items():
        torch.testing.assert_close(weight, their_weights[name], rtol=1e-9, atol=1e-11, msg=name)


def test_evaluation_equals_trls(tiny_base, tokenizer, tmp_path):
    rows, results = pair_rows(4, prompts=8)[:14], []
    for trainer_class in (RewardTrainer, trl.RewardTrainer):
        trainer = make_trainer(trainer_class, tiny_base, tokenizer, tmp_path, rows, per_device_eval_batch_size=7)
        results.append(trainer.evaluate(Dataset.from_list(rows)))
    for name in ("eval_loss", "eval_accuracy", "eval_margin", "eval_mean_reward"):
        assert results[0][name] == pytest.approx(results[1][name], rel=1e-6), name


def test_fewer_tokens_are_computed_than_padded(tiny_base, tokenizer, tmp_path):
    rows, counts = pair_rows(5, prompts=6), []
    for trainer_class in (RewardTrainer, trl.RewardTrainer):
        trainer = make_trainer(trainer_class, tiny_base, tokenizer, tmp_path, rows, max_steps=2)
        seen = []
        trainer.model.model.embed_tokens.register_forward_hook(lambda _m, i, _o, seen=seen: seen.append(i[0].numel()))
        trainer.train()
        counts.append(sum(seen))
    assert counts[0] < 0.7 * counts[1]


def test_what_cannot_be_packed_is_left_to_trl_with_one_warning(tiny_base, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_qwen3.Qwen3ForSequenceClassification, "_supports_attention_backend", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        trainer = make_trainer(RewardTrainer, tiny_base, tokenizer, tmp_path, pair_rows(1))
    (message,) = [str(w.message) for w in caught if "TRL's own path" in str(w.message)]
    assert "packed rows cannot be used with the architecture of Qwen3ForSequenceClassification" in message
    trainer.train()
    assert trainer.state.global_step == 3


def test_the_stock_engine_is_silent(tiny_base, tokenizer, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer = make_trainer(RewardTrainer, tiny_base, tokenizer, tmp_path, pair_rows(1), engine="trl")
    trainer.train()
    assert trainer.state.global_step == 3


def test_an_epoch_takes_every_pair_once_and_whole_prompts(tiny_base, tokenizer, tmp_path):
    rows, steps = pair_rows(6, prompts=9), []

    class Spy(RewardTrainer):
        def get_batch_samples(self, *args):
            batches, items = super().get_batch_samples(*args)
            steps.append([row for batch in batches for row in batch["batch"].rows])
            return batches, items

    make_trainer(Spy, tiny_base, tokenizer, tmp_path, rows, train_sampling_strategy="random", max_steps=-1).train()
    per_epoch = len(steps) // 3
    assert sum(len(row.chosen) for step in steps[:per_epoch] for row in step) == len(rows)
    orders = [[row.row.input_ids for step in steps[i * per_epoch :][:per_epoch] for row in step] for i in range(2)]
    assert orders[0] != orders[1]


def test_pairs_that_share_a_prompt_share_it_in_the_row():
    prompt = (1, 2, 3, 4)
    pairs = [Pair((*prompt, 5), (*prompt, 6, 7), group=0), Pair((*prompt, 6, 7), (*prompt, 8), group=0)]
    (row,) = pack_pairs(pairs, None)
    assert row.row.input_ids == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (row.chosen, row.rejected) == ([0, 1], [1, 2])


def test_equal_responses_are_one_continuation():
    (row,) = pack_pairs([Pair((1, 2), (1, 2))], None)
    assert (row.row.input_ids, row.chosen, row.rejected) == ([1, 2], [0], [0])


def test_collating_keeps_what_is_there():
    (pair,) = collate_pairs([{"chosen_ids": [1, 2], "rejected_ids": [1], "margin": 0.5}])["pairs"]
    assert pair == Pair((1, 2), (1,), 0.5, None)


sequences = st.lists(st.integers(1, 3), min_size=1, max_size=6).map(tuple)


@given(st.lists(st.builds(Pair, sequences, sequences, st.none(), st.integers(0, 2)), min_size=1), st.integers(1, 30))
def test_every_pair_is_packed_once_with_its_own_sequences(pairs, budget):
    packed = []
    for row in pack_pairs(pairs, budget):
        flat = [g.sequence(i) for g in row.row.groups for i in range(len(g.continuation_ids))]
        packed += [(flat[a], flat[b]) for a, b in zip(row.chosen, row.rejected, strict=True)]
        assert len(row.row.input_ids) <= budget or len(row.row.groups) == 1
    assert sorted(packed) == sorted((pair.chosen, pair.rejected) for pair in pairs)


@given(st.lists(st.integers(1, 7), max_size=20), st.integers(1, 6))
def test_filled_batches_hold_every_member_once(sizes, batch_size):
    members = iter(range(sum(sizes)))
    groups = [[next(members) for _ in range(size)] for size in sizes]
    order = list(fill_batches(groups, batch_size))
    assert sorted(order) == list(range(sum(sizes)))


def test_groups_are_whole_in_their_batches_while_there_is_choice():
    generator = torch.Generator().manual_seed(0)
    sizes = (torch.randint(0, 4, (400,), generator=generator) + 1).tolist()
    groups = [g for g, size in enumerate(sizes) for _ in range(size)]
    order = list(GroupSampler(groups, StepShape(4), seed=1))
    batches = [{groups[i] for i in order[start : start + 4]} for start in range(0, len(order), 4)]
    cut = sum(len(batch & after) for batch, after in itertools.pairwise(batches))
    assert cut < 0.05 * len(sizes)


def test_every_process_is_handed_whole_prompts():
    groups = [g for g in range(64) for _ in range(2)]
    shape = StepShape(batch_size=4, batches=2, processes=2)
    order = list(GroupSampler(groups, shape, seed=1))
    for start in range(0, len(order), shape.pairs):
        batches = list(batched(order[start : start + shape.pairs], 4))
        first, second = ({groups[i] for batch in batches[p::2] for i in batch} for p in range(2))
        assert not first & second


@given(st.lists(st.integers(), max_size=9), st.integers(1, 5))
def test_dealing_keeps_the_order_and_fills_the_last_hand(units, hands):
    dealt = deal(units, hands)
    assert [unit for hand in dealt for unit in hand] == units
    assert len(dealt) == hands
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert dealt[-1] or not units


def test_predictions_come_in_the_order_of_the_data(tiny_base, tokenizer, tmp_path):
    """Pairs on one prompt that are apart in a batch are computed together, and put back."""
    rows = [pair for pair in pair_rows(3, prompts=6) if pair["group"] < 3]
    apart = sorted(rows, key=lambda row: rows.index(row) % 3)
    assert [row["group"] for row in apart] != sorted(row["group"] for row in apart)
    trainer = make_trainer(RewardTrainer, tiny_base, tokenizer, tmp_path, apart, per_device_eval_batch_size=len(apart))
    together = trainer.predict(trainer.train_dataset).predictions
    alone = [trainer.predict(trainer.train_dataset.select([i])).predictions[0].tolist() for i in range(len(apart))]
    torch.testing.assert_close(torch.tensor(together).double(), torch.tensor(alone).double())


def test_margins_for_some_pairs_only_are_refused():
    pairs = [Pair((1, 2), (1, 3), margin=1.0), Pair((1, 4), (1, 5))]
    with pytest.raises(ValueError, match="others none"):
        pack_pairs(pairs, None)


@pytest.mark.parametrize(("changes", "name"), [({"neftune_noise_alpha": 5.0}, "NEFTune"), ({}, "dropout in attention")])
def test_what_depends_on_padding_or_attention_weights_is_left_to_trl(
    tiny_base, tokenizer, tmp_path, changes, name, monkeypatch
):
    if not changes:
        model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, attention_dropout=0.1)
        monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda *_, **__: model.double())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(RewardTrainer, tiny_base, tokenizer, tmp_path, pair_rows(3), max_steps=1, **changes)
    assert [name in str(w.message) for w in caught if "TRL's own path" in str(w.message)] == [True]
    trainer.train()


# ---- losses that TRL does not have -----------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("margins", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_a_step_with_weights_and_smoothing_is_that_of_a_plain_forward(
    tiny_base, tokenizer, tmp_path, monkeypatch, smoothing, margins, weights
):
    """In float64: mean over pairs of w (-(1 - e) log sigma(d) - e log sigma(-d)), d with its margin taken off."""
    monkeypatch.setattr(modeling_qwen3.Qwen3RMSNorm, "forward", norm_in_float64)
    rows = pair_rows(6, prompts=8, margins=margins)[:4]
    if weights:
        rows = [{**row, "weight": 0.5 + place} for place, row in enumerate(rows)]
    changes = {"max_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 0.5}
    trainer = make_trainer(RewardTrainer, tiny_base, tokenizer, tmp_path, rows, label_smoothing=smoothing, **changes)
    plain = copy.deepcopy(trainer.model)
    trainer.train()

    def score(ids):
        return plain(input_ids=torch.tensor([ids])).logits[0, 0]

    total = torch.zeros((), dtype=torch.float64)
    for row in rows:
        d = score(row["chosen_ids"]) - score(row["rejected_ids"]) - row.get("margin", 0.0)
        loss = -(1 - smoothing) * d.sigmoid().log() - smoothing * (-d).sigmoid().log()
        total = total + row.get("weight", 1.0) * loss / len(rows)
    total.backward()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total.item(), rel=1e-6)
    trained = dict(trainer.model.named_parameters())
    for name, parameter in plain.named_parameters():
        step = torch.zeros_like(parameter) if parameter.grad is None else 0.5 * parameter.grad
        torch.testing.assert_close(trained[name], parameter.detach() - step, rtol=1e-9, atol=1e-11, msg=name)


@pytest.mark.parametrize("change", ["weight", "label_smoothing"])
def test_what_trls_path_would_leave_out_is_refused(tiny_base, tokenizer, tmp_path, monkeypatch, change):
    monkeypatch.setattr("helpsteer_rloo.training.reward.set_up_packing", lambda trainer: "this test")
    rows = [{**row, "weight": 1.0} for row in pair_rows(1)] if change == "weight" else pair_rows(1)
    own = {"label_smoothing": 0.1} if change == "label_smoothing" else {}
    with pytest.raises(ValueError, match=f"{change}.* needs packed rows, which cannot be used with this test"):
        make_trainer(RewardTrainer, tiny_base, tokenizer, tmp_path, rows, **own)


def test_weights_for_some_pairs_only_are_refused():
    pairs = [Pair((1, 2), (1, 3), weight=1.0), Pair((1, 4), (1, 5))]
    with pytest.raises(ValueError, match="have a `weight` and others none"):
        pack_pairs(pairs, None)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [{}, {}]),
        ({"loss": "margin"}, [{"margin": 3.0}, {"margin": 1.0}]),
        ({"loss": "scaled"}, [{"weight": 3.0}, {"weight": 1.0}]),
        ({"weight_by_agreement": True}, [{"weight": 0.75}, {"weight": 1.0}]),
        ({"loss": "scaled", "weight_by_agreement": True}, [{"weight": 2.25}, {"weight": 1.0}]),
        (
            {"loss": "margin", "weight_by_agreement": True},
            [{"margin": 3.0, "weight": 0.75}, {"margin": 1.0, "weight": 1.0}],
        ),
    ],
)
def test_targets_follow_from_strength_and_agreement(settings, expected):
    pairs = (
        Preference(1, 0, 3, 0, "general", "english", annotators=(3, 0)),
        Preference(0, 2, 1, 1, "general", "english"),
    )
    group = TokenGroup((), (1, 2), ((3,), (4,), (5,)), pairs)
    rows = pair_dataset([group], RewardKnobs(**settings)).to_list()
    ids = [{"chosen_ids": [1, 2, 4], "rejected_ids": [1, 2, 3]}, {"chosen_ids": [1, 2, 3], "rejected_ids": [1, 2, 5]}]
    assert rows == [{**own, "group": 0, **more} for own, more in zip(ids, expected, strict=True)]


@pytest.mark.parametrize(("annotators", "says"), [((), "nothing to weigh by"), ((-1, -2), "contradict their labels")])
def test_weights_by_agreement_need_annotators(annotators, says):
    preference = Preference(0, 1, 1, row=0, domain="general", language="english", annotators=annotators)
    group = TokenGroup((), (1, 2), ((3,), (4,)), (preference,))
    with pytest.raises(ValueError, match=says):
        pair_dataset([group], RewardKnobs(weight_by_agreement=True))
