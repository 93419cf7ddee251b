import pytest
import torch
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from helpsteer_rloo.model import drawing
from helpsteer_rloo.model.drawing import draw


def warped(logits_RV, temperature, top_k, top_p):
    """Log-probabilities of transformers' warpers."""
    scores = TemperatureLogitsWarper(temperature)(None, logits_RV.clone())
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    return scores.log_softmax(-1)


def random_logits(rows, size, scale=2.0, dtype=torch.float32):
    return scale * torch.randn(rows, size, generator=torch.Generator().manual_seed(0), dtype=dtype)


def uniforms(count):
    return torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("size", [3, 50, 512, 513, 1500])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 7, 1.0), (2.0, 0, 0.8), (1.3, 40, 0.6)]
)
def test_log_probabilities_are_those_of_transformers_warpers(size, temperature, top_k, top_p, monkeypatch):
    monkeypatch.setattr(drawing, "NUCLEUS", 8)  # so that it has to sort more
    logits = random_logits(200, size, dtype=torch.float64)  # in float32 their running sum is off at the edge of top-p
    ids, log_probs, untruncated = draw(logits, uniforms(200), temperature=temperature, top_k=top_k, top_p=top_p)
    expected = warped(logits, temperature, top_k, top_p).gather(-1, ids[:, None])[:, 0]
    assert expected.isfinite().all()
    torch.testing.assert_close(log_probs, expected, rtol=1e-12, atol=1e-12)
    whole = (logits / temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(untruncated, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (20, 1.0), (0, 0.7), (20, 0.7)])
def test_the_empirical_distribution_is_that_of_the_warpers(top_k, top_p):
    logits = random_logits(1, 60)
    expected = warped(logits, 0.9, top_k, top_p)[0].double().exp()
    ids, *_ = draw(logits.expand(20_000, -1), uniforms(20_000), temperature=0.9, top_k=top_k, top_p=top_p)
    counts = torch.bincount(ids, minlength=60)
    allowed = expected > 0
    assert counts[~allowed].sum() == 0
    frequencies = 20_000 * expected[allowed] / expected[allowed].sum()
    assert chisquare(counts[allowed].numpy(), frequencies.numpy()).pvalue > 0.01


def test_the_draw_is_the_inverse_of_the_distribution_function():
    """At a vocabulary of usual size, on both sides of every boundary near a few places."""
    logits = random_logits(1, 151_936, dtype=torch.float64)
    running = logits[0].softmax(-1).cumsum(-1)
    places = torch.tensor([0, 1, 511, 512, 513, 75_000, 151_551, 151_552, 151_935])
    below = torch.where(places > 0, running[places - 1], 0.0)
    width = running[places] - below
    for share in (0.001, 0.5, 0.999):
        ids, *_ = draw(logits.expand(len(places), -1), below + share * width, temperature=1.0, top_k=0, top_p=1.0)
        assert ids.tolist() == places.tolist()


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53, 1.0])
def test_nothing_impossible_is_drawn_at_the_ends(uniform):
    logits = torch.full((1, 1300), -torch.inf)
    logits[0, [600, 700]] = 0.0
    ids, log_probs, _ = draw(logits, torch.tensor([uniform], dtype=torch.float64), temperature=1.0, top_k=0, top_p=1.0)
    assert ids.item() == (600 if uniform == 0 else 700)
    assert log_probs.item() == pytest.approx(-0.6931472)


def test_half_precision_is_drawn_in_float32():
    logits = random_logits(64, 600).bfloat16()
    ids, log_probs, _ = draw(logits, uniforms(64), temperature=1.0, top_k=0, top_p=1.0)
    expected = logits.float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, expected)
