import torch

from localdit.training.ema import ExponentialMovingAverage


def test_decay_is_warmed_up_and_capped():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = ExponentialMovingAverage(model, decay=0.3)
    torch.nn.init.ones_(model.weight)
    expected = 0.0
    for update in range(1, 8):
        ema.update(model)
        decay = min(0.3, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay)
        torch.testing.assert_close(ema.model.weight.item(), expected)


def test_the_average_is_apart_from_the_model():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)).train()
    ema = ExponentialMovingAverage(model, decay=0.9)
    assert not ema.model.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    before = model[0].weight.clone()
    ema.update(model)
    torch.testing.assert_close(model[0].weight, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
