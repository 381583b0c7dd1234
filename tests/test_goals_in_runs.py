"""Targets and objectives through a whole run: what it ends with, says, and repeats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlnas_fast as rf
from rlnas_fast.cli.show import print_result
from rlnas_fast.errors import ConfigError
from rlnas_fast.runs import resume_run
from rlnas_fast.search import Architecture, Cost, Decision, Measurement, Request


class Stack:
    """Five decisions of four widths."""

    name = "stack"
    decisions = tuple(Decision(f"d{i}", ("1", "2", "3", "4")) for i in range(5))

    def mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        return np.ones(4, dtype=bool)

    def is_complete(self, prefix: tuple[int, ...]) -> bool:
        return len(prefix) == 5

    def canonical_key(self, architecture: Architecture) -> str:
        return str(architecture.choices)

    def describe(self, architecture: Architecture) -> str:
        return " ".join(map(str, architecture.choices))


class Formula:
    """Wider is more accurate and slower, from 1 ms."""

    def identity(self) -> dict[str, str]:
        return {"evaluator": "formula"}

    def provides(self) -> tuple[str, ...]:
        return ("accuracy", "latency_s")

    def evaluate(self, request: Request) -> Measurement:
        total = sum(request.architecture.choices)
        accuracy = 0.5 + 0.02 * total + 0.05 * request.architecture.choices[0]
        return Measurement(accuracy=accuracy, cost=Cost(latency_s=1e-3 * float(np.exp(0.2 * total))))


def search(out: Path, **settings: Any) -> rf.RunResult:
    return rf.run(space=Stack(), evaluator=Formula(), trials=48, batch_size=4, out=out, **settings)


def test_a_target_is_met(tmp_path: Path) -> None:
    result = search(tmp_path / "run", target_latency_ms=3.0)
    assert result.best is not None
    assert result.best.measurement.cost.latency_s is not None
    assert result.best.measurement.cost.latency_s <= 3e-3
    assert result.best.measurement.accuracy == pytest.approx(0.5 + 0.02 * 5 + 0.05 * 3)
    config = (tmp_path / "run" / "config.toml").read_text()
    assert 'name = "adaptive"' in config
    assert 'name = "composite"' in config


def test_a_target_out_of_reach_is_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = search(tmp_path / "run", target_latency_ms=0.5)
    assert result.best is None
    assert result.summary["nearest_to_limits"]["latency_s"] == pytest.approx(1e-3)
    print_result(result)
    assert "No network was found that keeps latency_s <= 0.0005" in capsys.readouterr().out


@pytest.mark.parametrize("strategy", ["composite", "reinforce", "ppo"])
def test_one_search_ends_with_a_pick_for_each_target(
    strategy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = search(tmp_path / "run", targets=(3.0, 4.0, 8.0, 0.5), strategy=strategy)
    picks = result.summary["picks"]
    assert [round(1e3 * pick["limits"]["latency_s"], 6) for pick in picks] == [8.0, 4.0, 3.0, 0.5]
    for pick in picks[:3]:
        assert pick["network"]["latency_s"] <= pick["limits"]["latency_s"]
        assert json.loads((tmp_path / "run" / pick["file"]).read_text())["trial"] == pick["network"]["trial"]
    assert picks[3]["network"] is None
    assert result.best is not None
    assert result.best.number == picks[0]["network"]["trial"]
    print_result(result)
    shown = capsys.readouterr().out
    assert "best-4ms.json" in shown
    assert "none was found" in shown


def test_targets_of_another_cost_are_named_after_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Counted(Formula):
        def provides(self) -> tuple[str, ...]:
            return ("accuracy", "parameters")

        def evaluate(self, request: Request) -> Measurement:
            total = sum(request.architecture.choices)
            return Measurement(accuracy=0.5 + 0.02 * total, parameters=10 + total)

    reward = {"name": "adaptive", "cost": "parameters", "targets": (14.0, 18.0)}
    result = rf.run(space=Stack(), evaluator=Counted(), trials=24, reward=reward, out=tmp_path / "run")
    print_result(result)
    assert "parameters <= 14: trial" in capsys.readouterr().out
    files = [pick["file"] for pick in result.summary["picks"]]
    assert files == ["best.json", "best-parameters-14.json"]
    assert all((tmp_path / "run" / file).is_file() for file in files)


def test_objectives_keep_a_front_and_its_volume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = search(tmp_path / "run", objectives=("accuracy", "latency"))
    figures = list(result.summary["hypervolume"].values())
    assert figures == sorted(figures)
    assert figures[-1] > figures[0] > 0
    assert result.best is not None
    assert result.best.number in [trial.number for trial in result.pareto]
    print_result(result)
    assert "Hypervolume by trials" in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{"targets": (2.0, 4.0)}, {"objectives": ("accuracy", "latency")}])
def test_a_resumed_run_repeats_itself(settings: dict[str, Any], tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", **settings)
    rf.run(space=Stack(), evaluator=Formula(), trials=20, batch_size=4, out=tmp_path / "part", **settings)
    config = tmp_path / "part" / "config.toml"
    config.write_text(config.read_text().replace("trials = 20", "trials = 48"))
    again = resume_run(tmp_path / "part", space=Stack(), evaluator=Formula())
    assert [(t.key, t.reward) for t in again.trials] == [(t.key, t.reward) for t in whole.trials]


def test_an_objective_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="energy_j"):
        search(tmp_path / "run", objectives=("accuracy", "energy"))
    assert not (tmp_path / "run").exists()
