"""The demo's base: its training goes on from a checkpoint, to the same bits."""

from helpsteer_rloo.data.demo import DemoBaseSettings
from helpsteer_rloo.preemption import Stopped
from helpsteer_rloo.training import demo_base

TINY = DemoBaseSettings(
    hidden_size=32, intermediate_size=64, layers=1, heads=2, key_value_heads=1, head_dim=16, vocab_size=400,
    clean_steps=6, mixed_steps=6, batch_size=4,
)  # fmt: skip


def test_a_base_that_was_stopped_again_and_again_is_the_one_that_was_not(tmp_path, monkeypatch):
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
    names = sorted(path.name for path in whole.iterdir())
    assert names == sorted(path.name for path in stopped.iterdir())
    assert not [name for name in names if name.startswith("checkpoint")]
    for name in names:
        assert (whole / name).read_bytes() == (stopped / name).read_bytes(), name
