"""What a decision is worth, by hand and against scikit-learn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from rlnas_fast.errors import ConfigError
from rlnas_fast.networks import StageCNN
from rlnas_fast.placement.inserter import NonLocalInserter
from rlnas_fast.placement.rewards import METRICS, RewardRule, added_latency, macro_f1


@given(st.integers(0, 2**31 - 1), st.integers(1, 40), st.integers(2, 7))
def test_macro_f1_as_scikit_learn_says(seed: int, count: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(count, classes, generator=generator)
    y = torch.randint(classes, (count,), generator=generator)
    assert macro_f1(logits, y) == pytest.approx(f1_score(y, logits.argmax(dim=1), average="macro"))


def test_more_is_better_of_every_metric() -> None:
    y = torch.tensor([0, 1, 2])
    for metric in METRICS.values():
        assert metric(5 * torch.eye(3), y) > metric(torch.eye(3).roll(1, 0), y)


def test_the_reward_by_hand() -> None:
    assert RewardRule().reward(0.5, 0.8, 0.7, 0.3) == pytest.approx(0.8 - 0.7)
    assert RewardRule(control=False).reward(0.5, 0.8, 0.7, 0.3) == pytest.approx(0.8 - 0.5)
    assert RewardRule(latency_price=0.1).reward(0.5, 0.8, 0.7, 0.3) == pytest.approx(0.1 - 0.03)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"metric": "acuracy"}, "did you mean 'accuracy'"),
        ({"delay": 0}, "delay = 0"),
        ({"latency_price": -1.0}, "latency_price = -1"),
        ({"latency_price": float("nan")}, "latency_price = nan"),
    ],
)
def test_bad_options_are_named(options: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        RewardRule(**options)  # type: ignore[arg-type]
    assert says in str(raised.value)


def test_latency_is_measured_for_every_stage_and_the_network_left_alone() -> None:
    network, x = StageCNN(3, 10), torch.randn(2, 3, 8, 8)
    inserter = NonLocalInserter(network, x)
    inserter.insert(2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    added = added_latency(inserter, x[:1], "cpu")
    assert len(added.shares) == 4
    assert added.shares[0] == 0.0
    assert inserter.inserted == 2
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
