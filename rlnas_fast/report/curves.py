"""Learning curves of many searches: means with intervals, paired differences, as CSV and as a picture."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..search.archives import replace_file

_Z = 1.959964  # of the normal distribution, two-sided, 95 %


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval: float [n] or [n, k], over the first axis.

    One value alone has no interval: its half width is NaN.
    """
    if len(values) < 2:
        return float(values.mean()), float("nan")
    return float(values.mean()), float(_Z * values.std(ddof=1) / len(values) ** 0.5)


def paired(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """``interval`` of ours - theirs, seed by seed, over as many seeds as both have: float [n], [m]."""
    seeds = min(len(ours), len(theirs))
    return interval(ours[:seeds] - theirs[:seeds])


def write_curves(path: Path, curves: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """One line for each table, strategy and trial: mean, and the ends of its interval.

    Args:
        curves: by table and strategy, float [seeds, trials].
    """
    rows = []
    for table, found in curves.items():
        for strategy, scores in found.items():
            for trial, column in enumerate(scores.T, start=1):
                mean, half = interval(column)
                rows.append((table, strategy, trial, mean, mean - half, mean + half, len(column)))
    write_csv(path, ("table", "strategy", "evaluations", "mean", "low", "high", "seeds"), rows)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes all of the file or, if the process dies, none of it; floats with six significant digits."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(
                [f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows
            )

    replace_file(path, write)


def draw_curves(path: Path, curves: Mapping[str, Mapping[str, np.ndarray]], score: str) -> None:
    """One panel a table: mean score after each evaluation, with its 95 % interval as a band.

    Args:
        path: a .png.
        curves: by table and strategy, float [seeds, trials].
        score: what the vertical axis is.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for found in curves.values() for name in found))
    figure = Figure(figsize=(1.6 + 4.4 * len(curves), 4.4), layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for panel, (table, found) in zip(panels, curves.items(), strict=True):
        for name, scores in found.items():
            number = names.index(name)
            color, style = f"C{number % 10}", ("-", "--", ":", "-.")[number // 10 % 4]
            mean = scores.mean(axis=0)
            at = np.arange(1, len(mean) + 1)
            panel.plot(at, mean, style, color=color, label=name, linewidth=1.4)
            if len(scores) > 1:
                half = _Z * scores.std(axis=0, ddof=1) / len(scores) ** 0.5
                panel.fill_between(at, mean - half, mean + half, color=color, alpha=0.18, linewidth=0)
        shown = np.concatenate([scores.mean(axis=0)[len(scores[0]) // 10 :] for scores in found.values()])
        room = 0.05 * (shown.max() - shown.min()) or 1.0
        panel.set_ylim(shown.min() - room, shown.max() + room)  # the first trials are luck and would fill it
        panel.set_title(table, fontsize=10)
        panel.set_xlabel("distinct evaluations")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel(score)
    panels[-1].legend(fontsize=8, loc="lower right")
    FigureCanvasAgg(figure)
    replace_file(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
