"""The trade-off of a search: which trials are on the front, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from ..search import MAXIMISED, SearchSpace, Trial, pareto_front

OBJECTIVES = ("accuracy", "latency_s", "parameters")


def front_of(trials: Sequence[Trial], objectives: Sequence[str] = ()) -> tuple[Trial, ...]:
    """The trials no other one beats in accuracy, latency and parameters, the most accurate first.

    ``objectives`` names other numbers of a measurement in their place.

    A number that no trial has does not count; a trial that lacks one that others have is left out.
    """
    done = [trial for trial in trials if trial.state == "complete"]
    names = objectives or OBJECTIVES
    values = np.array([[_signed(trial, name) for name in names] for trial in done], dtype=float)
    values = values.reshape(len(done), len(names))
    measured = values[:, ~np.isnan(values).all(axis=0)] if done else values
    front = [done[row] for row in pareto_front(measured)] if measured.size else []
    return tuple(sorted(front, key=lambda trial: -(trial.measurement.accuracy or 0.0)))


def front_table(
    trials: Sequence[Trial],
    space: SearchSpace,
    chosen: int | None = None,
    objectives: Sequence[str] = (),
) -> Table:
    """The front for a terminal; the chosen trial carries a star."""
    table = Table(title="Pareto front", title_justify="left")
    further = [name for name in objectives if name not in OBJECTIVES]
    for heading in ("trial", "accuracy %", "latency ms", "parameters", *further, "reward"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("network", overflow="fold")
    for trial in front_of(trials, objectives):
        m = trial.measurement
        table.add_row(
            f"{'* ' if trial.number == chosen else ''}{trial.number}",
            _cell(m.accuracy, 100, ".2f"),
            _cell(m.cost.latency_s, 1e3, ".3f"),
            _cell(m.parameters, 1, ",.0f"),
            *(_cell(m.value(name), 1, ".4g") for name in further),
            f"{trial.reward:.4f}",
            space.describe(trial.architecture),
        )
    return table


def save_front_picture(trials: Sequence[Trial], file: Path, chosen: int | None = None) -> None:
    """Draws every trial's accuracy over its latency (over its parameters where no latency is known).

    The worst tenth does not stretch the picture: what lies below is drawn on its lower edge.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    done = [t for t in trials if t.state == "complete" and t.measurement.accuracy is not None]
    timed = any(t.measurement.cost.latency_s for t in done)
    points = np.array([_position(t, timed) for t in done]).reshape(-1, 2)
    figure = Figure(figsize=(7, 4.8), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    if done:
        lowest = np.percentile(points[:, 1], 10) - 1
        below = points[:, 1] < lowest
        shown = np.stack([points[:, 0], np.maximum(points[:, 1], lowest)], axis=1)
        numbers = np.array([t.number for t in done])
        for rows, mark, label in ((~below, "o", "trial"), (below, "v", "trial, lower than drawn")):
            if rows.any():
                order = axes.scatter(
                    shown[rows, 0], shown[rows, 1], c=numbers[rows], vmin=0, vmax=numbers.max(),
                    cmap="viridis", marker=mark, s=28, label=label,
                )  # fmt: skip
        figure.colorbar(order, label="order of the trial")
        front = _staircase(points[np.lexsort((-points[:, 1], points[:, 0]))])
        axes.step(*front.T, where="post", color="tab:red", lw=1.2, label="best at or under this cost")
        star = points[numbers == chosen]
        axes.plot(*star.T, "*", color="tab:red", ms=15, label="chosen")
        figure.legend(loc="outside lower center", ncols=4, fontsize=8)
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        for formatter in (axes.xaxis.set_major_formatter, axes.xaxis.set_minor_formatter):
            formatter(StrMethodFormatter("{x:g}"))
    axes.set_xlabel("latency of one forward pass (ms)" if timed else "trainable parameters")
    axes.set_ylabel("validation accuracy (%)")
    axes.set_title(f"{len(done)} child networks, {len(trials) - len(done)} failed")
    axes.grid(alpha=0.3, which="both")
    partial = file.with_name(file.name + ".partial")
    figure.savefig(partial, format="png")
    partial.replace(file)


def _position(trial: Trial, timed: bool) -> tuple[float, float]:
    m = trial.measurement
    cost = (m.cost.latency_s or np.nan) * 1e3 if timed else m.parameters or np.nan
    return cost, 100 * (m.accuracy or 0.0)


def _staircase(points: np.ndarray) -> np.ndarray:
    """Of points in the order of their cost, those more accurate than all cheaper ones."""
    best = np.maximum.accumulate(points[:, 1])
    better = np.append(True, best[1:] > best[:-1])
    return np.vstack([points[better], [points[-1, 0], best[-1]]])


def _signed(trial: Trial, name: str) -> float:
    value = trial.measurement.value(name)
    return np.nan if value is None else value if name in MAXIMISED else -value


def _cell(value: float | None, scale: float, form: str) -> str:
    return "-" if value is None else format(value * scale, form)
