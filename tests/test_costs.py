from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import rlnas_fast as rf
from rlnas_fast import costs
from rlnas_fast.cli import main
from rlnas_fast.compose import build
from rlnas_fast.config import read_config
from rlnas_fast.errors import ConfigError, MeterError
from rlnas_fast.hardware.latency_table import LatencyTable
from rlnas_fast.search import Cost
from rlnas_fast.search.loop import _hopeless

SMALL: dict[str, Any] = {
    "space": {"name": "chain-cnn", "max_depth": 3},
    "strategy": "random",
    "device": "cpu",
    "trials": 5,
    "epochs": 1,
    "confirm": 1,
    "confirm_seeds": 1,
    "confirm_epochs": 1,
}


@pytest.fixture
def table_file(tmp_path: Path) -> Path:
    """A table for SMALL under which every operator takes 10 us, off by at most 10 %."""
    parts = build(read_config(SMALL))
    conditions = costs._conditions(parts.config, parts.space, "cpu")
    weights = {"constant": 0.0, "calls": 0.0, "": 1.0}
    LatencyTable(conditions, {}, {"": (1e-5, 0.0, 0.0)}, weights, 0.1, (1, 1)).save(tmp_path / "table.json")
    return tmp_path / "table.json"


class Flat:
    """Every architecture costs what its prefix sums to."""

    def __init__(self) -> None:
        self.errors = {"latency_s": 0.5}

    def estimate(self, prefix: tuple[int, ...]) -> dict[str, float]:
        return {"latency_s": float(sum(prefix)), "energy_j": 1e9}


def test_a_child_is_hopeless_only_where_the_error_cannot_explain_it() -> None:
    limits = {"latency_s": 2.0, "energy_j": 1.0}  # of energy the model states no error
    assert _hopeless((1, 2), Flat(), limits) is None
    found = _hopeless((1, 2, 1), Flat(), limits)
    assert found is not None
    assert "latency_s is estimated at 4 (+- 50%), the limit is 2" in str(found.failure)
    assert _hopeless((9, 9), None, limits) is None
    assert _hopeless((9, 9), Flat(), {"energy_j": 1.0}) is None
    assert not found.transient


def test_hopeless_children_are_not_trained_and_a_resume_says_the_same(
    table_file: Path, tmp_path: Path
) -> None:
    limit = {"max_params": 20000, "cost_model": str(table_file)}
    whole = rf.run(**SMALL | limit | {"trials": 8}, out=tmp_path / "whole")
    skipped = [t for t in whole.trials if (t.measurement.failure or "").startswith("not trained")]
    trained = [t for t in whole.trials if t.state == "complete"]
    assert skipped
    assert trained
    assert all("parameters is estimated at" in str(t.measurement.failure) for t in skipped)
    assert all(t.seconds == 0 and t.reward == whole.trials[skipped[0].number].reward for t in skipped)
    assert all((t.measurement.parameters or 0) <= 20000 for t in trained)

    half = rf.run(**SMALL | limit | {"trials": 4, "batch_size": 4}, out=tmp_path / "half")
    table_file.unlink()  # a run keeps its own copy
    config = (tmp_path / "half" / "config.toml").read_text()
    (tmp_path / "half" / "config.toml").write_text(config.replace("trials = 4", "trials = 8"))
    resumed = rf.resume_run(tmp_path / "half")
    assert [t.measurement.failure for t in resumed.trials[:4]] == [t.measurement.failure for t in half.trials]
    assert len(resumed.trials) == 8


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"threads": 2}, "device threads 1, here it is 2"),
        ({"space": {"name": "chain-cnn", "max_depth": 4}}, "was made for space"),
        ({"evaluator": {"name": "train-child", "latency_batch": 8}}, "batch 1, here it is 8"),
        ({"recipe": {"dtype": "bfloat16"}}, "float32"),
    ],
)
def test_a_table_for_something_else_is_refused(settings: dict[str, Any], says: str, table_file: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        build(read_config(SMALL | {"cost_model": str(table_file)} | settings))


def test_a_table_of_another_device_is_refused_in_one_line(
    table_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads(table_file.read_text())
    record["conditions"]["device"]["name"] = "Another CPU"
    table_file.write_text(json.dumps(record))
    assert main(["search", "--space=chain-cnn", "--set=space.max_depth=3", f"--cost-model={table_file}"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "Another CPU" in message
    assert "rlnas profile" in message


@pytest.mark.parametrize("option", ["--target-latency-ms=1e-6", "--max-latency-ms=1e-6"])
def test_a_latency_below_the_cheapest_network_is_refused(
    option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["search", option, "--device=cpu", f"--out={tmp_path / 'run'}"]) == 2
    message = capsys.readouterr().err
    assert "the cheapest network of chain-cnn takes" in message
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_energy_that_cannot_be_measured_here_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from rlnas_fast.hardware.rapl import RaplBoard

    monkeypatch.setitem(RaplBoard.__init__.__kwdefaults__, "powercap", tmp_path)
    with pytest.raises(
        MeterError, match=r"energy cannot be measured on cpu: .* leave out what asks"
    ) as error:
        build(read_config(SMALL | {"max_energy_mj": 5.0}))
    assert "\n" not in str(error.value)


def test_several_limits_at_once() -> None:
    config = read_config({"max_energy_mj": 2.0, "max_params": 1e4, "max_flops": 1e6, "max_latency_ms": 3.0})
    assert config.limits == pytest.approx(
        {"latency_s": 3e-3, "energy_j": 2e-3, "parameters": 1e4, "flops": 1e6}
    )


def test_profile_from_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Instant:
        def measure(self, call: Any) -> Cost:
            call()
            return Cost(latency_s=1e-4)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(costs, "meter_for", lambda device: Instant())
    monkeypatch.setattr(costs, "quick_meter", lambda device: Instant())
    assert main(["profile", "chain-cnn", "--device=cpu", "--set=space.max_depth=3", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["table"] == "chain-cnn-cpu.json"
    assert summary["networks_held_out"] >= 20
    config = read_config(SMALL | {"cost_model": "chain-cnn-cpu.json"})
    table = build(config).cost_model
    assert isinstance(table, LatencyTable)
    assert table.errors["latency_s"] == summary["error"]


def test_profile_refuses_what_it_cannot_do(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, says in (
        (["no-such-space"], "no-such-space"),
        (["chain-cnn", "--device=cuda:97"], "cuda:97"),
        (["chain-cnn", "--device=cpu", f"--out={tmp_path / 'no' / 'x.json'}"], "there is no folder"),
    ):
        assert main(["profile", *arguments]) == 2
        message = capsys.readouterr().err
        assert says in message
        assert message.count("\n") == 1
