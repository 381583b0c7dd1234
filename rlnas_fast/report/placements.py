"""Which stage was chosen when in a placement run, and what its block did: figures and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..search.archives import replace_file
from .curves import interval


def gain_of(right: np.ndarray, without: np.ndarray) -> dict[str, float]:
    """Accuracy gained over the network without a block, with the 95 % interval of the paired differences.

    Args:
        right: float [N], 1 for each image that the network with the block has right.
        without: likewise, of the network without.
    """
    mean, half = interval(right - without)
    return {"gain": mean, "low": mean - half, "high": mean + half}


def choices_of(decisions: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """How often each stage was rewarded, under which regime, and what its block did to the metric.

    The effect, with its 95 % interval, is that of the later half of the decisions, when the blocks had been
    trained.

    Args:
        decisions: as in ``decisions.jsonl``.
        names: of the actions.
    """
    rows: dict[str, Any] = {}
    for name in names:
        own = [each for each in decisions if each["stage"] == name]
        late = [
            each["after"] - each["without"]
            for each in decisions[len(decisions) // 2 :]
            if each["stage"] == name
        ]
        rows[name] = {
            "rewarded": len(own),
            "regimes": dict(sorted(Counter(each["regime"] for each in own).items())),
            "effect": None,
            "low": None,
            "high": None,
        }
        if len(late) > 1:
            mean, half = interval(np.array(late))
            rows[name] |= {"effect": mean, "low": mean - half, "high": mean + half}
    return rows


def save_placement_picture(summary: Mapping[str, Any], file: Path) -> None:
    """Draws how often each stage was chosen in each epoch, and the gain of each over no block with interval.

    Args:
        summary: of a placement run, as in its ``summary.json``.
        file: a .png.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs, fixed = summary["epochs"], summary["fixed"]
    names = list(fixed)
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    times, gains = figure.subplots(1, 2, width_ratios=(3, 2))
    at = [row["epoch"] for row in epochs]
    below = [0.0] * len(at)
    for number, name in enumerate(names):
        totals = [max(1, sum(row["counts"].values())) for row in epochs]
        shares = [row["counts"][name] / total for row, total in zip(epochs, totals, strict=True)]
        times.bar(at, shares, bottom=below, width=0.9, color=f"C{number % 10}", label=name)
        below = [low + share for low, share in zip(below, shares, strict=True)]
    times.set_xlabel("epoch")
    times.set_ylabel("share of the decisions")
    times.set_ylim(0, 1)
    times.xaxis.get_major_locator().set_params(integer=True)
    accuracy = times.twinx()
    accuracy.plot(at, [100 * row["accuracy"] for row in epochs], "k.-", linewidth=1.2)
    accuracy.set_ylabel("validation accuracy of the policy, %")
    figure.legend(*times.get_legend_handles_labels(), fontsize=8, loc="outside upper left", ncols=len(names))
    for number, name in enumerate(names):
        row = fixed[name]
        gains.errorbar(
            number, 100 * row["gain"],
            yerr=[[100 * (row["gain"] - row["low"])], [100 * (row["high"] - row["gain"])]],
            fmt="o", color=f"C{number % 10}", capsize=4,
        )  # fmt: skip
    gains.axhline(0, color="gray", linewidth=0.8)
    gains.set_xticks(range(len(names)), names)
    gains.set_ylabel("points of accuracy over no block")
    gains.set_title(f"trained network with each block; in use: {summary['stage']}", fontsize=9)
    FigureCanvasAgg(figure)
    replace_file(file, lambda temporary: figure.savefig(temporary, format="png", dpi=110))
