"""The sound world that the corpus breaks, made once, without any training."""

import dataclasses

import pytest

from helpsteer_rloo.run_dir import HELDOUT_PROMPTS, REWARD_MODEL_RECORD, write_json, write_text
from helpsteer_rloo.settings.knobs import DataKnobs
from tests.broken.corpus import Place, World, write_world_data


@pytest.fixture(scope="session")
def world(tiny_base, tokenizer, tmp_path_factory):
    """A data set, the tiny base, and two reward models as the reward stage leaves them: LoRA and full."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    from helpsteer_rloo.data.preparation import prepare
    from helpsteer_rloo.model.loading import Base
    from helpsteer_rloo.rendering import Renderer

    root = tmp_path_factory.mktemp("world")
    data = write_world_data(root / "data")
    renderer = Renderer(tokenizer)
    heldout = prepare(DataKnobs(dataset_name=str(data), max_length=96), renderer).heldout_prompts
    record = {
        "base_model": str(tiny_base),
        "base": dataclasses.asdict(Base(str(tiny_base))),
        "thinking": False,
        "rendering": renderer.fingerprint(96),
        "data": {"source": str(data), "fingerprint": "x", "pairs": 8},
        "training": {"steps": 1},
        "reload": {"sequences": 8, "max_difference": 0.0},
        "heldout": {
            "heldout_accuracy": 1.0,
            "heldout_pairs": 4,
            "interval": [0.51, 1.0],
            "better_than_chance": True,
        },
    }
    torch.manual_seed(0)
    for name in ("lora", "full"):
        model = AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=1)
        if name == "lora":
            model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules="all-linear"))
            for part, weight in model.named_parameters():
                if "lora_B" in part:  # zero at first, as if there were no adapter
                    torch.nn.init.normal_(weight, std=0.05)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        write_text(root / name / HELDOUT_PROMPTS, "".join(f"{key}\n" for key in heldout))
        write_json(root / name / REWARD_MODEL_RECORD, {**record, "adapter": name == "lora"})
    return World(data, tiny_base, root / "lora", root / "full")


@pytest.fixture
def place(world, tmp_path, monkeypatch):
    """A directory of a case's own, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    return Place(world, tmp_path)
