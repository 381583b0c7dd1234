"""The training procedure: order of events, delay, taking back, going on after a stop, collapse."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlnas_fast.errors import ConfigError, DataError
from rlnas_fast.networks import StageCNN
from rlnas_fast.placement.agents import make_agent
from rlnas_fast.placement.batches import Batch, LoaderBatches, TaskBatches
from rlnas_fast.placement.inserter import NonLocalInserter
from rlnas_fast.placement.probe import ActivationProbe
from rlnas_fast.placement.procedure import FixedAgent, Placement, collapse_of
from rlnas_fast.placement.rewards import AddedLatency, RewardRule
from rlnas_fast.placement.stages import observing
from rlnas_fast.tasks.digits import digits
from rlnas_fast.training.data import DeviceData
from rlnas_fast.training.recipe import Recipe

CPU = torch.device("cpu")


class Script:
    """An agent that chooses what it was told to, and remembers what it was told."""

    def __init__(self, actions: Sequence[int]) -> None:
        self.actions, self.told, self.asked = list(actions), [], 0  # type: ignore[var-annotated]

    def select(self, state: Tensor, *, explore: bool = True) -> int:
        if not explore:
            return 1
        self.asked += 1
        return self.actions[(self.asked - 1) % len(self.actions)]

    def update(self, state: Tensor, action: int, reward: float) -> None:
        self.told.append((action, reward))

    def probabilities(self, state: Tensor) -> Tensor:
        return torch.tensor([0.1, 0.9, 0.0, 0.0])

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.asked = state["asked"]


class Few:
    """Three batches an epoch, of two regimes."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.all = [
            Batch(torch.randn(8, 1, 8, 8, generator=generator), torch.arange(8) % 4, regime)
            for regime in ("clean", "clean", "noise", "noise", "clean", "noise")
        ]
        self.validation = self.all[3:]

    def __len__(self) -> int:
        return 3

    def epoch(self, number: int) -> Iterator[Batch]:
        return iter(self.all[:3])


def placement(agent: Any, batches: Any = None, dropout: float = 0.0, **options: Any) -> Placement:
    torch.manual_seed(0)
    network = StageCNN(1, 4, width=4)
    if dropout:
        network.stage3.append(nn.Dropout(dropout))
    batches = batches or Few()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    inserter = NonLocalInserter(network, batches.validation[0].x, optimizer=optimizer)
    probe = ActivationProbe(network, [stage.name for stage in inserter.stages])
    settings: dict[str, Any] = {"rate": lambda spent: 0.05, "epochs": 2, "explore_until": 1.0} | options
    return Placement(inserter, probe, agent, optimizer, batches, **settings)


def run(made: Placement, epochs: int = 2) -> Placement:
    while made.epoch < epochs:
        for _ in made.train_epoch():
            pass
    return made


def weights(made: Placement) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in made.network.state_dict().items()}


@pytest.mark.parametrize(
    ("decide", "stages"),
    [
        ("batch", ["none", "stage1", "stage2", "stage3"]),
        ("regime", ["none", "stage1", "stage2"]),
        ("epoch", ["none", "stage1"]),
    ],
)
def test_decisions_come_when_they_should_and_are_rewarded_later(decide: str, stages: list[str]) -> None:
    agent = Script([0, 1, 2, 3])
    made = run(placement(agent, decide=decide, rule=RewardRule(delay=2)))
    assert [each["stage"] for each in made.rewarded][: len(stages)] == stages
    assert made.step == 6
    expected = {"batch": 6 - 1, "regime": 3, "epoch": 2}[decide]
    assert len(agent.told) == len(made.rewarded) == expected
    assert all(reward == 0.0 for action, reward in agent.told if action == 0)
    for each, (action, reward) in zip(made.rewarded, agent.told, strict=True):
        assert reward == pytest.approx(each["after"] - each["without"])
        assert made.inserter.names[action] == each["stage"]


def test_at_the_end_nothing_is_tried_any_more() -> None:
    made = run(placement(Script([2]), explore_until=0.5, rule=RewardRule(delay=1)))
    assert [each["stage"] for each in made.rewarded] == ["stage2"] * 3 + ["stage1"] * 3


