import pytest
import torch

from helpsteer_rloo.model.exponentials import exp


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_it_is_the_exponential(dtype, tolerance):
    x = torch.linspace(-80, 5, 1001, dtype=dtype)
    out = torch.empty_like(x)
    assert exp(x, out=out) is out
    torch.testing.assert_close(out, x.double().exp().to(dtype), rtol=tolerance, atol=0)
    assert torch.equal(exp(x, out=x), out)


def test_nothing_is_left_of_minus_infinity():
    assert exp(torch.tensor([-torch.inf, 0.0]), out=torch.empty(2)).tolist() == [0, 1]
