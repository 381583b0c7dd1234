"""Trade-offs: which points no other point beats in every objective, and how much they cover."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pareto_front(points: np.ndarray) -> np.ndarray:
    """Which rows no other row dominates, all objectives being maximised.

    A row dominates another if it is nowhere worse and somewhere better.  Of equal rows all are kept.

    Args:
        points: float [rows, objectives]; rows with NaN are never on the front.
    Returns:
        Indices of the front, ascending.
    """
    points = np.asarray(points, dtype=float)
    usable = np.flatnonzero(~np.isnan(points).any(axis=1))
    order = usable[np.lexsort(points[usable].T[::-1])[::-1]]
    front: list[int] = []
    for row in order:
        kept = points[front]
        beaten = (kept >= points[row]).all(axis=1) & (kept > points[row]).any(axis=1)
        if not beaten.any():
            front.append(int(row))
    return np.sort(np.array(front, dtype=int))


def hypervolume(points: np.ndarray, reference: Sequence[float] | np.ndarray) -> float:
    """The volume that ``points`` dominate above ``reference``, all objectives being maximised.

    Exact, by slicing along the first objective (Zitzler 1999): O(n log n) in two dimensions, and one
    more factor n for each further objective, which suits the few hundred points of a search.

    Args:
        points: float [rows, objectives].
        reference: the corner that counts as nothing, one number an objective.
    """
    corner = np.asarray(reference, dtype=float)
    points = np.asarray(points, dtype=float).reshape(-1, len(corner))
    points = points[(points > corner).all(axis=1)] - corner
    return _volume(points)


def _volume(points: np.ndarray) -> float:
    if len(points) == 0:
        return 0.0
    if points.shape[1] == 1:
        return float(points.max())
    points = points[np.argsort(-points[:, 0], kind="stable")]
    depths = points[:, 0] - np.append(points[1:, 0], 0.0)
    if points.shape[1] == 2:
        return float(depths @ np.maximum.accumulate(points[:, 1]))
    total = 0.0
    for row in np.flatnonzero(depths > 0):
        slab = points[: row + 1, 1:]
        total += float(depths[row]) * _volume(slab[pareto_front(slab)])
    return total
