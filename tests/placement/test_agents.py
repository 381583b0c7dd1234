"""What every agent keeps to, and what each does by itself."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlnas_fast.errors import ConfigError, DataError, ShapeError
from rlnas_fast.placement.agents import AGENTS, QTableAgent, StageAgent, make_agent

FEATURES, ACTIONS, KINDS = 5, 4, 3
# Rewards of each action in each of three kinds of state; the best fixed action is worth 0.5 on average.
WORTH = torch.tensor([[0.5, 0.0, 1.0, 0.0], [0.5, 1.0, 0.0, 0.0], [0.5, 0.0, 0.0, 1.0]])
CENTRES = torch.tensor([[1.0, 0.0, 0.0, 20.0, 0.0], [0.0, 2.0, 0.0, 10.0, 0.0], [0.0, 0.0, 0.5, 15.0, 0.0]])


def state_of(kind: int, generator: torch.Generator) -> torch.Tensor:
    """Features on different scales, one of them constant."""
    noise = torch.randn(FEATURES, generator=generator) * torch.tensor([0.1, 0.1, 0.05, 0.5, 0.0])
    return CENTRES[kind] + noise


def play(agent: StageAgent, decisions: int, *, seed: int = 0, delay: int = 3) -> list[int]:
    """Learns from noisy rewards that come ``delay`` decisions late; what was chosen."""
    generator = torch.Generator().manual_seed(seed)
    chosen: list[int] = []
    waiting: list[tuple[torch.Tensor, int, float]] = []
    for _ in range(decisions):
        kind = int(torch.randint(KINDS, (), generator=generator))
        state = state_of(kind, generator)
        action = agent.select(state)
        chosen.append(action)
        noise = 0.3 * float(torch.randn((), generator=generator))
        waiting.append((state, action, 50 + float(WORTH[kind, action]) + noise))
        if len(waiting) > delay:
            agent.update(*waiting.pop(0))
    return chosen


def read_back(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a run that was killed has it."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.fixture(params=sorted(AGENTS))
def make(request: pytest.FixtureRequest) -> Callable[..., StageAgent]:
    return lambda seed=0, **options: make_agent(request.param, FEATURES, ACTIONS, seed=seed, **options)


class TestContract:
    def test_learns_which_action_suits_which_state(self, make: Callable[..., StageAgent]) -> None:
        agent = make()
        play(agent, 900)
        generator = torch.Generator().manual_seed(99)
        kinds = [kind for kind in range(KINDS) for _ in range(50)]
        gained = [
            float(WORTH[kind, agent.select(state_of(kind, generator), explore=False)]) for kind in kinds
        ]
        assert sum(gained) / len(gained) > 0.9  # the best fixed action has 0.5, the best of all 1

    def test_goes_on_bit_for_bit(self, make: Callable[..., StageAgent]) -> None:
        agent, other = make(), make(seed=5)
        play(agent, 101)
        other.load_state_dict(read_back(agent.state_dict()))
        assert play(agent, 60, seed=1) == play(other, 60, seed=1)
        state = state_of(0, torch.Generator().manual_seed(2))
        assert torch.equal(agent.probabilities(state), other.probabilities(state))

    def test_a_saved_state_does_not_change_with_the_agent(self, make: Callable[..., StageAgent]) -> None:
        agent, other = make(), make(seed=5)
        play(agent, 70)
        state = state_of(1, torch.Generator().manual_seed(2))
        kept, before = agent.state_dict(), agent.probabilities(state)
        play(agent, 70, seed=1)
        other.load_state_dict(kept)
        play(agent, 70, seed=2)
        assert torch.equal(other.probabilities(state), before)

    def test_same_seed_same_choices(self, make: Callable[..., StageAgent]) -> None:
        assert play(make(seed=3), 80) == play(make(seed=3), 80)
        assert play(make(seed=3), 80) != play(make(seed=4), 80)

    def test_starts_without_an_opinion(self, make: Callable[..., StageAgent]) -> None:
        probabilities = make().probabilities(torch.zeros(FEATURES))
        torch.testing.assert_close(probabilities, torch.full((ACTIONS,), 1 / ACTIONS))

    def test_draws_by_its_probabilities(self, make: Callable[..., StageAgent]) -> None:
        agent = make()
        play(agent, 40)
        state = state_of(2, torch.Generator().manual_seed(0))
        drawn = torch.tensor([agent.select(state) for _ in range(2000)]).bincount(minlength=ACTIONS) / 2000
        expected = agent.probabilities(state)
        assert float(expected.sum()) == pytest.approx(1, abs=1e-5)
        # five standard deviations of a frequency among 2000
        assert float((drawn - expected).abs().max()) < 5 * 0.5 / 2000**0.5

    def test_exploration_ends_and_choices_do_not_change_what_is_known(
        self, make: Callable[..., StageAgent]
    ) -> None:
        agent = make(epsilon="1:0:20")
        play(agent, 400)
        state = state_of(0, torch.Generator().manual_seed(0))
        before = agent.probabilities(state)
        best = {agent.select(state, explore=False) for _ in range(20)}
        assert len(best) == 1
        assert int(before.argmax()) in best
        assert torch.equal(agent.probabilities(state), before)

    def test_epsilon_one_is_uniform(self, make: Callable[..., StageAgent]) -> None:
        agent = make(epsilon=1.0)
        play(agent, 100)
        probabilities = agent.probabilities(state_of(0, torch.Generator().manual_seed(0)))
        torch.testing.assert_close(probabilities, torch.full((ACTIONS,), 1 / ACTIONS))

    def test_a_reward_of_any_scale(self, make: Callable[..., StageAgent]) -> None:
        agent = make()
        generator = torch.Generator().manual_seed(0)
        for _ in range(400):
            state = state_of(0, generator)
            action = agent.select(state)
            agent.update(state, action, 1e6 + 1e3 * float(WORTH[0, action]))
        assert agent.select(state_of(0, generator), explore=False) == 2

    def test_leaves_torch_as_it_was(self, make: Callable[..., StageAgent]) -> None:
        random = torch.get_rng_state()
        torch.set_num_threads(2)
        with torch.no_grad():  # a training loop may call it from anywhere
            play(make(), 60)
            assert not torch.is_grad_enabled()
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), random)

    @pytest.mark.parametrize("shape", [(), (FEATURES - 1,), (1, FEATURES)])
    def test_names_a_state_of_another_shape(
        self, make: Callable[..., StageAgent], shape: tuple[int, ...]
    ) -> None:
        with pytest.raises(ShapeError, match=r"expected \[5\]"):
            make().select(torch.zeros(shape))
        with pytest.raises(ShapeError, match=r"expected \[5\]"):
            make().update(torch.zeros(shape), 0, 0.0)

    def test_names_what_is_not_finite(self, make: Callable[..., StageAgent]) -> None:
        agent, state = make(), torch.zeros(FEATURES)
        before = agent.probabilities(state)
        state[3] = torch.nan
        with pytest.raises(DataError, match="feature 3 is nan"):
            agent.select(state)
        with pytest.raises(DataError, match="feature 3"):
            agent.update(state, 0, 0.0)
        with pytest.raises(DataError, match="reward = inf for action 1"):
            agent.update(torch.zeros(FEATURES), 1, float("inf"))
        assert torch.equal(agent.probabilities(torch.zeros(FEATURES)), before)

    @pytest.mark.parametrize("action", [-1, ACTIONS])
    def test_names_an_action_that_does_not_exist(self, make: Callable[..., StageAgent], action: int) -> None:
        with pytest.raises(ConfigError, match=f"action = {action}: there are 4"):
            make().update(torch.zeros(FEATURES), action, 0.0)

    def test_names_a_state_dict_of_another_agent(self, make: Callable[..., StageAgent]) -> None:
        for name in AGENTS:
            stranger = make_agent(name, FEATURES + 1, ACTIONS, seed=0)
            with pytest.raises(ConfigError, match="state of an"):
                make().load_state_dict(stranger.state_dict())

    def test_names_options_that_do_not_exist_or_make_no_sense(self, make: Callable[..., StageAgent]) -> None:
        with pytest.raises(ConfigError, match="did you mean 'epsilon'"):
            make(epsilom=0.1)
        with pytest.raises(ConfigError, match="epsilon = 2"):
            make(epsilon=2)
        with pytest.raises(ConfigError, match="learning_rate = 0"):
            make(learning_rate=0)


def test_names_an_agent_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match="did you mean 'dqn'"):
        make_agent("dqm", 3, 2, seed=0)
    with pytest.raises(ConfigError, match="actions = 1"):
        make_agent("dqn", 3, 1, seed=0)


def test_a_table_tries_every_action_of_a_row_first() -> None:
    agent = QTableAgent(2, 3, seed=0, epsilon=0.0)
    state = torch.tensor([1.0, 2.0])
    tried = []
    for _ in range(3):
        action = agent.select(state)
        agent.update(state, action, 1.0)
        tried.append(action)
    assert sorted(tried) == [0, 1, 2]


@settings(max_examples=30, deadline=None)
@given(rewards=st.lists(st.floats(-100, 100), min_size=1, max_size=40))
def test_a_table_holds_the_mean_of_what_it_was_told(rewards: list[float]) -> None:
    agent = QTableAgent(1, 2, seed=0, learning_rate=0.02)  # the mean of up to 50 rewards, then moving
    for reward in rewards:
        agent.update(torch.zeros(1), 1, reward)
    value = agent.state_dict()["values"][0, 1]
    assert float(value) == pytest.approx(sum(rewards) / len(rewards), abs=1e-9)


def test_a_table_has_no_more_rows_than_it_may() -> None:
    agent = QTableAgent(3, 2, seed=0, rows=4, radius=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        agent.update(torch.randn(3, generator=generator), 0, 1.0)
    assert agent.state_dict()["founded"] == 4
