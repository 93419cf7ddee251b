"""How the judgement of a policy treats memory; its numbers are tested with the pipeline."""

import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpsteer_rloo.evaluation import policy
from helpsteer_rloo.evaluation.policy import EvaluationKnobs, Judges, PolicyPair, evaluate_policy
from helpsteer_rloo.model.loading import Base


class Model:
    """Stands for 16 GB."""


class JudgesAreLoadedNowError(Exception):
    """The end of the test."""


def test_one_model_is_in_memory_at_a_time(monkeypatch):
    models, alive = [], []

    def count():
        gc.collect()
        alive.append(sum(model() is not None for model in models))

    def load(*_, **__):
        count()
        model = Model()
        models.append(weakref.ref(model))
        return model

    def score(*_):
        count()
        raise JudgesAreLoadedNowError

    for name, stand_in in {"load_policy": load, "_scored": score, "_sampled": lambda *_: []}.items():
        monkeypatch.setattr(policy, name, stand_in)
    monkeypatch.setattr(policy, "_completion_log_probs", lambda *_: [])
    knobs = EvaluationKnobs(8, temperature=1.0, top_p=1.0, top_k=0, batch_size=1, seed=0)
    tokenizer = SimpleNamespace(batch_decode=lambda texts: texts)
    with pytest.raises(JudgesAreLoadedNowError):
        evaluate_policy(PolicyPair(Base("x"), Path("y"), adapter=True), Judges("z"), tokenizer, [], knobs)
    assert alive == [0, 0, 0]
