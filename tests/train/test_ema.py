"""Laws of the moving average."""

import torch

from vc2.train.ema import Ema


def test_average_equals_its_closed_form() -> None:
    """Weights of past values are products of decays, with warm-up."""
    torch.manual_seed(0)
    values = torch.randn(30, 5)
    ema = Ema(values[0], decay=0.8)
    weights = torch.zeros(30)
    weights[0] = 1.0
    for n, value in enumerate(values[1:]):
        ema.update(value)
        decay = min(0.8, (1 + n) / (10 + n))
        weights *= decay
        weights[n + 1] += 1 - decay
    torch.testing.assert_close(ema.shard, weights @ values, atol=1e-6, rtol=1e-5)
    assert ema.updates == 29


def test_without_decay_the_average_is_the_weights() -> None:
    """Decay 0 keeps no past."""
    ema = Ema(torch.zeros(3), decay=0.0)
    ema.update(torch.ones(3))
    assert torch.equal(ema.shard, torch.ones(3))
