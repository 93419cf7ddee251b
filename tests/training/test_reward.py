import json
import subprocess
import sys
import warnings
from dataclasses import asdict

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

from helpsteer_rloo.evaluation import stock_scores
from helpsteer_rloo.model.forward import scalar_head, score_sequences
from helpsteer_rloo.model.loading import Base, load_reward_model
from helpsteer_rloo.objectives import bradley_terry_loss, preference_margins
from helpsteer_rloo.training.reward import RewardTrainer, with_trained_head
from helpsteer_rloo.training.reward_model import to_stored_dtype

CHAT = [
    {
        "prompt": [{"role": "user", "content": f"Name {n} trees."}],
        "chosen": [{"role": "assistant", "content": "oak, elm"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    for n in range(8)
]


def arguments(directory, **changes):
    settings = {
        "output_dir": str(directory),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return trl.RewardConfig(**{**settings, **changes})


def trainer_on_chat(model, tokenizer, directory, peft_config=None, trainer=RewardTrainer, **changes):
    return trainer(
        model=model if isinstance(model, torch.nn.Module) else str(model),
        args=arguments(directory, **changes),
        train_dataset=Dataset.from_list(CHAT),
        processing_class=tokenizer,
        peft_config=peft_config,
    )


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM", "SEQ_CLS"])
def test_the_head_is_trained_and_saved_whatever_the_task_type(tiny_base, tokenizer, tmp_path, task_type):
    config = LoraConfig(task_type=task_type, r=4, target_modules="all-linear")
    trainer = trainer_on_chat(tiny_base, tokenizer, tmp_path, config)
    before = scalar_head(trainer.model)[1].weight.detach().clone()
    trainer.train()
    assert not torch.equal(scalar_head(trainer.model)[1].weight, before)
    trainer.save_model(str(tmp_path))
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1)
    with torch.no_grad():
        base.score.weight.fill_(9.0)  # a wrong head, which the saved one has to replace
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    ids = [[5, 6, 7, 8], [9, 10]]
    assert score_sequences(loaded, ids, 1) == pytest.approx(score_sequences(trainer.model.eval(), ids, 1), abs=1e-5)
    assert config.task_type == task_type  # the caller's configuration is left as it was


def test_trl_itself_leaves_the_head_frozen_without_a_task_type(tiny_base, tokenizer, tmp_path):
    config = LoraConfig(r=4, target_modules="all-linear")
    trainer = trainer_on_chat(tiny_base, tokenizer, tmp_path, config, trainer=trl.RewardTrainer)
    assert not scalar_head(trainer.model)[1].weight.requires_grad


def test_a_peft_model_with_a_frozen_head_is_refused(tiny_base, tokenizer, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="scalar head 'score' is frozen"):
        RewardTrainer(
            model=model, args=arguments(tmp_path), train_dataset=Dataset.from_list(CHAT), processing_class=tokenizer
        )


@pytest.mark.filterwarnings("ignore:Using TRL's own path")
@pytest.mark.parametrize("peft_config", [None, LoraConfig(r=4, target_modules=["query"])])
def test_a_model_whose_head_has_another_name_trains_as_in_trl(tokenizer, tmp_path, peft_config):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=tokenizer.pad_token_id, **sizes)
    trainer = trainer_on_chat(BertForSequenceClassification(config), tokenizer, tmp_path, peft_config)
    weights = [p for name, p in trainer.model.named_parameters() if "classifier" in name and p.requires_grad]
    before = weights[0].detach().clone()
    trainer.train()
    assert not torch.equal(weights[0], before)


def test_under_bf16_the_head_trains_in_float32_and_moves(tiny_base, tokenizer, tmp_path):
    """In bfloat16 an update of 1e-6 to weights of 0.02 is rounded away."""
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear")
    changes = {"bf16": True, "learning_rate": 1e-6, "model_init_kwargs": {"dtype": "bfloat16"}}
    trainer = trainer_on_chat(tiny_base, tokenizer, tmp_path, config, **changes)
    head = scalar_head(trainer.model)[1].weight
    assert head.dtype == torch.float32
    before = head.detach().clone()
    trainer.train()
    assert (head != before).float().mean() > 0.9
    to_stored_dtype(trainer.model, "bfloat16")
    trainer.save_model(str(tmp_path))
    ids = [[5, 6, 7, 8], [9, 10]]
    base = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    stock = score_sequences(loaded, ids, 1)
    assert score_sequences(trainer.model.eval(), ids, 1) == pytest.approx(stock, abs=0.02)  # rotations are rounded less


def test_pairs_over_max_length_are_reported(tiny_base, tokenizer, tmp_path):
    rows = [{"chosen_ids": [5] * n, "rejected_ids": [6] * 3} for n in (3, 4, 40, 50)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RewardTrainer(
            model=str(tiny_base),
            args=arguments(tmp_path, max_length=10),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    expected = "2 of 4 pairs of the train data set are longer than max_length=10 and were dropped."
    assert expected in [str(warning.message) for warning in caught]


def test_the_loss_is_trls_and_the_leave_one_out_margin(tiny_base, tokenizer, tmp_path):
    """Same weights, same pairs, float64: TRL's loss, ours, and Bradley-Terry over leave-one-out margins agree."""
    model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1, dtype=torch.float64)
    ours = trainer_on_chat(model, tokenizer, tmp_path / "a")
    theirs = trainer_on_chat(model, tokenizer, tmp_path / "b", trainer=trl.RewardTrainer)
    examples = [ours.train_dataset[i] for i in range(4)]
    losses = [trainer.compute_loss(trainer.model, trainer.data_collator(examples)).item() for trainer in (ours, theirs)]
    pairs = [[row["chosen_ids"], row["rejected_ids"]] for row in ours.train_dataset][:4]
    flat = score_sequences(ours.model.eval(), [ids for pair in pairs for ids in pair], 1)
    scores_PN = torch.tensor(flat, dtype=torch.float64).view(-1, 2)
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)  # float32 norms
    assert ours.compute_loss(ours.model, theirs.data_collator(examples)).item() == losses[1]
    assert bradley_terry_loss(preference_margins(scores_PN)).item() == pytest.approx(losses[0], rel=1e-6)


def test_no_adapter_configuration_stays_none():
    assert with_trained_head(None) is None


def test_a_directory_without_a_record_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no reward_model\.json here"):
        load_reward_model(tmp_path)


def test_the_stock_program_imports_nothing_of_this_project(tiny_base, tokenizer, tmp_path):
    trainer = trainer_on_chat(tiny_base, tokenizer, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path))
    ids = [[5, 6, 7, 8], [9, 10]]
    asked = {"directory": str(tmp_path), "sequences": ids, "base": asdict(Base(str(tiny_base)))}
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__');"
        "print(any(name.startswith('helpsteer_rloo') for name in sys.modules))"
    )
    command = [sys.executable, "-I", "-c", code, stock_scores.__file__]
    done = subprocess.run(command, input=json.dumps(asked) + "\n", capture_output=True, text=True, check=True)
    lines = done.stdout.strip().splitlines()
    assert lines[-1] == "False"
    assert json.loads(lines[-2]) == pytest.approx(score_sequences(trainer.model.eval(), ids, 1), abs=1e-5)