def test_without_control_the_reward_is_the_change_and_latency_has_its_price() -> None:
    agent = Script([0, 2])
    rule = RewardRule(metric="accuracy", delay=1, latency_price=0.5, control=False)
    made = run(placement(agent, rule=rule, added_latency=AddedLatency((0.0, 0.1, 0.2, 0.3))))
    for each, (action, reward) in zip(made.rewarded, agent.told, strict=True):
        assert reward == pytest.approx(each["after"] - each["before"] - 0.5 * 0.1 * action)


def test_a_judge_comes_from_the_regime_of_the_batch() -> None:
    made = placement(Script([1]))
    batches = made.validation
    run(made)
    assert {each["regime"] for each in made.rewarded} == {"clean", "noise"}
    assert [batch.regime for batch in batches] == ["noise", "clean", "noise"]


def test_a_bad_decision_is_taken_back_bit_for_bit() -> None:
    agent = Script([1, 2, 3])
    made = placement(agent, revert_below=float("1e9"), rule=RewardRule(delay=2))
    before = made.inserter.state_dict()
    steps = made.train_epoch()
    next(steps)
    next(steps)  # now the first decision is judged, taken back, and the second one forgotten
    after = made.inserter.state_dict()
    assert made.reverted == 1
    assert len(agent.told) == 1
    assert all(torch.equal(value, before["network"][name]) for name, value in after["network"].items())
    assert after["optimizer"]["state"] == before["optimizer"]["state"] == {}
    assert after["inserted"] == 0
    assert made.rewarded[0]["reverted"]
    run(made)
    assert made.step == 6


def test_rewards_do_not_hang_on_what_running_statistics_are_of() -> None:
    usual, fresh = placement(Script([1, 2, 3])), placement(Script([1, 2, 3]))
    for module in fresh.network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # running statistics stay at 0 and 1, which fit no stage at all
    run(usual)
    run(fresh)
    kept = ("stage", "before", "after", "without", "reward")
    assert [[each[key] for key in kept] for each in usual.rewarded] == [
        [each[key] for key in kept] for each in fresh.rewarded
    ]
    assert any(each["reward"] != 0.0 for each in usual.rewarded)
    one, other = weights(usual), weights(fresh)
    assert all(torch.equal(one[name], other[name]) for name in one if "running" not in name)
    assert not torch.equal(one["stage1.0.1.running_mean"], other["stage1.0.1.running_mean"])


