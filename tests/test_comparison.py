"""Strategies compared on a table small enough to know everything about."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlnas_fast.comparison import Plan, TableSource, code_of, compare, search, table_of
from rlnas_fast.components import Component, find
from rlnas_fast.errors import ConfigError, DataError
from rlnas_fast.strategies.random import RandomSearch

CHOICES = np.array(list(itertools.product(range(3), repeat=8)), dtype=np.uint8)
MACRO = Component(name="nasbench-macro")


@pytest.fixture
def source(tmp_path: Path) -> TableSource:
    """A table in which the reward counts the largest blocks and the score is the reward minus 1."""
    path = tmp_path / "table.npz"
    reward = 50.0 + (CHOICES == 2).sum(axis=1)
    holes = np.where(reward > 51, reward, np.nan)
    np.savez(
        path, choices=CHOICES, valid=reward, test=reward - 1, flat=np.full(len(reward), 3.0), holes=holes
    )
    return TableSource("small", path, "valid", "test", MACRO)


def plan(source: TableSource, name: str, seeds: int = 7, **options: Any) -> Plan:
    return Plan(source, Component(name=name, options=options), seeds, 12)


def test_the_table_is_the_file(source: TableSource) -> None:
    table = table_of(source)
    assert len(table.reward) == len(CHOICES)
    assert 1000 < table.size < len(CHOICES)  # identities may stand anywhere within a stage
    assert table.reward[(2,) * 8] == pytest.approx(58)
    assert table.score[(0,) * 8] == pytest.approx(49)


def test_the_score_is_that_of_the_best_reward_so_far(source: TableSource) -> None:
    table = table_of(source)
    scores, seconds = search(RandomSearch(table.space, seed=3), table, 30)
    again, asked = RandomSearch(table.space, seed=3), []
    for _ in range(30):
        asked += again.ask(1, None)  # type: ignore[arg-type]
    np.testing.assert_allclose(scores, np.maximum.accumulate([table.reward[a.choices] for a in asked]) - 1)
    assert seconds >= 0


def test_noise_is_on_the_reward_and_the_same_for_everyone(source: TableSource) -> None:
    table = table_of(source)
    noisy = search(RandomSearch(table.space, seed=3), table, 200, noise=50.0, seed=1)[0]
    assert (noisy == search(RandomSearch(table.space, seed=3), table, 200, noise=50.0, seed=1)[0]).all()
    assert (np.diff(noisy) < 0).any()  # a worse architecture was picked
    assert set(noisy) <= set(table.score.values())


def test_pieces_are_kept_and_not_run_again(source: TableSource, tmp_path: Path) -> None:
    plans = [plan(source, "random"), plan(source, "evolution", population=5)]
    pieces, told = tmp_path / "pieces", []
    first = compare(plans, pieces=pieces, on_piece=lambda done, total: told.append((done, total)))
    assert told == [(done, 4) for done in range(5)]
    assert [s.scores.shape for s in first] == [(7, 12)] * 2
    assert (first[0].evaluations == 12).all()

    written = {file: file.stat().st_mtime_ns for file in pieces.iterdir()}
    again = compare(plans, pieces=pieces)
    assert {file: file.stat().st_mtime_ns for file in pieces.iterdir()} == written
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.scores, other.scores)


def test_a_longer_comparison_runs_only_what_is_missing(source: TableSource, tmp_path: Path) -> None:
    short = compare([plan(source, "random", seeds=5)], pieces=tmp_path / "pieces")
    told: list[int] = []
    long = compare(
        [plan(source, "random", seeds=10)],
        pieces=tmp_path / "pieces",
        on_piece=lambda done, total: told.append(done),
    )
    assert told == [1, 2]
    np.testing.assert_array_equal(short[0].scores, long[0].scores[:5])


@pytest.mark.parametrize(
    "change", [{"trials": 13}, {"noise": 0.1}, {"strategy": Component(name="random", options={})}]
)
def test_pieces_of_another_plan_are_others(
    source: TableSource, tmp_path: Path, change: dict[str, Any]
) -> None:
    one = plan(source, "evolution", seeds=5)
    compare([one], pieces=tmp_path)
    before = len(list(tmp_path.glob("*.npz")))
    compare([replace(one, **change)], pieces=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == before + 1


def test_two_processes_find_what_one_finds(source: TableSource, tmp_path: Path) -> None:
    plans = [plan(source, "random"), plan(source, "local-search")]
    one = compare(plans, pieces=tmp_path / "one")
    two = compare(plans, pieces=tmp_path / "two", jobs=2)
    for alone, together in zip(one, two, strict=True):
        np.testing.assert_array_equal(alone.scores, together.scores)


def test_a_budget_above_the_size_of_the_space_ends_early(tmp_path: Path) -> None:
    path = tmp_path / "one.npz"
    np.savez(path, choices=CHOICES, valid=np.arange(len(CHOICES)))
    source = TableSource("t", path, "valid", "valid", MACRO)
    (found,) = compare([Plan(source, Component(name="random"), 1, 6600)], pieces=tmp_path)
    size = table_of(source).size
    assert found.evaluations.tolist() == [size]
    assert found.scores.shape == (1, 6600)
    assert (found.scores[0, size:] == found.scores[0, size - 1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds = 0"),
        ({"trials": 0}, "budget = 0"),
        ({"noise": -1.0}, "noise = -1"),
        ({"strategy": Component(name="evolutio")}, "did you mean 'evolution'"),
        ({"strategy": Component(name="evolution", options={"sample": 99})}, "sample = 99"),
    ],
)
def test_a_plan_that_cannot_be_run_is_one_clear_error(
    source: TableSource, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        compare([replace(plan(source, "random"), **change)], pieces=tmp_path / "pieces")
    assert not (tmp_path / "pieces").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": "vali"}, "no column 'vali'"),
        ({"score": "holes"}, "'holes' is unknown in"),
        ({"reward": "flat"}, "'flat' is 3 in every row"),
        ({"space": Component(name="cell-201")}, "not a table of space 'cell-201'"),
        ({"data": Path("nowhere.npz")}, "nowhere.npz"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_clear_error(
    source: TableSource, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        compare([plan(replace(source, **change), "random")], pieces=tmp_path / "pieces")


def test_the_hash_of_a_part_covers_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    random, evolution = (find("strategy", name) for name in ("random", "evolution"))
    before = {part: code_of(part) for part in (random, evolution)}
    read = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path) + (b"#" if path.name == "moves.py" else b"")
    )
    code_of.cache_clear()
    assert code_of(random) == before[random]
    assert code_of(evolution) != before[evolution]
    code_of.cache_clear()
