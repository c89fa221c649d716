import pytest
import torch

from localdit.training.state import ExponentialMovingAverage


def model(value, dtype=torch.float32):
    module = torch.nn.Linear(2, 1, dtype=dtype)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, value)
    return module


def test_the_average_trails_with_a_decay_that_warms_up():
    ema = ExponentialMovingAverage(model(0.0).named_parameters(), decay=0.5)
    expected = 0.0
    for update in range(1, 20):
        ema.update(model(1.0).named_parameters())
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay)
        assert ema.averages["weight"].tolist() == [[pytest.approx(expected)] * 2]
    assert ema.updates == 19


def test_the_model_is_left_alone_and_the_average_has_no_gradient():
    module = model(3.0)
    ema = ExponentialMovingAverage(module.named_parameters(), decay=0.9)
    with torch.no_grad():
        module.weight.fill_(5.0)
    assert (ema.averages["weight"] == 3).all()
    ema.update(module.named_parameters())
    assert (module.weight == 5).all()
    assert not ema.averages["weight"].requires_grad


def test_averages_are_float32_whatever_the_model_is():
    ema = ExponentialMovingAverage(model(1.0, torch.bfloat16).named_parameters(), 0.999, "cpu")
    assert ema.averages["bias"].dtype == torch.float32
    before = ema.averages["bias"].clone()
    for _ in range(100):
        ema.update(model(1.01, torch.bfloat16).named_parameters())
    assert before < ema.averages["bias"] < 1.01  # bfloat16 would have rounded each update away
