"""Learning curves: intervals by hand, files all at once, and a picture that is one."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rlnas_fast.report.curves import draw_curves, interval, paired, write_csv, write_curves


def curves(seeds: int = 6, trials: int = 30) -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        table: {
            name: np.maximum.accumulate(90 + rng.standard_normal((seeds, trials)), axis=1)
            for name in ("random", "other")
        }
        for table in ("one", "two")
    }


def test_interval_is_that_of_the_normal_distribution() -> None:
    values = np.random.default_rng(1).standard_normal(50)
    mean, half = interval(values)
    low, high = stats.norm.interval(0.95, loc=values.mean(), scale=stats.sem(values))
    assert mean - half == pytest.approx(low)
    assert mean + half == pytest.approx(high)
    assert math.isnan(interval(values[:1])[1])


def test_differences_are_paired_by_seed() -> None:
    ours, theirs = np.array([1.0, 5.0, 9.0]), np.array([0.5, 4.5, 8.5, 100.0])
    assert paired(ours, theirs) == (0.5, 0.0)


def test_csv_has_a_line_for_every_evaluation(tmp_path: Path) -> None:
    found = curves()
    write_curves(tmp_path / "new" / "curves.csv", found)
    with (tmp_path / "new" / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 30
    last = next(r for r in rows if (r["table"], r["strategy"], r["evaluations"]) == ("two", "other", "30"))
    mean, half = interval(found["two"]["other"][:, 29])
    assert [float(last[end]) for end in ("mean", "low", "high")] == pytest.approx(
        [mean, mean - half, mean + half], rel=1e-5
    )
    assert last["seeds"] == "6"


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path: Path) -> None:
    write_csv(tmp_path / "table.csv", ("a",), [(1,)])
    before = (tmp_path / "table.csv").read_text()
    with pytest.raises(TypeError):
        write_csv(tmp_path / "table.csv", ("a",), [(1,), 5])  # type: ignore[list-item]
    assert (tmp_path / "table.csv").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("seeds", [1, 6])
def test_the_picture_is_a_picture(tmp_path: Path, seeds: int) -> None:
    from matplotlib.image import imread

    draw_curves(tmp_path / "curves.png", curves(seeds), "%")
    assert imread(tmp_path / "curves.png").std() > 0.05
