from pathlib import Path

import numpy as np
import pytest

from rlnas_fast import compose
from rlnas_fast.components import Component
from rlnas_fast.config import SearchConfig, read_config
from rlnas_fast.errors import ConfigError
from rlnas_fast.search import SearchContext


@pytest.mark.parametrize("value", ["nan", "inf", float("nan"), float("-inf")])
def test_an_option_is_a_finite_number(value: object) -> None:
    config = read_config({"strategy.name": "reinforce", "strategy.temperature": value})
    with pytest.raises(ConfigError, match=r"temperature = .*: give a finite number"):
        compose.build(config)


def test_a_target_needs_a_reward_with_a_target() -> None:
    with pytest.raises(ConfigError, match="takes no target"):
        compose.build(read_config({"reward": "accuracy", "target_latency_ms": 1.0}))


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "mps"])
def test_a_device_that_is_not_here_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        compose.resolve_device(name)


def test_the_reward_follows_what_is_measured(tmp_path: Path) -> None:
    assert compose.build(read_config({})).config.reward == Component(name="soft")
    table = write_table(tmp_path / "table.npz")
    without = read_config({**TABLE, "evaluator.data": str(table)})
    assert compose.build(without).config.reward == Component(name="accuracy")
    timed = read_config({**TABLE, "evaluator.data": str(table), "evaluator.latency_column": "latency"})
    assert compose.build(timed).config.reward == Component(name="soft")
    with pytest.raises(ConfigError, match="the reward needs 'latency_s'"):
        compose.build(read_config({**TABLE, "evaluator.data": str(table), "reward": "hard"}))


def test_workers_and_limits_choose_the_executor() -> None:
    from rlnas_fast.executors.process_pool import ProcessPool
    from rlnas_fast.executors.serial import Serial

    assert isinstance(compose.build(read_config({})).executor, Serial)
    assert isinstance(compose.build(read_config({"workers": 2})).executor, ProcessPool)
    assert isinstance(compose.build(read_config({"child_timeout_seconds": 9.0})).executor, ProcessPool)
    with pytest.raises(ConfigError, match=r"devices.*name each one once"):
        compose.build(read_config({"devices": ["cpu", "cpu"]}))
    with pytest.raises(ConfigError, match="each device has one worker"):
        read_config({"devices": ["cpu", "cuda:0"], "workers": 3})


TABLE = {
    "space": "nasbench-macro",
    "evaluator": "tabular",
    "evaluator.reward_column": "mean_acc",
}


def write_table(file: Path) -> Path:
    rng = np.random.default_rng(0)
    choices = np.stack(np.meshgrid(*[np.arange(3)] * 8, indexing="ij"), axis=-1).reshape(-1, 8)
    np.savez(
        file, choices=choices, mean_acc=90 + rng.random(len(choices)), latency=1 + rng.random(len(choices))
    )
    return file


def table_search(tmp_path: Path, **settings: object) -> SearchConfig:
    """A search of a table, which needs neither data nor training."""
    cells = np.indices((5,) * 6).reshape(6, -1).T
    np.savez(tmp_path / "table.npz", ops=cells, valid=np.arange(len(cells)))
    options = {"name": "tabular", "data": str(tmp_path / "table.npz"), "reward_column": "valid"}
    return read_config({"space": "cell-201", "evaluator": options, **settings})


def test_an_exploration_surrounds_the_strategy(tmp_path: Path) -> None:
    config = table_search(
        tmp_path, strategy="random", **{"exploration": "curriculum", "exploration.open": "0.4:1:90"}
    )
    asked = compose.build(config).strategy.ask(4, SearchContext())
    assert max(max(a.choices) for a in asked) <= 1  # of 0 to 4
    assert SearchConfig.model_validate(config.model_dump(mode="json", exclude_none=True)) == config


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"exploration": "curiculum"}, "unknown exploration 'curiculum': did you mean 'curriculum'"),
        ({"exploration": "curriculum", "exploration.open": "0.5"}, "a curriculum ends with 1"),
        ({"exploration": "bandit", "strategy": "bandit"}, "it is one already"),
        ({"exploration": "bandit", "exploration.epsilon": 1.5}, "epsilon = 1.5: give numbers from 0 to 1"),
        ({"strategy": "evolution", "strategy.epsilon": 0.1}, "has no 'epsilon'; these have: reinforce, ppo"),
        ({"strategy": "local-search", "strategy.entropy_weight": 1}, "has no 'entropy_weight'; these have: "),
        ({"strategy": "reinforce", "strategy.epsilon": "0.5:0.1"}, "epsilon = 0.5:0.1: write a number, "),
        ({"strategy": "ppo", "strategy.entropy_weight": "-1:0:9"}, "entropy_weight = -1:0:9: give numbers"),
    ],
)
def test_exploration_that_makes_no_sense_is_one_line(
    tmp_path: Path, settings: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        compose.build(table_search(tmp_path, **settings))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_exploration_needs_a_strategy_that_can_be_made_for_it(tmp_path: Path) -> None:
    config = table_search(tmp_path, exploration="curriculum")
    made = compose.build(table_search(tmp_path)).strategy
    with pytest.raises(ConfigError, match="give a class or a name, not an object"):
        compose.build(config, {"strategy": made})
