"""``rlnas bench``: what it writes, and what it says of bad input."""

from __future__ import annotations

import csv
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from rlnas_fast.cli import main

CHOICES = np.array(list(itertools.product(range(3), repeat=8)), dtype=np.uint8)
TABULAR = ["bench", "tabular", "--space=nasbench-macro", "--data=table.npz", "--out=out"]
SMALL = ["--budget=9", "--seeds=3"]


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    reward = 50.0 + (CHOICES == 2).sum(axis=1)
    np.savez(
        tmp_path / "table.npz",
        choices=CHOICES,
        valid=reward,
        test=reward - 1,
        flat=np.full(len(reward), 93.0),
        holes=np.where(reward > 51, reward, np.nan),
    )


def test_curves_differences_picture_and_summary(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [*TABULAR, *SMALL, "--columns=valid,test", "--strategies=random,evolution+population=4"]
    assert main(arguments) == 0
    assert "random - evolution+population=4 at 9" in capsys.readouterr().out
    with (tmp_path / "out" / "differences.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3
    assert float(rows[0]["low"]) <= float(rows[0]["mean"]) <= float(rows[0]["high"])
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")
    before = (tmp_path / "out" / "curves.csv").read_text()
    assert main([*arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["valid,test"]["random"]["seeds"] == 3
    assert summary["valid,test"]["random"]["evaluations"] == 9
    assert (tmp_path / "out" / "curves.csv").read_text() == before


def test_a_budget_above_the_size_of_the_space_ends_early_and_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cells = np.array(list(itertools.product(range(5), repeat=6)), dtype=np.uint8)
    np.savez(tmp_path / "table.npz", ops=cells, valid=np.arange(len(cells)))
    arguments = ["bench", "tabular", "--data=table.npz", "--columns=valid", "--strategies=random"]
    assert main([*arguments, "--budget=16000", "--seeds=1", "--set=space.distinct=cells", "--json"]) == 0
    captured = capsys.readouterr()
    assert "searches end after 15625 of 16000 evaluations" in captured.err
    assert json.loads(captured.out)["valid"]["random"]["evaluations"] == 15625


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--columns=vali"], "no column 'vali'"),
        (["--columns=valid,holes"], "'holes' is unknown in"),
        (["--columns=flat"], "'flat' is 93 in every row"),
        (["--columns=valid,"], "REWARD,SCORE"),
        (["--columns=valid", "--space=cell-201"], "not a table of space 'cell-201'"),
        (["--columns=valid", "--strategies=evolutio"], "did you mean 'evolution'"),
        (["--columns=valid", "--strategies=evolution+epsilon=0.1"], "has no 'epsilon'; these have:"),
        (["--columns=valid", "--strategies=evolution+sample"], "NAME+OPTION=VALUE"),
        (["--columns=valid", "--strategies=,"], "names none"),
        (["--columns=valid", "--budget=0"], "budget = 0"),
        (["--columns=valid", "--set=strategy.x=1"], "only the space has settings"),
        (["--columns=valid", "--data=nowhere.npz"], "nowhere.npz"),
        ([], "--columns"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*TABULAR, *SMALL, *arguments]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_importing_without_the_package_or_the_file_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "import-nats-bench", "nowhere", "new.npz"]) == 2
    assert "no NATS-Bench at nowhere" in capsys.readouterr().err
