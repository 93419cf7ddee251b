"""The demo's base: its training goes on from a checkpoint, to the same bits, and without a word about tied weights."""

import logging

import pytest
from transformers import Qwen3ForCausalLM, Trainer, TrainingArguments

from helpsteer_rloo.data.demo import DemoBaseSettings
from helpsteer_rloo.preemption import Stopped
from helpsteer_rloo.training import demo_base
from helpsteer_rloo.training.tied_weights import tied_weights_unsaid

TINY = DemoBaseSettings(
    hidden_size=32, intermediate_size=64, layers=1, heads=2, key_value_heads=1, head_dim=16, vocab_size=400,
    clean_steps=6, mixed_steps=6, batch_size=4,
)  # fmt: skip


@pytest.fixture
def warned():
    """What transformers' trainer warns of; its loggers hand nothing on to the root's."""
    found, logger = [], logging.getLogger("transformers.trainer")
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


def test_a_base_that_was_stopped_again_and_again_is_the_one_that_was_not(tmp_path, monkeypatch, warned):
    import os
    import signal

    from trl import SFTTrainer

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    demo_base.build_base(whole, TINY, seed=3)
    step, steps = SFTTrainer.training_step, []

    def asked_to_stop(self, *args, **kwargs):
        steps.append(self.state.global_step)
        if len(steps) in (4, 8):
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "training_step", asked_to_stop)
    ends = []
    for _ in range(3):
        try:
            demo_base.build_base(stopped, TINY, seed=3)
        except Stopped as end:
            ends.append(str(end))
    assert len(ends) == 2
    assert steps == list(range(12))
    assert [text for text in warned if "keys" in text] == []
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in stopped.iterdir())
    assert not [name for name in names if name.startswith("checkpoint")]
    for name in names:
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name


@pytest.mark.parametrize(
    ("lacks", "has", "says"),
    [
        (["lm_head.weight"], [], []),
        (["lm_head.weight", "model.norm.weight"], [], ["missing keys"]),
        (["lm_head.weight", "model.embed_tokens.weight"], [], ["missing keys"]),
        (["lm_head.weight"], ["other.weight"], ["unexpected keys"]),
    ],
)
def test_of_weights_that_a_checkpoint_lacks_tied_ones_alone_are_not_told(tmp_path, warned, lacks, has, says):
    model = demo_base.build_model(demo_base.build_tokenizer(400, 0), TINY)
    trainer = Trainer(model, TrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    state = {**model.state_dict(), **dict.fromkeys(has, model.lm_head.weight)}
    loaded = model.load_state_dict({name: state[name] for name in state if name not in lacks}, strict=False)
    with tied_weights_unsaid(model):
        trainer._issue_warnings_after_load(loaded)
    assert [kind for text in warned for kind in ("missing keys", "unexpected keys") if kind in text] == says
    warned.clear()
    model.config.tie_word_embeddings = False
    with tied_weights_unsaid(Qwen3ForCausalLM(model.config)):  # a head of its own
        trainer._issue_warnings_after_load(loaded)
    assert "missing keys" in warned[0]
