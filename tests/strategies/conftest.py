"""Small spaces on which every strategy can be followed by eye."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from rlnas_fast.search import Architecture, Decision


@dataclass(frozen=True)
class Grid:
    """Every combination of a few choices; ``dead`` decisions do not change the network."""

    sizes: tuple[int, ...] = (3, 2, 4)
    dead: tuple[int, ...] = ()
    name: str = "grid"

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return tuple(
            Decision(f"d{i}", tuple(f"c{j}" for j in range(size))) for i, size in enumerate(self.sizes)
        )

    @property
    def count(self) -> int:
        """How many different networks there are."""
        return int(np.prod([size for i, size in enumerate(self.sizes) if i not in self.dead]))

    def mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        return np.ones(self.sizes[len(prefix)], dtype=bool)

    def is_complete(self, prefix: tuple[int, ...]) -> bool:
        return len(prefix) == len(self.sizes)

    def canonical_key(self, architecture: Architecture) -> str:
        return str([c for i, c in enumerate(architecture.choices) if i not in self.dead])

    def describe(self, architecture: Architecture) -> str:
        return str(architecture.choices)


@dataclass(frozen=True)
class Chain:
    """At most ``depth`` layers of three types; choice 0 ends the chain, and no type follows itself."""

    depth: int = 4
    name: str = "chain"

    @property
    def decisions(self) -> tuple[Decision, ...]:
        return tuple(Decision(f"layer {i}", ("end", "a", "b", "c")) for i in range(self.depth))

    @property
    def count(self) -> int:
        return sum(3 * 2 ** (length - 1) for length in range(1, self.depth + 1))

    def mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        valid = np.ones(4, dtype=bool)
        valid[0] = len(prefix) > 0
        if prefix:
            valid[prefix[-1]] = False
        valid.flags.writeable = False
        return valid

    def is_complete(self, prefix: tuple[int, ...]) -> bool:
        return len(prefix) == self.depth or (len(prefix) > 0 and prefix[-1] == 0)

    def canonical_key(self, architecture: Architecture) -> str:
        return str([choice for choice in architecture.choices if choice])

    def describe(self, architecture: Architecture) -> str:
        return str(architecture.choices)


SPACES = [Grid(), Grid((3, 3, 2), dead=(2,)), Chain(), Grid((2,)), Grid((1, 4, 1))]


@pytest.fixture(params=SPACES, ids=["grid", "isomorphic", "chain", "two points", "forced choices"])
def space(request: pytest.FixtureRequest) -> Grid | Chain:
    """Each of the small spaces in turn."""
    small: Grid | Chain = request.param
    return small


@pytest.fixture
def grid() -> type[Grid]:
    """The grid space, to be made in a size of one's own."""
    return Grid


@pytest.fixture
def chain() -> type[Chain]:
    """The space of variable length."""
    return Chain
