import importlib.util
import json
import sqlite3
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rlnas_fast as rf
from rlnas_fast.errors import ConfigError, ReplayMismatch, RunError
from rlnas_fast.runs import RunResult, resume
from rlnas_fast.search import Measurement, Request

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_parts.py"


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The example of one's own parts, importable by name and with runs/ in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    specification = importlib.util.spec_from_file_location("own_parts", EXAMPLE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    monkeypatch.setitem(sys.modules, "own_parts", module)
    specification.loader.exec_module(module)
    return module


def parts(own: ModuleType) -> dict[str, object]:
    return {
        "space": own.TwoLayers,
        "task": own.bits(),
        "evaluator": own.LeastSquares,
        "reward": own.small_is_good,
    }


def outcome(result: RunResult) -> list[tuple[object, ...]]:
    return [(t.number, t.batch, t.architecture, t.reward) for t in result.trials]


def test_objects_and_module_names_give_the_same_search(own: ModuleType, tmp_path: Path) -> None:
    by_object = rf.run(**parts(own), strategy="random", trials=9, seed=1, out=tmp_path / "a")
    by_name = rf.run(
        space="own_parts:TwoLayers",
        task="own_parts:bits",
        evaluator="own_parts:LeastSquares",
        reward="own_parts:small_is_good",
        strategy="random",
        trials=9,
        seed=1,
        out=tmp_path / "b",
    )
    assert outcome(by_object) == outcome(by_name)
    assert len({t.key for t in by_object.trials}) == 9
    assert by_object.best is not None
    assert by_object.best.reward == max(t.reward for t in by_object.trials)
    assert by_object.test_accuracy is None
    for name in ("trials.sqlite", "config.toml", "best.json", "pareto.png", "summary.json"):
        assert (tmp_path / "a" / name).is_file()


def test_a_space_that_is_exhausted_ends_the_search_early(own: ModuleType) -> None:
    result = rf.run(**parts(own), strategy="random", trials=50)
    assert len(result.trials) == 9
    assert result.summary["stopped"] == "space"


class Stops(Exception):
    pass


def test_an_interrupted_run_resumes_to_the_same_end(own: ModuleType, tmp_path: Path) -> None:
    whole = rf.run(**parts(own), strategy="reinforce", trials=9, batch_size=3, out=tmp_path / "whole")

    class Interrupted(own.LeastSquares):  # type: ignore[name-defined, misc]
        count = 0

        def evaluate(self, request: Request) -> Measurement:
            Interrupted.count += 1
            if Interrupted.count == 6:
                raise KeyboardInterrupt
            return super().evaluate(request)

    settings = parts(own) | {"evaluator": Interrupted}
    with pytest.raises(KeyboardInterrupt):
        rf.run(**settings, strategy="reinforce", trials=9, batch_size=3, out=tmp_path / "cut")
    before = Interrupted.count
    cut = rf.resume_run(tmp_path / "cut", **settings)
    assert outcome(cut) == outcome(whole)
    assert Interrupted.count - before == 9 - 5  # five children were done and none was done again


def test_what_is_resumed_without_its_own_object_says_which(own: ModuleType, tmp_path: Path) -> None:
    rf.run(**parts(own), strategy="random", trials=2, out=tmp_path / "run")
    without = {name: part for name, part in parts(own).items() if name != "evaluator"}
    with pytest.raises(RunError, match=r"evaluator = object LeastSquares.*evaluator=\.\.\."):
        rf.resume_run(tmp_path / "run", **without)


def test_fewer_trials_than_there_are_is_refused_and_changes_nothing(own: ModuleType, tmp_path: Path) -> None:
    rf.run(**parts(own), strategy="random", trials=4, out=tmp_path / "run")
    before = (tmp_path / "run" / "config.toml").read_text()
    with pytest.raises(ConfigError, match=r"trials = 3: .* has 4 already"):
        resume(tmp_path / "run", objects=parts(own), settings={"trials": 3})
    assert (tmp_path / "run" / "config.toml").read_text() == before


