"""The study of chains, on digits and with tiny schedules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlnas_fast.cli import main
from rlnas_fast.errors import ConfigError, DataError, RunError
from rlnas_fast.experiments.metaqnn import SliceOver, Study, epsilon_steps, run_study, study
from rlnas_fast.rl.schedules import schedule

DIGITS: dict[str, Any] = {
    "task": "digits", "episodes": 6, "epochs": 1, "train_size": 200, "final_train_size": 200,
    "final_epochs": 1, "networks_at_random": 2,
}  # fmt: skip


def tiny(strategy: str = "ppo", penalty: bool = False, **changes: Any) -> Study:
    return study(
        "mnist3", strategy=strategy, penalty=penalty, schedule="reduced", changes=DIGITS | changes,
        generate=3, space={"max_depth": 3}, device="cpu",
    )  # fmt: skip


def without_folder(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name != "folder"}


@pytest.mark.parametrize("strategy", ["q-learning", "ppo", "sb3:maskable-ppo"])
def test_a_study_reports_what_was_generated_and_leaves_pictures(strategy: str, tmp_path: Path) -> None:
    summary = run_study(tiny(strategy, penalty=True), tmp_path)
    assert json.loads((tmp_path / "metaqnn.json").read_text()) == summary
    assert summary["episodes"] == 6
    assert summary["task"] == "digits"
    generated, chance = summary["generated"], summary["random"]
    assert len(generated["accuracies"]) == 3
    assert len(chance["accuracies"]) == 2
    assert 1 <= generated["distinct"] <= 3
    assert 1 <= generated["depth"] <= 3
    assert 0 < generated["test_accuracy"] <= 1
    assert generated["test_accuracy"] == pytest.approx(sum(generated["accuracies"]) / 3)
    assert summary["gain"]["low"] <= summary["gain"]["mean"] <= summary["gain"]["high"]
    for picture in ("network.png", "learning.png"):
        assert (tmp_path / picture).read_bytes()[:4] == b"\x89PNG"


def test_slices_add_up_to_an_undisturbed_study(tmp_path: Path) -> None:
    settings = tiny()
    whole = run_study(settings, tmp_path / "whole")
    for _ in range(7):  # 3 batches of the search, 5 networks after it
        with pytest.raises(SliceOver, match="the same command goes on"):
            run_study(settings, tmp_path / "sliced", max_minutes=1e-6)
    again = run_study(settings, tmp_path / "sliced", max_minutes=1e-6)
    assert without_folder(again) == without_folder(whole)


@pytest.mark.slow
def test_two_workers_come_to_the_same(tmp_path: Path) -> None:
    serial = run_study(tiny(networks_at_random=0), tmp_path / "serial")
    parallel = run_study(replace(tiny(networks_at_random=0), workers=2), tmp_path / "parallel")
    assert without_folder(parallel) == without_folder(serial)


def test_a_folder_keeps_its_settings(tmp_path: Path) -> None:
    with pytest.raises(SliceOver):
        run_study(tiny(), tmp_path, max_minutes=1e-6)
    with pytest.raises(RunError, match="other settings"):
        run_study(tiny(episodes=7), tmp_path)


def test_rewards_are_never_the_test_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlnas_fast.tasks.task import Task

    read: list[int] = []
    original = Task.test_split
    monkeypatch.setattr(Task, "test_split", lambda self: read.append(1) or original(self))
    with pytest.raises(SliceOver, match="episodes are done"):
        run_study(tiny(), tmp_path, max_minutes=1e-6)
    assert not read


def test_epsilons_share_out_the_episodes() -> None:
    published = schedule("epsilon", epsilon_steps(2700))
    values = [published.at(trial) for trial in (0, 1399, 1400, 1599, 1600, 1750, 1900, 2100, 2699)]
    assert values == [1, 1, 0.8, 0.8, 0.6, 0.4, 0.2, 0.1, 0.1]
    short = schedule("epsilon", epsilon_steps(60))
    assert (short.at(0), short.at(59)) == (1, 0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist4"], "unknown data of the experiment: 'mnist4': did you mean 'mnist3'"),
        (["--strategy", "sb3:ppo"], "unknown strategy of the experiment:"),
        (["--schedule", "short"], "unknown schedule of the experiment: 'short'"),
        (["--episodes", "0"], "episodes = 0: give at least 1"),
        (["--classes", "a,b"], "--classes a,b: write whole numbers"),
        (["--task", "digits", "--classes", "3,17"], "digits has no class 17: its classes are 0 to 9"),
        (["--task", "nothing"], "unknown task 'nothing'"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", "metaqnn", "--out", str(tmp_path / "new"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_command_prints_the_published_figures_beside_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["experiment", "metaqnn", "--schedule", "reduced", "--strategy", "ppo", "--generate", "2"]
    for name, value in DIGITS.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "2 generated" in text
    assert "99.63" in text
    assert "Gain over random networks" in text


def test_classes_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no class 11"):
        run_study(tiny(classes=(1, 11)), tmp_path)
    with pytest.raises(ConfigError, match="generate = 0"):
        study("mnist3", generate=0)
    assert replace(tiny(), seed=1) != tiny()
