"""The trade-off of a search: which trials are on the front, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from ..search import SearchSpace, Trial, pareto_front

OBJECTIVES = (("accuracy", 1.0), ("latency_s", -1.0), ("parameters", -1.0))


def front_of(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials no other one beats in accuracy, latency and parameters, the most accurate first.

    A number that no trial has does not count; a trial that lacks one that others have is left out.
    """
    done = [trial for trial in trials if trial.state == "complete"]
    values = np.array(
        [[_signed(trial, name, sign) for name, sign in OBJECTIVES] for trial in done], dtype=float
    ).reshape(len(done), len(OBJECTIVES))
    measured = values[:, ~np.isnan(values).all(axis=0)] if done else values
    front = [done[row] for row in pareto_front(measured)] if measured.size else []
    return tuple(sorted(front, key=lambda trial: -(trial.measurement.accuracy or 0.0)))


def front_table(trials: Sequence[Trial], space: SearchSpace, chosen: int | None = None) -> Table:
    """The front for a terminal; the chosen trial carries a star."""
    table = Table(title="Pareto front", title_justify="left")
    for heading in ("trial", "accuracy %", "latency ms", "parameters", "reward"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("network", overflow="fold")
    for trial in front_of(trials):
        m = trial.measurement
        table.add_row(
            f"{'* ' if trial.number == chosen else ''}{trial.number}",
            _cell(m.accuracy, 100, ".2f"),
            _cell(m.cost.latency_s, 1e3, ".3f"),
            _cell(m.parameters, 1, ",.0f"),
            f"{trial.reward:.4f}",
            space.describe(trial.architecture),
        )
    return table


def save_front_picture(trials: Sequence[Trial], file: Path, chosen: int | None = None) -> None:
    """Draws every trial's accuracy over its latency (over its parameters where no latency is known)."""
    from matplotlib.figure import Figure

    done = [t for t in trials if t.state == "complete" and t.measurement.accuracy is not None]
    timed = any(t.measurement.cost.latency_s for t in done)

    def position(trial: Trial) -> tuple[float, float]:
        m = trial.measurement
        cost = (m.cost.latency_s or np.nan) * 1e3 if timed else m.parameters or np.nan
        return cost, 100 * (m.accuracy or np.nan)

    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if done:
        points = np.array([position(t) for t in done])
        order = axes.scatter(
            points[:, 0], points[:, 1], c=[t.number for t in done], cmap="viridis", s=28, label="trial"
        )
        figure.colorbar(order, label="order of the trial")
        front = np.array(sorted(position(t) for t in front_of(done)))
        axes.plot(*_staircase(front).T, color="tab:red", lw=1.2, label="best accuracy at or under this cost")
        axes.plot(
            *np.array([position(t) for t in done if t.number == chosen]).reshape(-1, 2).T,
            "*", color="tab:red", ms=15, label="chosen",
        )  # fmt: skip
        axes.legend(loc="lower right", fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("latency of one forward pass (ms)" if timed else "trainable parameters")
    axes.set_ylabel("validation accuracy (%)")
    axes.set_title(f"{len(done)} child networks, {len(trials) - len(done)} failed")
    axes.grid(alpha=0.3, which="both")
    partial = file.with_name(file.name + ".partial")
    figure.savefig(partial, format="png")
    partial.replace(file)


def _staircase(points: np.ndarray) -> np.ndarray:
    """The upper-left hull of points sorted by cost: only those more accurate than all cheaper ones."""
    best = np.maximum.accumulate(points[:, 1])
    return np.stack([points[:, 0], best], axis=1)


def _signed(trial: Trial, name: str, sign: float) -> float:
    value = trial.measurement.value(name)
    return np.nan if value is None else sign * value


def _cell(value: float | None, scale: float, form: str) -> str:
    return "-" if value is None else format(value * scale, form)
