"""Looks a child up in a table of networks that others have trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..search import Cost, Measurement, Request, SearchSpace
from ..search.archives import read_npz

_CHOICES = ("ops", "choices")


class Tabular:
    """Answers with the row of a table in which every architecture of a space has one.

    The table is an .npz with an integer array ``ops`` or ``choices`` [rows, decisions], whose rows are
    ``Architecture.choices``, and columns [rows] of floats.  Column k of an array [rows, K] is named
    ``array:k``, or ``array:label`` where the file has K labels in an array of strings.

    Accuracies in percent (a column with a value above 1) become fractions.  Every budget and seed gets
    the same answer.  Two spellings of one network may have two rows, and each is answered with its own;
    so these measurements must not be cached under the canonical key.

    Args:
        space: has as many decisions as the table, and the same choices.
        task: not asked; a table is its own task.
        data: the file.
        reward_column: becomes ``accuracy``, what a search sees.
        score_column: becomes ``extra["score"]``, what a search is judged by.
        latency_column: milliseconds; becomes ``latency_s``.
    Raises:
        DataError: the file, its rows or a column cannot be used; says what is there.
    """

    def __init__(
        self,
        space: SearchSpace,
        task: object = None,
        *,
        data: str,
        reward_column: str,
        score_column: str | None = None,
        latency_column: str | None = None,
    ) -> None:
        path = Path(data)
        arrays = read_npz(path)
        self._row_of = _index(path, arrays, space)
        self._accuracy = _fractions(_varied(path, arrays, reward_column))
        self._score = None if score_column is None else _fractions(_column(path, arrays, score_column))
        self._latency_ms = None if latency_column is None else _column(path, arrays, latency_column)
        self._identity = {
            "evaluator": "tabular",
            "space": space.name,
            "data": hashlib.sha256(path.read_bytes()).hexdigest(),
            "columns": f"{reward_column}, {score_column}, {latency_column}",
        }

    def identity(self) -> Mapping[str, str]:
        """The table and the columns read."""
        return self._identity

    def provides(self) -> tuple[str, ...]:
        """Names of the numbers that its measurements have."""
        return (
            "accuracy",
            *(() if self._score is None else ("score",)),
            *(() if self._latency_ms is None else ("latency_s",)),
        )

    def evaluate(self, request: Request) -> Measurement:
        """The row of ``request.architecture``."""
        row = self._row_of.get(request.architecture.choices)
        if row is None:
            raise DataError(f"the table has no row for architecture {request.architecture.choices}")
        latency_ms = None if self._latency_ms is None else float(self._latency_ms[row])
        return Measurement(
            accuracy=float(self._accuracy[row]),
            cost=Cost() if latency_ms is None else Cost(latency_s=latency_ms / 1e3),
            extra={} if self._score is None else {"score": float(self._score[row])},
        )


def _index(path: Path, arrays: Mapping[str, np.ndarray], space: SearchSpace) -> dict[tuple[int, ...], int]:
    """The row of each architecture, by its choices."""
    name = next((name for name in _CHOICES if name in arrays), None)
    if name is None:
        raise DataError(f"{path} has no array ops or choices; it holds {', '.join(arrays)}")
    rows = arrays[name]
    sizes = tuple(len(decision.choices) for decision in space.decisions)
    if rows.ndim != 2 or rows.dtype.kind not in "ui" or rows.shape[1] != len(sizes):
        raise DataError(
            f"{path} is not a table of space {space.name!r}: {name} is {rows.dtype} {rows.shape}, "
            f"the space has {len(sizes)} decisions"
        )
    if (rows.max(axis=0) >= sizes).any() or rows.min() < 0:
        raise DataError(
            f"{path} is not a table of space {space.name!r}: {name} goes up to {rows.max()}, "
            f"the space's decisions have {min(sizes)} to {max(sizes)} choices"
        )
    labels = arrays.get("op_names")
    if labels is not None and tuple(labels.tolist()) != space.decisions[0].choices:
        raise DataError(
            f"{path} is not a table of space {space.name!r}: its operations are {', '.join(labels)}; "
            f"the space's are {', '.join(space.decisions[0].choices)}"
        )
    return {tuple(choices): row for row, choices in enumerate(rows.tolist())}


def _column(path: Path, arrays: Mapping[str, np.ndarray], column: str) -> np.ndarray:
    columns = dict(_columns(arrays))
    if column not in columns:
        raise DataError(f"{path} has no column {column!r}; it has {', '.join(_complete(columns))}")
    values = columns[column]
    unknown = int((~np.isfinite(values)).sum())
    if unknown:
        raise DataError(
            f"{path}: column {column!r} is unknown in {unknown} of {len(values)} rows; "
            f"complete are {', '.join(_complete(columns))}"
        )
    return values


def _varied(path: Path, arrays: Mapping[str, np.ndarray], column: str) -> np.ndarray:
    """A column that a search can be rewarded by."""
    values = _column(path, arrays, column)
    if (values == values[0]).all():
        raise DataError(
            f"{path}: column {column!r} is {values[0]:g} in every row, so no search can learn from it; "
            "choose another reward column"
        )
    return values


def _columns(arrays: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    rows = len(next(arrays[name] for name in _CHOICES if name in arrays))
    found = []
    for name, array in arrays.items():
        if array.dtype.kind not in "uif" or array.shape[:1] != (rows,) or name in _CHOICES:
            continue
        if array.ndim == 1:
            found.append((name, array.astype(float)))
        elif array.ndim == 2:
            labels = _labels(arrays, array.shape[1])
            found.extend((f"{name}:{labels[k]}", array[:, k].astype(float)) for k in range(array.shape[1]))
    return found


def _labels(arrays: Mapping[str, np.ndarray], count: int) -> list[str]:
    fitting = [a for a in arrays.values() if a.dtype.kind == "U" and a.shape == (count,)]
    return [str(label) for label in (fitting[0] if len(fitting) == 1 else range(count))]


def _complete(columns: Mapping[str, np.ndarray]) -> list[str]:
    return [name for name, values in columns.items() if np.isfinite(values).all()]


def _fractions(values: np.ndarray) -> np.ndarray:
    return values / 100 if values.max() > 1 else values
