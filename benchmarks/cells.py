"""Cells of a long benchmark, kept on disk so that one that was interrupted goes on where it was.

A cell's name and the code it stands on, comments and docstrings apart, make its key; change either and it is
computed again.
Kept where ``RLNAS_CELLS_DIR`` says; without it, nothing is kept.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np


def cell(
    name: str, code: Sequence[ModuleType | Callable[..., object]], compute: Callable[[], np.ndarray]
) -> np.ndarray:
    """``compute()``, or what it gave before."""
    folder = os.environ.get("RLNAS_CELLS_DIR")
    started = time.monotonic()
    if folder is None:
        values = compute()
    else:
        digest = hashlib.sha256(name.encode())
        for part in code:
            digest.update(_plain(inspect.getsource(part)).encode())
        file = Path(folder) / f"{digest.hexdigest()[:32]}.npy"
        if file.is_file():
            return np.asarray(np.load(file, allow_pickle=False))
        values = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial.npy")
        np.save(partial, values)
        partial.replace(file)
    print(f"{name}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return values


def _plain(source: str) -> str:
    """The code without what does not run."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            body[0] = ast.Pass()
    return ast.dump(tree)