def test_a_winner_stays_until_the_next_one_is_known(own: ModuleType, tmp_path: Path) -> None:
    class Trained(own.LeastSquares):  # type: ignore[name-defined, misc]
        fails = False

        def train(self, request: Request) -> tuple[torch.nn.Module, Measurement]:
            if Trained.fails:
                raise KeyboardInterrupt
            return torch.nn.Linear(2, 2), self.evaluate(request)

        def test_accuracy(self, module: torch.nn.Module) -> float:
            return 0.5

    folder, settings = tmp_path / "run", parts(own) | {"evaluator": Trained}
    rf.run(**settings, strategy="random", trials=2, out=folder)
    before = {file.name: file.read_bytes() for file in folder.glob("best*")}
    assert sorted(before) == ["best.json", "best.safetensors"]
    Trained.fails = True
    with pytest.raises(KeyboardInterrupt):
        resume(folder, objects=settings, settings={"trials": 5})
    assert {file.name: file.read_bytes() for file in folder.glob("best*")} == before


def test_a_log_that_the_strategy_does_not_repeat_is_refused_or_told(own: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    rf.run(**parts(own), strategy="random", trials=4, batch_size=2, out=folder)
    config = folder / "config.toml"
    config.write_text(config.read_text().replace("seed = 0", "seed = 5").replace("trials = 4", "trials = 6"))
    with pytest.raises(ReplayMismatch, match=r"trial 0: .* --continue-from-log"):
        rf.resume_run(folder, **parts(own))
    result = rf.resume_run(folder, continue_from_log=True, **parts(own))
    assert len({t.key for t in result.trials}) == 6


def test_limits_choose_among_what_keeps_them_or_say_so(own: ModuleType) -> None:
    small = rf.run(**parts(own), strategy="random", trials=9, max_params=16)
    assert small.best is not None
    assert (small.best.measurement.parameters or 99) <= 16
    none = rf.run(**parts(own), strategy="random", trials=9, max_params=2, seed=1)
    assert none.best is None
    assert none.summary["nearest_to_limits"] == {"parameters": 4}
    assert not (none.folder / "best.json").exists()


def test_a_folder_in_use_is_refused(own: ModuleType, tmp_path: Path) -> None:
    rf.run(**parts(own), strategy="random", trials=2, out=tmp_path / "run")
    with pytest.raises(RunError, match="rlnas resume"):
        rf.run(**parts(own), strategy="random", trials=2, out=tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        rf.run(**parts(own), strategy="random", trials=2, out=tmp_path / "full")
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "config.toml.partial").write_text("tri")
    assert rf.run(**parts(own), strategy="random", trials=2, out=tmp_path / "killed").best is not None
    with pytest.raises(RunError, match="not a run folder"):
        rf.resume_run(tmp_path / "full")
    with pytest.raises(RunError, match="no winner"):
        rf.load_child(tmp_path / "full")


def test_an_object_that_lacks_a_method_is_named(own: ModuleType) -> None:
    class Half:
        def evaluate(self, request: Request) -> Measurement:
            raise AssertionError

    with pytest.raises(ConfigError, match="evaluator Half lacks identity"):
        rf.run(**(parts(own) | {"evaluator": Half()}), trials=2)


def test_a_real_search_trains_confirms_and_gives_the_network_back(tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    result = rf.run(
        space={"name": "chain-cnn", "max_depth": 2}, trials=3, batch_size=3, epochs=1, confirm=1, out=folder
    )
    assert result.best is not None
    assert result.test_accuracy is not None
    assert all(t.measurement.cost.latency_s for t in result.trials if t.state == "complete")
    child = rf.load_child(folder)
    with torch.no_grad():
        assert child(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    best = json.loads((folder / "best.json").read_text())
    assert best["test_accuracy"] == result.test_accuracy
    connection = sqlite3.connect(folder / "trials.sqlite")
    assert connection.execute("SELECT count(*) FROM trials").fetchone() == (3,)
    connection.close()
