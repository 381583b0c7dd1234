"""What can be searched: an ordered list of categorical decisions, and what is valid after a prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np

from ..errors import ConfigError


@dataclass(frozen=True)
class TaskSpec:
    """All that a search space knows of a task.

    Attributes:
        input_shape: shape of one sample without the batch, channels first: (channels, height, width).
        outputs: how many numbers a network answers with (the number of classes).
        kind: "classification".
    """

    input_shape: tuple[int, ...]
    outputs: int
    kind: str = "classification"


@dataclass(frozen=True)
class Decision:
    """One categorical choice.  Equal positions of two decisions' ``choices`` need not mean the same."""

    name: str
    choices: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """One point of a space: the index chosen at each decision that was reached.  Hashable."""

    space: str
    choices: tuple[int, ...]


@runtime_checkable
class SearchSpace(Protocol):
    """An ordered list of decisions with a mask for what is valid after a prefix.

    A space may end early (a chain that terminates): ``is_complete`` says when.  Spaces hold no state
    and can be pickled.  A space that can be trained also has
    ``build(architecture, task_spec) -> torch.nn.Module``, one whose costs can be estimated also
    ``cheapest(prefix) -> Architecture``; nothing in ``rlnas_fast.search`` calls them.
    """

    @property
    def name(self) -> str: ...

    @property
    def decisions(self) -> tuple[Decision, ...]: ...

    def mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        """Which choices may follow ``prefix``: bool [choices of decision number len(prefix)].

        At least one is True for every prefix that is valid and not complete.
        """
        ...

    def is_complete(self, prefix: tuple[int, ...]) -> bool: ...

    def canonical_key(self, architecture: Architecture) -> str:
        """The same string for two spellings of one network, different strings otherwise."""
        ...

    def describe(self, architecture: Architecture) -> str:
        """One line for a person."""
        ...


def validate(space: SearchSpace, architecture: Architecture) -> None:
    """Raises ConfigError unless ``architecture`` is a complete, valid point of ``space``."""
    if architecture.space != space.name:
        raise ConfigError(f"architecture of space {architecture.space!r} given to space {space.name!r}")
    choices = architecture.choices
    for position, choice in enumerate(choices):
        prefix = choices[:position]
        if space.is_complete(prefix):
            raise ConfigError(f"architecture {choices} goes on after it is complete at decision {position}")
        mask = space.mask(prefix)
        if not 0 <= choice < len(mask) or not mask[choice]:
            name = space.decisions[position].name
            raise ConfigError(
                f"architecture {choices}: choice {choice} of decision {name!r} is not valid there"
            )
    if not space.is_complete(choices):
        raise ConfigError(f"architecture {choices} is not complete: {len(choices)} decisions were made")


def sample_uniform(space: SearchSpace, rng: np.random.Generator, prefix: Sequence[int] = ()) -> Architecture:
    """Completes ``prefix`` by drawing each decision uniformly among its valid choices."""
    choices = tuple(prefix)
    while not space.is_complete(choices):
        valid = np.flatnonzero(space.mask(choices))
        choices += (int(valid[rng.integers(len(valid))]),)
    return Architecture(space.name, choices)
