"""The supernet: its paths, how it trains, and the table that an agent learns from."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rlnas_fast.errors import ConfigError, DataError
from rlnas_fast.networks import StageCNN
from rlnas_fast.placement.agents import make_agent
from rlnas_fast.placement.inserter import NonLocalInserter
from rlnas_fast.placement.supernet import (
    OutcomeTable,
    StageSupernet,
    best_actions,
    learn,
    outcome_table,
    train_supernet,
)
from rlnas_fast.search import Budget
from rlnas_fast.training.data import DeviceData
from rlnas_fast.training.recipe import Recipe

CPU = torch.device("cpu")
STAGES = ["stage1", "stage2", "stage3"]


@pytest.fixture
def network() -> StageCNN:
    network = StageCNN(1, 3, width=4)
    for _ in range(3):  # statistics that are not those of a new network
        network(2 + torch.randn(16, 1, 12, 12))
    return network


@pytest.fixture
def batch() -> Tensor:
    return torch.randn(8, 1, 12, 12)


def make_data() -> DeviceData:
    """Images whose class is the brighter of three rows."""
    y = torch.randint(3, (96,))
    x = torch.randn(96, 1, 12, 12)
    x[torch.arange(96), 0, 4 * y + 1] += 3
    zero, one = torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1)
    return DeviceData(x[:64], y[:64], x[64:], y[64:], zero, one)


def wake(supernet: StageSupernet) -> None:
    """New blocks are the identity; these do something."""
    for block in supernet.blocks:
        nn.init.ones_(block.W[1].weight)


def answers(supernet: StageSupernet, x: Tensor) -> list[Tensor]:
    supernet.eval()
    found = []
    with torch.no_grad():
        for action in range(len(supernet.names)):
            supernet.action = action
            found.append(supernet(x))
    return found


class TestPaths:
    def test_every_path_of_a_new_supernet_is_the_network(self, network: StageCNN, batch: Tensor) -> None:
        supernet = StageSupernet(network, batch, STAGES)
        network.eval()
        with torch.no_grad():
            expected = network(batch)
        for answer in answers(supernet, batch):
            torch.testing.assert_close(answer, expected)
        assert supernet.names == ("none", *STAGES)

    def test_a_path_is_the_network_with_that_block_inserted(self, network: StageCNN, batch: Tensor) -> None:
        supernet = StageSupernet(network, batch, STAGES, seed=3)
        wake(supernet)
        found = answers(supernet, batch)
        inserter = NonLocalInserter(network, batch, STAGES)
        for action in range(4):
            network.train()
            inserter.insert(action)
            if action:
                inserted = network.get_submodule(STAGES[action - 1]).inserted_block
                inserted.load_state_dict(supernet.blocks[action - 1].state_dict())
            network.eval()
            with torch.no_grad():
                torch.testing.assert_close(found[action], network(batch))
        assert len({round(float(answer.sum()), 5) for answer in found}) == 4

    def test_the_network_stays_as_it_was(self, network: StageCNN, batch: Tensor) -> None:
        before = copy.deepcopy(network.state_dict())
        supernet = StageSupernet(network, batch)
        train_supernet(supernet, make_data(), Recipe(batch_size=32), Budget(epochs=1), device=CPU, seed=0)
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert network.training
        assert all(not module._forward_hooks for module in network.modules())

    def test_a_copy_has_routes_of_its_own(self, network: StageCNN, batch: Tensor) -> None:
        supernet = StageSupernet(network, batch, STAGES)
        wake(supernet)
        other = copy.deepcopy(supernet)
        with torch.no_grad():
            for parameter in other.blocks.parameters():
                parameter.zero_()
        other.eval()
        other.action, supernet.action = 2, 0
        with torch.no_grad():
            expected = answers(other, batch)[0]
            other.action = 2
            torch.testing.assert_close(other(batch), expected)  # its block does nothing now
        assert supernet.action == 0

    def test_a_norm_is_shared_up_to_the_block_and_apart_behind_it(
        self, network: StageCNN, batch: Tensor
    ) -> None:
        supernet = StageSupernet(network, batch, STAGES)
        wake(supernet)
        before = copy.deepcopy(supernet.state_dict())
        supernet.train()
        supernet.action = 2
        supernet(batch)
        moved = {
            name.removeprefix("network.").removesuffix(".running_mean")
            for name, value in supernet.state_dict().items()
            if name.endswith("running_mean")
            and not name.startswith("blocks")
            and not torch.equal(value, before[name])
        }
        stages = {(name.partition(".")[0], name.rpartition(".")[2]) for name in moved}
        assert stages == {("stage1", "0"), ("stage2", "0"), ("stage3", "2")}

    def test_names_an_action_that_does_not_exist(self, network: StageCNN, batch: Tensor) -> None:
        supernet = StageSupernet(network, batch, STAGES)
        with pytest.raises(ConfigError, match="action = 4: there are 4"):
            supernet.action = 4

    def test_names_a_stage_that_does_not_exist(self, network: StageCNN, batch: Tensor) -> None:
        with pytest.raises(ConfigError, match="stage9"):
            StageSupernet(network, batch, ["stage9"])


class TestTraining:
    def test_frozen_only_the_blocks_learn(self, network: StageCNN, batch: Tensor) -> None:
        network.eval()
        with torch.no_grad():
            expected = network(batch)
        supernet = StageSupernet(network, batch, STAGES, freeze=True, seed=0)
        before = copy.deepcopy(supernet.state_dict())
        train_supernet(supernet, make_data(), Recipe(batch_size=32), Budget(epochs=4), device=CPU, seed=0)
        found = answers(supernet, batch)
        assert torch.equal(found[0], expected)
        assert not any(torch.equal(answer, expected) for answer in found[1:])
        after = supernet.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.split(".")[1] for name in changed} == {"0", "1", "2"}
        assert all(name.startswith("blocks") for name in changed)

    def test_unfrozen_every_path_learns(self, network: StageCNN) -> None:
        data = make_data()
        supernet = StageSupernet(network, data.x[:8], STAGES, seed=0)
        recipe = Recipe(batch_size=16, learning_rate=0.02)
        train_supernet(supernet, data, recipe, Budget(epochs=20), device=CPU, seed=0)
        for answer in answers(supernet, data.x):
            assert float((answer.argmax(1) == data.y).float().mean()) > 0.8

    def test_is_seeded(self, network: StageCNN, batch: Tensor) -> None:
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(5)
            data = make_data()
            supernet = StageSupernet(network, batch, STAGES, seed=0)
            train_supernet(supernet, data, Recipe(batch_size=32), Budget(epochs=1), device=CPU, seed=seed)
            found.append(answers(supernet, batch)[0])
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2])

    def test_draws_every_action_that_can_learn(self, network: StageCNN, batch: Tensor) -> None:
        generator = torch.Generator().manual_seed(0)
        for freeze, expected in ((False, {0, 1, 2, 3}), (True, {1, 2, 3})):
            supernet = StageSupernet(network, batch, STAGES, freeze=freeze)
            drawn = []
            for _ in range(300):
                supernet.draw(generator)
                drawn.append(supernet.action)
            assert set(drawn) == expected
            counts = torch.tensor(drawn).bincount(minlength=4)
            assert int(counts[1:].min()) > 0.6 * 300 / len(expected)

    def test_changes_training_batches_alone(self, network: StageCNN, batch: Tensor) -> None:
        sizes = []

        def change(x: Tensor, generator: torch.Generator) -> Tensor:
            sizes.append(len(x))
            return x

        supernet = StageSupernet(network, batch, STAGES)
        train_supernet(
            supernet, make_data(), Recipe(batch_size=32), Budget(epochs=2), device=CPU, seed=0, change=change
        )
        assert sizes == [32] * 4


class TestTable:
    def test_holds_what_each_path_gets_right(self, network: StageCNN) -> None:
        data = make_data()
        supernet = StageSupernet(network, data.x[:8], STAGES, seed=0)
        wake(supernet)
        samples = [(data.x[:32], data.y[:32], 0), (data.x[32:] + 1, data.y[32:], 1)]
        supernet.train()
        table = outcome_table(supernet, samples, ["stage1"])
        assert supernet.training
        assert all(module.training for module in supernet.modules())
        assert supernet.action == 0
        for row, (x, y, _) in enumerate(samples):
            for action, answer in enumerate(answers(supernet, x)):
                expected = float((answer.argmax(1) == y).float().mean())
                assert float(table.outcomes[row, action]) == pytest.approx(expected)
        assert table.states.shape == (2, 5)
        assert not torch.equal(table.states[0], table.states[1])
        assert table.groups.tolist() == [0, 1]

    def test_states_are_of_the_network_without_a_block(self, network: StageCNN) -> None:
        data = make_data()
        supernet = StageSupernet(network, data.x[:8], STAGES, seed=0)
        samples = [(data.x, data.y, 0)]
        before = outcome_table(supernet, samples, ["stage1"])
        wake(supernet)
        after = outcome_table(supernet, samples, ["stage1"])
        assert torch.equal(before.states, after.states)

    def test_says_that_nothing_came(self, network: StageCNN, batch: Tensor) -> None:
        with pytest.raises(DataError, match="no sample"):
            outcome_table(StageSupernet(network, batch, STAGES), [], ["stage1"])

    def test_regret_and_bests(self) -> None:
        outcomes = torch.tensor([[0.5, 0.7, 0.1], [0.5, 0.1, 0.6], [0.5, 0.9, 0.2], [0.5, 0.2, 0.3]])
        table = OutcomeTable(torch.zeros(4, 1), outcomes, torch.tensor([0, 1, 0, 1]))
        torch.testing.assert_close(table.regret(torch.tensor([1, 0, 0, 0])), torch.tensor([0, 0.1, 0.4, 0]))
        assert table.best_fixed() == 0
        assert table.best_by_group().tolist() == [1, 0, 1, 0]


def toy_table() -> OutcomeTable:
    """Two groups, told apart by the state, that want different actions."""
    groups = torch.arange(40) % 2
    states = groups[:, None] + 0.1 * torch.randn(40, 2)
    outcomes = torch.tensor([[0.5, 0.6, 0.4], [0.5, 0.4, 0.6]])[groups]
    return OutcomeTable(states, outcomes, groups)


class TestLearning:
    @pytest.mark.parametrize("name", ["q-table", "dqn", "reinforce", "ppo"])
    @pytest.mark.parametrize("delay", [0, 5])
    def test_an_agent_finds_the_best_of_each_group(self, name: str, delay: int) -> None:
        table = toy_table()
        agent = make_agent(name, 2, 3, seed=0)
        chosen, regret = learn(agent, table, decisions=400, seed=0, delay=delay)
        assert chosen.shape == regret.shape == (400,)
        assert float(regret[-100:].mean()) < float(regret[:100].mean())
        picked = best_actions(agent, table.states)
        assert float(table.regret(picked).mean()) < 0.02  # the best fixed action's is 0.1
        assert torch.equal(picked, best_actions(agent, table.states))

    @pytest.mark.parametrize("delay", [0, 7, 100])
    def test_tells_every_reward_once_and_late(self, delay: int) -> None:
        table = toy_table()
        told: list[tuple[int, int, float]] = []

        class Watcher:
            asked = 0

            def select(self, state: Tensor, *, explore: bool = True) -> int:
                self.asked += 1
                return self.asked % 3

            def update(self, state: Tensor, action: int, reward: float) -> None:
                told.append((self.asked, action, reward))

        learn(Watcher(), table, decisions=30, seed=0, delay=delay)  # type: ignore[arg-type]
        assert [action for _, action, _ in told] == [(n + 1) % 3 for n in range(30)]
        assert [asked for asked, _, _ in told] == [min(30, n + 1 + delay) for n in range(30)]
        assert all(reward == 0 for _, action, reward in told if action == 0)
        assert {round(abs(reward)) for _, action, reward in told if action} == {10}


def test_a_norm_used_twice_stays_one() -> None:
    norm = nn.BatchNorm2d(2)
    network = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), norm, nn.Conv2d(2, 2, 3, stride=2), norm)
    supernet = StageSupernet(network, torch.randn(2, 2, 8, 8), ["0"])
    assert supernet.network[1] is supernet.network[3]
    assert sum(isinstance(module, _BatchNorm) for module in supernet.network.modules()) == 2
