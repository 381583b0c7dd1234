"""Every script in benchmarks/ can be loaded here: what it imports exists, and GPU ones need no GPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[2] / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_loads_and_says_what_it_is(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
