from pathlib import Path

import pytest

from rlnas_fast.components import Component
from rlnas_fast.config import SearchConfig, read_config
from rlnas_fast.errors import ConfigError


def test_later_sources_win_and_short_names_mean_tables(tmp_path: Path) -> None:
    file = tmp_path / "search.toml"
    file.write_text('trials = 5\nseed = 3\nspace = "chain-cnn"\n[strategy]\nname = "random"\n')
    config = read_config({"trials": 7, "space.attention": True, "strategy": "reinforce"}, file)
    assert (config.trials, config.seed) == (7, 3)
    assert config.space == Component(name="chain-cnn", options={"attention": True})
    assert config.strategy == Component(name="reinforce")


def test_a_saved_configuration_reads_back_the_same() -> None:
    config = SearchConfig.model_validate({"task": {"name": "npz", "path": "x.npz"}, "max_params": 1e5})
    assert SearchConfig.model_validate(config.model_dump(mode="json", exclude_none=True)) == config


def test_options_of_a_flag_join_those_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "search.toml"
    file.write_text('[task]\nname = "npz"\npath = "a.npz"\n')
    config = read_config({"task.path": "b.npz", "task": "npz"}, file)
    assert config.task == Component(name="npz", options={"path": "b.npz"})


def test_limits_carry_units() -> None:
    config = SearchConfig(max_latency_ms=2.0, max_params=1e5)
    assert config.limits == pytest.approx({"latency_s": 2e-3, "parameters": 1e5})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"trails": 5}, "unknown setting 'trails': did you mean 'trials'?"),
        ({"trials": -1}, "trials = -1: Input should be greater than or equal to 1"),
        ({"trials": "many"}, "trials = 'many'"),
        ({"max_latency_ms": float("nan")}, "max_latency_ms"),
        ({"target_latency_ms": 3.0, "max_latency_ms": 2.0}, "is above max_latency_ms = 2.0"),
        ({"durability": "some"}, "durability = 'some'"),
        ({"seed": -1}, "seed = -1"),
        ({"trials": 5, "trials.x": 3}, "trials.x = 3: trials = 5 is no table"),
        ({"strategy.options": 3}, "strategy.options = 3"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_config(settings)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_file_that_is_not_toml_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("trials = = 3\n")
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*bad\.toml"):
        read_config({}, file)
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        read_config({}, tmp_path / "missing.toml")
