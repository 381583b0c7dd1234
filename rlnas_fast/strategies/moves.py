"""Moves from one architecture to another nearby, for any space."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..search import Architecture, SearchSpace


def neighbours(
    space: SearchSpace, architecture: Architecture, rng: np.random.Generator, *, limit: int | None = None
) -> list[Architecture]:
    """Every architecture that one changed decision leads to, the later ones being repaired.

    Args:
        rng: draws later decisions whose old choice is no longer valid, and which neighbours are kept.
        limit: keeps this many, drawn uniformly, where there are more.
    """
    choices = architecture.choices
    moves = [
        (position, int(choice))
        for position, old in enumerate(choices)
        for choice in np.flatnonzero(space.mask(choices[:position]))
        if choice != old
    ]
    if limit is not None and len(moves) > limit:
        moves = [moves[i] for i in rng.choice(len(moves), size=limit, replace=False)]
    return [
        repair(space, (*choices[:position], choice, *choices[position + 1 :]), rng)
        for position, choice in moves
    ]


def mutate(space: SearchSpace, architecture: Architecture, rng: np.random.Generator) -> Architecture:
    """Changes one decision, drawn uniformly among those that have an alternative, to another valid choice.

    An architecture without any alternative is returned as it is.
    """
    choices = architecture.choices
    for position in rng.permutation(len(choices)):
        valid = np.flatnonzero(space.mask(choices[:position]))
        others = valid[valid != choices[position]]
        if len(others):
            choice = int(others[rng.integers(len(others))])
            return repair(space, (*choices[:position], choice, *choices[position + 1 :]), rng)
    return architecture


def repair(space: SearchSpace, choices: Sequence[int], rng: np.random.Generator) -> Architecture:
    """The valid architecture that keeps each of ``choices`` where it can and draws it anew where not."""
    kept: tuple[int, ...] = ()
    while not space.is_complete(kept):
        mask = space.mask(kept)
        wanted = choices[len(kept)] if len(kept) < len(choices) else -1
        if not (0 <= wanted < len(mask) and mask[wanted]):
            valid = np.flatnonzero(mask)
            wanted = int(valid[rng.integers(len(valid))])
        kept += (wanted,)
    return Architecture(space.name, kept)


def encode(space: SearchSpace, architectures: Sequence[Architecture]) -> np.ndarray:
    """Choices, -1 for a decision that was not reached: int [architectures, decisions]."""
    rows = np.full((len(architectures), len(space.decisions)), -1)
    for row, architecture in zip(rows, architectures, strict=True):
        row[: len(architecture.choices)] = architecture.choices
    return rows
