"""Searches for the neural network that is best on your own hardware."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .compression_runs import compress, load_compressed
    from .hardware.measure import measure_module as measure
    from .placement_runs import load_placed, place
    from .runs import load_child, resume_run, run

__all__ = [
    "__version__",
    "compress",
    "load_child",
    "load_compressed",
    "load_placed",
    "measure",
    "place",
    "resume_run",
    "run",
]


def __getattr__(name: str) -> Any:
    """Imports the composed parts, and with them torch, only when they are used."""
    if name in ("run", "resume_run", "load_child"):
        from . import runs

        return getattr(runs, name)
    if name in ("place", "load_placed"):
        from . import placement_runs

        return getattr(placement_runs, name)
    if name in ("compress", "load_compressed"):
        from . import compression_runs

        return getattr(compression_runs, name)
    if name == "measure":
        from .hardware.measure import measure_module

        return measure_module
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
