"""The errors a caller may want to catch.  Each message says what was wrong, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RlnasError(Exception):
    """Any failure that is the input's or the machine's, not a defect of the package."""


class ConfigError(RlnasError, ValueError):
    """A setting is unknown, contradictory or out of range."""


class DataError(RlnasError, ValueError):
    """A data set or a table cannot be used as it is."""


class RunError(RlnasError):
    """A run folder cannot be read, written, or continued."""


class ReplayMismatch(RunError):
    """Asked again, the strategy did not propose what the log says it proposed."""


class ShapeError(RlnasError, ValueError):
    """A tensor has the wrong rank or size; the message names the argument."""


class KernelUnavailable(RlnasError, RuntimeError):
    """The kernel that was asked for does not exist here; the message says why and how to get it."""


class MeterError(RlnasError, RuntimeError):
    """A hardware cost that was asked for cannot be measured here."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> ConfigError:
    """Makes the error for a name that does not exist, with the nearest one that does."""
    names = sorted(known)
    begun = [each for each in names if name and each.startswith(name)]
    near = begun or difflib.get_close_matches(name, names, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
    return ConfigError(f"unknown {kind} {name!r}: {hint}")
