import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlnas_fast import __version__
from rlnas_fast.cli import main

EXAMPLES = Path(__file__).parents[2] / "examples"
OWN = [
    "--space=own_parts:TwoLayers", "--task=own_parts:bits", "--evaluator=own_parts:LeastSquares",
    "--reward=own_parts:small_is_good", "--strategy=random",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_search_show_and_resume(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["search", *OWN, "--trials=4", "--out=run", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["trials"], summary["folder"]) == (4, "run")
    assert main(["resume", "run", "--trials=6"]) == 0
    assert "6 trials" in capsys.readouterr().out
    assert main(["show", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["trials"] == 6
    assert main(["show", "run"]) == 0
    shown = capsys.readouterr().out
    assert "Pareto front" in shown
    assert "Chosen: trial" in shown


def test_a_file_a_flag_and_set(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text('trials = 9\nseed = 4\n[strategy]\nname = "random"\n')
    arguments = [*OWN, "--config=own.toml", "--trials=3", "--set=batch_size=2", "--out=run"]
    assert main(["search", *arguments]) == 0
    config = (tmp_path / "run" / "config.toml").read_text()
    assert "trials = 3" in config
    assert "seed = 4" in config
    assert "batch_size = 2" in config
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["search", "--space=chain-cn"], "did you mean 'chain-cnn'"),
        (["search", "--strategy=reinforc"], "did you mean 'reinforce'"),
        (["search", "--trials=-3"], "trials = -3"),
        (["search", "--trials=x"], "--trials"),
        (["search", "--strategy=ppo", "--set=strategy.learning_rat=1"], "did you mean 'learning_rate'"),
        (["search", "--set=nonsense"], "KEY=VALUE"),
        (["search", "--classes=a,b"], "--classes"),
        (["search", "--task=npz"], "needs the option 'path'"),
        (["search", "--task=npz", "--data=missing.npz"], "missing.npz"),
        (["search", "--reward=constrained"], "needs the option 'limits'"),
        (["search", "--device=cuda:77"], "cuda:77"),
        (["search", "--max-latency-ms=0"], "max_latency_ms"),
        (["search", "--target-latency-ms=-1"], "target_latency_ms"),
        (["search", "--targets="], "--targets"),
        (["search", "--targets=1,-2"], "targets.1 = -2.0"),
        (["search", "--targets=2,2"], "give each once"),
        (["search", "--targets=1,2", "--strategy=evolution"], "cannot be told a target"),
        (["search", "--targets=1,2", "--target-latency-ms=1"], "give one of them"),
        (["search", "--targets=1,2", "--reward=soft"], "use adaptive"),
        (["search", "--objectives=accuracy"], "at least two"),
        (["search", "--objectives=accuracy,speed"], "unknown objective 'speed'"),
        (["search", "--objectives=accuracy,memory", "--device=cpu"], "peak_memory_bytes"),
        (["search", "--objectives=accuracy,latency", "--targets=1,2"], "give one of them"),
        (["search", "--strategy=sb3:pqo"], "unknown strategy 'sb3:pqo': did you mean 'sb3:ppo'"),
        (["search", "--strategy=ppo", "--set", "strategy.epsilon=a"], "start:end:trials"),  # no emoji
        (["search", "--config=missing.toml"], "missing.toml"),
        (["search", "--out=/proc/nowhere"], "/proc/nowhere"),
        (["search", "--no-such-flag"], "no-such-flag"),
        (["search", "--set=evaluator.name=tabular", "--data=no.npz", "--reward-column=a"], "no.npz"),
        (["search", "--trials=5", "--set=trials.x=3"], "trials.x"),
        (["search", "--strategy=.own:Thing"], "module:attribute"),
        (["resume", "missing"], "not a run folder"),
        (["show", "missing"], "not a run folder"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_resume_takes_no_trials_that_make_no_sense(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", *OWN, "--trials=3", "--out=run", "--json"]) == 0
    capsys.readouterr()
    for trials, says in (("0", "trials = 0"), ("2", "has 3 already")):
        assert main(["resume", "run", f"--trials={trials}"]) == 2
        assert says in capsys.readouterr().err


def test_square_brackets_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["search", *OWN, "--trials=2", "--out=a [run] b"]) == 0
    assert "Everything is in a [run] b" in capsys.readouterr().out
    assert main(["strategies"]) == 0
    assert "dict[str," in capsys.readouterr().out


def test_a_run_that_goes_on_is_not_shown_as_finished(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["search", *OWN, "--trials=3", "--out=run"]) == 0
    config = tmp_path / "run" / "config.toml"  # as `resume --trials 5` leaves it when it is interrupted
    config.write_text(config.read_text().replace("trials = 3", "trials = 5"))
    capsys.readouterr()
    assert main(["show", "run"]) == 0
    assert "3 of 5 trials; not finished" in capsys.readouterr().out
    assert main(["show", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stopped"] is None


def test_a_foreign_database_is_left_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["search", *OWN, "--trials=2", "--out=run"]) == 0
    (tmp_path / "run" / "trials.sqlite").write_bytes(b"not a database, whatever its name says")
    capsys.readouterr()
    assert main(["resume", "run"]) == 2
    assert "trials.sqlite" in capsys.readouterr().err
    assert (tmp_path / "run" / "trials.sqlite").read_bytes().startswith(b"not a database")


def bad_archives() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    x, y = rng.random((40, 8, 8), dtype=np.float32), np.arange(40) % 4
    good = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
    holes = x.copy()
    holes[0, 0, 0] = np.nan
    return {
        "y_test": {name: array for name, array in good.items() if name != "y_test"},
        "labels": good | {"y_train": y.astype(np.float32) + 0.5},
        "nan": good | {"x_train": holes},
        "class": good | {"y_train": np.zeros(40, dtype=np.int64), "y_test": np.zeros(40, dtype=np.int64)},
    }


@pytest.mark.parametrize("what", sorted(bad_archives()))
def test_bad_data_is_one_line(what: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **bad_archives()[what])  # type: ignore[arg-type]
    assert main(["search", "--task=npz", "--data=data.npz", "--out=run"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert what in message.lower()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["spaces", "strategies", "tasks", "rewards", "evaluators"])
def test_listings_name_everything(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([kind, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert rows
    assert all(row["name"] and row["what"] for row in rows)
    assert main([kind]) == 0


def test_doctor_answers_and_a_cpu_search_can_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    findings = {finding["what"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert findings["rlnas_fast"]["detail"] == __version__
    assert findings["CPU kernels"]["usable"]
    assert main(["doctor"]) == 0
    assert "A CPU search can run." in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__


def test_a_console_script_shows_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "rlnas_fast.cli", "search", "--space=none-such"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("rlnas: unknown space 'none-such'")
    assert done.stderr.count("\n") == 1
