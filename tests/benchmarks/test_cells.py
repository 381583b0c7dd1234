"""Cells of a benchmark are computed once, and again when what they stand on changes."""

from __future__ import annotations

from pathlib import Path
from types import FunctionType

import numpy as np
import pytest
from cells import _plain, cell

from rlnas_fast.strategies import evolution, moves


def counted(calls: list[int]) -> FunctionType:
    def compute() -> np.ndarray:
        calls.append(1)
        return np.arange(3.0)

    return compute  # type: ignore[return-value]


def test_a_cell_is_kept_by_its_name_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLNAS_CELLS_DIR", str(tmp_path / "cells"))
    calls: list[int] = []
    for name, code in (("a", [moves]), ("a", [moves]), ("b", [moves]), ("a", [evolution]), ("a", [moves])):
        np.testing.assert_array_equal(cell(name, code, counted(calls)), np.arange(3.0))
    assert len(calls) == 3


def test_without_a_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RLNAS_CELLS_DIR", raising=False)
    calls: list[int] = []
    cell("a", [moves], counted(calls))
    cell("a", [moves], counted(calls))
    assert len(calls) == 2


def test_comments_and_docstrings_do_not_count_but_code_does() -> None:
    one = 'def f(x):\n    """Adds."""\n    return x + 1  # one\n'
    assert _plain(one) == _plain('def f(x):\n    """Adds one."""\n    return (x + 1)\n')
    assert _plain(one) != _plain(one.replace("+ 1", "+ 2"))
