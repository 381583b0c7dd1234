"""Accuracy on spoilt images, against what can be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rlnas_fast.errors import ConfigError
from rlnas_fast.tasks.digits import digits
from rlnas_fast.training.data import DeviceData
from rlnas_fast.training.recipe import Recipe
from rlnas_fast.training.robustness import Corruption, _blurred, robust_accuracy

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> DeviceData:
    return DeviceData.of(digits(classes=(0, 1)), CPU)


def linear(data: DeviceData) -> nn.Module:
    """Two classes told apart by the difference of their means."""
    x = data.normalise(data.x).flatten(1)
    one, two = (x[data.y == label].mean(dim=0) for label in (0, 1))
    module = nn.Sequential(nn.Flatten(), nn.Linear(x.shape[1], 2))
    with torch.no_grad():
        module[1].weight.copy_(torch.stack([one, two]))
        module[1].bias.copy_(torch.stack([-(one @ one) / 2, -(two @ two) / 2]))
    return module


def accuracy(data: DeviceData, text: str, seed: int = 0) -> float:
    return robust_accuracy(linear(data), data, Recipe(), Corruption.of(text), seed)


@pytest.mark.parametrize("kind", ["noise", "blur", "fgsm"])
def test_the_stronger_the_worse(kind: str, data: DeviceData) -> None:
    weak, strong = accuracy(data, f"{kind}:0.001"), accuracy(data, f"{kind}:20")
    assert weak > 0.95
    assert strong < weak


def test_the_attack_of_a_linear_network_is_the_closed_form(data: DeviceData) -> None:
    module, step = linear(data), 0.4
    x = data.normalise(data.x_validation).flatten(1)
    weight = module[1].weight[1] - module[1].weight[0]
    margin = (x @ weight + module[1].bias[1] - module[1].bias[0]) * (2 * data.y_validation - 1)
    expected = (margin - step * weight.abs().sum() > 0).float().mean().item()
    assert accuracy(data, f"fgsm:{step}") == pytest.approx(expected)


def test_the_noise_is_the_same_every_time(data: DeviceData) -> None:
    assert accuracy(data, "noise:3") == accuracy(data, "noise:3")
    assert len({accuracy(data, "noise:3", seed) for seed in range(4)}) > 1


def test_a_blur_keeps_what_is_flat_and_the_mean_of_a_dot() -> None:
    flat = torch.full((2, 3, 7, 5), 1.5)
    torch.testing.assert_close(_blurred(flat, 0.8), flat)
    dot = torch.zeros(1, 1, 15, 15)
    dot[0, 0, 7, 7] = 1.0
    spread = _blurred(dot, 1.0)
    torch.testing.assert_close(spread.sum(), torch.tensor(1.0))
    torch.testing.assert_close(spread, spread.mT)
    assert spread.argmax() == dot.argmax()


@pytest.mark.parametrize("text", ["rain", "fgsm:x", "noise:0", "blur:nan", "noise:-1", "fgsm:"])
def test_bad_settings_are_named(text: str) -> None:
    with pytest.raises(ConfigError, match=text.split(":")[0]):
        Corruption.of(text)
