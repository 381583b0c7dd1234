"""Figures and picture of a placement run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rlnas_fast.report.placements import choices_of, gain_of, save_placement_picture


def test_the_gain_is_paired() -> None:
    rng = np.random.default_rng(0)
    without = (rng.random(400) < 0.8).astype(float)
    right = np.where(rng.random(400) < 0.1, 1.0, without)
    gain = gain_of(right, without)
    difference = right - without
    low, high = stats.norm.interval(0.95, difference.mean(), stats.sem(difference))
    assert (gain["gain"], gain["low"], gain["high"]) == pytest.approx(
        (difference.mean(), low, high), rel=1e-5
    )
    assert gain["low"] > 0  # pairing sees what two intervals of 4 points each would not


def test_effects_are_of_the_later_half() -> None:
    decisions = [
        {"stage": stage, "regime": regime, "after": after, "without": 0.0}
        for stage, regime, after in [
            ("a", "clean", 9.0),
            ("a", "noise", 9.0),
            ("a", "noise", 1.0),
            ("a", "noise", 3.0),
        ]
    ]
    rows = choices_of(decisions, ("none", "a"))
    assert rows["none"] == {"rewarded": 0, "regimes": {}, "effect": None, "low": None, "high": None}
    assert rows["a"]["rewarded"] == 4
    assert rows["a"]["regimes"] == {"clean": 1, "noise": 3}
    assert rows["a"]["effect"] == 2.0
    assert rows["a"]["low"] < 2.0 < rows["a"]["high"]


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    nothing = {"gain": 0.0, "low": 0.0, "high": 0.0}
    summary = {
        "epochs": [
            {"epoch": 1, "accuracy": 0.5, "counts": {"none": 1, "a": 2}},
            {"epoch": 2, "accuracy": 0.6, "counts": {"none": 0, "a": 0}},
        ],
        "fixed": {"none": nothing, "a": {"gain": 0.01, "low": -0.01, "high": 0.03}},
        "stage": "a",
    }
    save_placement_picture(summary, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
