"""Compares strategies on a table, and makes tables from what others publish."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table as Grid

from ..comparison import Plan, Searches, TableSource, compare, table_of
from ..components import Component
from ..errors import ConfigError
from ..report.curves import draw_curves, interval, paired, write_csv, write_curves
from ..search.archives import replace_file
from .screen import Screen

Found = Mapping[str, Mapping[str, Searches]]


def bench_tabular(
    *,
    data: Path,
    columns: Sequence[str],
    space: Component,
    strategies: str,
    budget: int,
    seeds: int,
    noise: float,
    jobs: int,
    out: Path,
    as_json: bool,
) -> None:
    """Runs the comparison and writes curves.csv, differences.csv, curves.png and summary.json to ``out``."""
    named = {text: component(text) for text in strategies.split(",") if text}
    if not named:
        raise ConfigError("--strategies names none: give e.g. random,local-search,model-based")
    sources = [_source(data, pair, space) for pair in columns]
    plans = [Plan(s, c, seeds, budget, noise) for s in sources for c in named.values()]
    with Screen(quiet=as_json) as screen:
        for source in sources:
            size = table_of(source).size
            if budget > size:
                screen.note(
                    f"the space has {size} architectures: searches end after {size} of {budget} evaluations"
                )
        results = iter(compare(plans, pieces=out / "pieces", jobs=jobs, on_piece=screen.piece))
    found = {source.name: {name: next(results) for name in named} for source in sources}
    write_results(out, found, budget)
    if as_json:
        print((out / "summary.json").read_text(), end="")
    else:
        _print(found, budget)
        Console(emoji=False, markup=False).print(
            f"curves.csv, differences.csv, curves.png and summary.json are in {out}", highlight=False
        )


def nats_bench_table(source: Path, table: Path) -> None:
    """Imports NATS-Bench and says what the table holds."""
    from ..evaluators.nats_bench import import_nats_bench
    from ..spaces.cell_201 import OPERATIONS

    with Screen(quiet=False) as screen:
        columns = import_nats_bench(source, table, OPERATIONS, screen.piece)
    Console(emoji=False, markup=False).print(f"{table}: {', '.join(columns)}", highlight=False)


def component(text: str) -> Component:
    """NAME or NAME+OPTION=VALUE+...; a value is read as TOML, and as plain text where it is not."""
    name, *options = text.split("+")
    settings: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise ConfigError(f"strategy {text!r}: write NAME+OPTION=VALUE, e.g. model-based+patience=0")
        try:
            settings[key] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            settings[key] = value
    return Component(name=name, options=settings)


def write_results(out: Path, found: Found, budget: int) -> None:
    """Writes what a comparison found, each file all or not at all."""
    scores = {table: {name: s.scores for name, s in by.items()} for table, by in found.items()}
    write_curves(out / "curves.csv", scores)
    write_csv(
        out / "differences.csv",
        ("table", "evaluations", "strategy", "minus", "mean", "low", "high", "seeds"),
        (
            (table, at, one, other, mean, mean - half, mean + half, len(by[one].scores))
            for table, by in found.items()
            for at in marks(budget)
            for one in by
            for other in by
            if one != other
            for mean, half in [paired(by[one].scores[:, at - 1], by[other].scores[:, at - 1])]
        ),
    )
    draw_curves(out / "curves.png", scores, "score of the pick, %")
    summary = json.dumps(summarise(found, budget), indent=2) + "\n"
    replace_file(out / "summary.json", lambda temporary: temporary.write_text(summary))


def summarise(found: Found, budget: int) -> dict[str, Any]:
    """By table and strategy: mean scores at a few budgets, seconds a search, evaluations made."""
    return {
        table: {
            name: {
                "score": {str(at): interval(s.scores[:, at - 1])[0] for at in marks(budget)},
                "half_width": {str(at): _finite(interval(s.scores[:, at - 1])[1]) for at in marks(budget)},
                "seconds_a_search": float(np.median(s.seconds)),
                "evaluations": int(s.evaluations.max()),
                "seeds": len(s.scores),
            }
            for name, s in by.items()
        }
        for table, by in found.items()
    }


def marks(budget: int) -> tuple[int, ...]:
    """The evaluations at which strategies are compared: thirds of the budget, and the whole of it."""
    return tuple(sorted({max(1, budget // 3), max(1, 2 * budget // 3), budget}))


def _source(data: Path, pair: str, space: Component) -> TableSource:
    reward, comma, score = pair.partition(",")
    if not reward or (comma and not score):
        raise ConfigError(f"--columns {pair}: write REWARD,SCORE, or one column that is both")
    return TableSource(pair, data, reward, score or reward, space)


def _print(found: Found, budget: int) -> None:
    at = marks(budget)
    for table, by in found.items():
        grid = Grid("strategy", *(f"{mark} evaluations" for mark in at), "CPU s a search", title=table)
        for name, searches in by.items():
            cells = ["{:.3f} ± {:.3f}".format(*interval(searches.scores[:, mark - 1])) for mark in at]
            grid.add_row(name, *cells, f"{np.median(searches.seconds):.3f}")
        Console(emoji=False, markup=False).print(grid)
        first = next(iter(by))
        for other in list(by)[1:]:
            mean, half = paired(by[first].scores[:, -1], by[other].scores[:, -1])
            Console(emoji=False, markup=False).print(
                f"{first} - {other} at {budget}: {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]",
                highlight=False,
            )


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
