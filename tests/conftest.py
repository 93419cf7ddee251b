"""What several tests share. Heavy imports stand inside the fixtures, so that tests of light modules stay light."""

import os

import pytest
from hypothesis import settings

settings.register_profile("reproducible", derandomize=True, deadline=None, database=None)
settings.load_profile("reproducible")
os.environ["HELPSTEER_RLOO_REPORT"] = "off"  # a process for each of many small runs; tests/report has its own


@pytest.fixture(scope="session")
def tokenizer():
    """A small tokenizer with Qwen3's special tokens and chat template."""
    from helpsteer_rloo.training import demo_base

    return demo_base.build_tokenizer(vocab_size=700, seed=0)


@pytest.fixture(scope="session")
def tiny_base(tokenizer, tmp_path_factory):
    """Directory of a tiny random Qwen3 with its tokenizer."""
    import torch

    from helpsteer_rloo.data.demo import DemoBaseSettings
    from helpsteer_rloo.training import demo_base

    torch.manual_seed(0)
    settings = DemoBaseSettings(hidden_size=32, intermediate_size=64, layers=2, heads=2, key_value_heads=1, head_dim=16)
    directory = tmp_path_factory.mktemp("base")
    demo_base.build_model(tokenizer, settings).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
