"""Pictures of one chain of layers and of how a search came to it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..search import TaskSpec, Trial

COLOURS = {
    "input": "tab:gray", "conv": "tab:blue", "residual": "tab:cyan", "pool": "tab:green",
    "global-pool": "tab:olive", "attention": "tab:purple", "fc": "tab:orange", "classifier": "tab:red",
}  # fmt: skip
WINDOW = 20


def save_network_picture(
    layers: Sequence[tuple[str, str, tuple[int, int, int]]], spec: TaskSpec, file: Path
) -> None:
    """Draws each layer as a box: its height is the side of the image, its width the channels (both logs).

    Args:
        layers: (name, type, (channels, height, width) of the output) in order.
        spec: its input is drawn first, its outputs last.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    channels, height, width = spec.input_shape
    boxes = [("input", "input", (channels, height, width)), *layers]
    boxes.append((f"{spec.outputs} classes", "classifier", (spec.outputs, 1, 1)))
    figure = Figure(figsize=(1.2 + 1.25 * len(boxes), 3.4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    left, middles = 0.0, []
    for name, kind, (deep, high, wide) in boxes:
        across, up = 0.25 + 0.08 * math.log2(deep), 0.35 + 0.5 * math.log2(max(high, wide))
        axes.add_patch(
            Rectangle((left, -up / 2), across, up, facecolor=COLOURS[kind], edgecolor="black", alpha=0.8)
        )
        size = f"{deep}" if high == wide == 1 else f"{deep}x{high}x{wide}"
        middle = left + across / 2
        axes.text(middle, up / 2 + 0.12, name, ha="center", va="bottom", fontsize=8)
        axes.text(middle, -up / 2 - 0.12, size, ha="center", va="top", fontsize=7, color="dimgray")
        middles.append((left, left + across))
        left += across + 0.75
    for (_, end), (start, _) in itertools.pairwise(middles):
        axes.annotate("", (start, 0), (end, 0), arrowprops={"arrowstyle": "->", "color": "gray"})
    tallest = 0.35 + 0.5 * math.log2(max(height, width))
    axes.set_xlim(-0.6, left - 0.15)
    axes.set_ylim(-tallest / 2 - 0.7, tallest / 2 + 0.7)
    axes.set_axis_off()
    _save(figure, file)


def save_learning_curve(trials: Sequence[Trial], file: Path, label: str = "reward") -> None:
    """Draws every trial's reward, their moving mean and the best so far.

    The worst tenth does not stretch the picture: what lies below is drawn on its lower edge.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    done = [trial for trial in trials if trial.state == "complete"]
    if done:
        numbers = np.array([trial.number + 1 for trial in done])
        rewards = np.array([trial.reward for trial in done])
        best = np.maximum.accumulate(rewards)
        low = np.percentile(rewards, 10)
        low -= 0.1 * (rewards.max() - low) + 1e-9
        axes.plot(numbers, np.maximum(rewards, low), ".", ms=4, color="tab:gray", alpha=0.6, label="network")
        window = min(WINDOW, len(rewards))
        mean = np.convolve(rewards, np.ones(window) / window, mode="valid")
        axes.plot(
            numbers[window - 1 :], np.maximum(mean, low), color="tab:blue", label=f"mean of the last {window}"
        )
        axes.plot(numbers, np.maximum(best, low), color="tab:red", lw=1, label="best so far")
        axes.legend(fontsize=8, loc="lower right")
    axes.set_xlabel("episode")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    _save(figure, file)


def _save(figure: object, file: Path) -> None:
    partial = file.with_name(file.name + ".partial")
    figure.savefig(partial, format="png")  # type: ignore[attr-defined]
    partial.replace(file)