def test_batch_statistics_leave_the_network_as_it_was() -> None:
    torch.manual_seed(0)
    frozen = nn.BatchNorm2d(3).eval()  # by its owner
    assert frozen.running_mean is not None
    frozen.running_mean.fill_(7.0)
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), frozen)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    x = 3 + torch.randn(16, 1, 6, 6)
    with observing(network, batch_statistics=True):
        seen = network(x)
    with observing(network):
        running = network(x)
    first = nn.functional.batch_norm(network[0](x), None, None, network[1].weight, network[1].bias, True)
    assert torch.allclose(seen, (first - 7.0) / (1 + network[3].eps) ** 0.5, atol=1e-6)
    assert not torch.allclose(seen, running, atol=0.1)
    assert [module.training for module in network.modules()] == modes
    assert all(module.track_running_stats for module in network if isinstance(module, nn.BatchNorm2d))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_one_sample_may_judge_although_it_has_no_statistics() -> None:
    network = nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 4),
    )  # fmt: skip
    some = Few().all
    batches = LoaderBatches(
        [(each.x, each.y) for each in some], [(some[0].x[:1], some[0].y[:1]), some[1]], CPU
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    inserter = NonLocalInserter(network, some[0].x, ["0"], optimizer=optimizer)
    with ActivationProbe(network, ["0"]) as probe:
        made = Placement(
            inserter, probe, Script([1]), optimizer, batches, rate=lambda spent: 0.05, epochs=2
        )  # fmt: skip
        run(made)
    assert len(made.rewarded) == 12 - 4 + 1


@pytest.mark.parametrize("agent", ["q-table", "dqn", "reinforce", "ppo"])
@pytest.mark.parametrize("stop", [2, 3, 4])
def test_a_stopped_procedure_goes_on_bit_for_bit(agent: str, stop: int, tmp_path: Any) -> None:
    def make() -> Placement:
        options = {"revert_below": 0.0} if agent == "q-table" else {}
        return placement(make_agent(agent, 15, 4, seed=3), dropout=0.3, rule=RewardRule(delay=2), **options)

    whole = run(make())
    stopped = make()
    while stopped.step < stop:
        for step in stopped.train_epoch():
            if step == stop:
                break
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    told = list(stopped.rewarded)
    again = make()
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    again.rewarded = told
    run(again)
    assert again.rewarded == whole.rewarded
    assert again.best == whole.best
    one, other = weights(again), weights(whole)
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_policy_is_validated_as_it_chooses() -> None:
    made = run(placement(FixedAgent(2, 4)))
    choices = made.choices()
    assert choices == [2, 2, 2]
    inserted = made.inserter.inserted
    right = made.validate(choices)
    assert made.inserter.inserted == inserted
    made.inserter.insert(2)
    made.network.eval()
    with torch.no_grad():
        by_hand = torch.cat([made.network(b.x).argmax(dim=1) == b.y for b in made.validation])
    assert torch.equal(right, by_hand.double())


def test_collapse_is_found() -> None:
    assert collapse_of([]) is None
    mixed = collapse_of([(step, step % 3) for step in range(60)])
    assert mixed is not None
    assert not mixed.collapsed
    stuck = collapse_of([(step, step % 3) for step in range(60)] + [(step, 1) for step in range(60, 100)])
    assert stuck is not None
    assert (stuck.collapsed, stuck.action, stuck.share) == (True, 1, 1.0)
    assert stuck.since == 60
    few = collapse_of([(0, 1), (1, 1)])
    assert few is not None
    assert not few.collapsed


def test_divergence_and_an_empty_loader_are_named() -> None:
    with pytest.raises(DataError, match=r"epoch 1, batch \d+.*lower the learning rate|NaN or infinite"):
        run(placement(Script([0, 1]), rate=lambda spent: 1e30))

    class Nothing(Few):
        def epoch(self, number: int) -> Iterator[Batch]:
            return iter(())

    with pytest.raises(DataError, match="yields nothing"):
        run(placement(Script([0]), Nothing()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"decide": "bach"}, "did you mean 'batch'"),
        ({"epochs": 0}, "epochs = 0"),
        ({"explore_until": 1.5}, "explore_until = 1.5"),
        ({"revert_below": float("nan")}, "revert_below = nan"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        placement(Script([0]), **options)
    assert says in str(raised.value)


def test_batches_of_a_task_are_the_same_every_time() -> None:
    data = DeviceData.of(digits(train_size=200), CPU)

    def make(*regimes: str) -> TaskBatches:
        return TaskBatches(data, Recipe(), ("shift",), regimes, validation_batch=32, seed=5)

    one, other = make("clean", "noise:0.5", "blur"), make("clean", "noise:0.5", "blur")
    batches = list(one.epoch(1))
    assert len(batches) == len(one) == 200 // 32
    for mine, yours in zip(batches, other.epoch(1), strict=True):
        assert torch.equal(mine.x, yours.x)
        assert mine.regime == yours.regime
    assert not torch.equal(batches[0].x, next(iter(one.epoch(2))).x)
    assert {batch.regime for batch in one.validation} == {"clean", "noise:0.5", "blur"}
    assert sum(len(batch.y) for batch in one.validation) == 3 * len(data.y_validation)
    with pytest.raises(ConfigError, match="give noise, blur"):
        make("fog")
    with pytest.raises(ConfigError, match="images alone"):
        list(make("fgsm").epoch(0))
    with pytest.raises(ConfigError, match="once"):
        make("clean", "clean")


def test_loaders_are_checked() -> None:
    x, y = torch.randn(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    batches = LoaderBatches([(x, y), (x, y, "night")], [(x, y)], CPU)
    assert [batch.regime for batch in batches.epoch(0)] == ["clean", "night"]
    with pytest.raises(DataError, match="training loader yields nothing"):
        LoaderBatches([], [(x, y)], CPU)
    with pytest.raises(DataError, match="validation loader yields nothing"):
        LoaderBatches([(x, y)], [], CPU)
    with pytest.raises(DataError, match="validation loader yields a Tensor"):
        LoaderBatches([(x, y)], [x], CPU)
    with pytest.raises(DataError, match="labels y"):
        LoaderBatches([(x, y)], [(x, y[:2])], CPU)
    with pytest.raises(ConfigError, match="no len"):
        LoaderBatches(iter([(x, y)]), [(x, y)], CPU)
