"""What an agent can do to groups of weights: keep, prune, quantise or shuffle them.

The document's sparsity operations act on single weights or small groups; here a group is a weight, a row (all
that one output feature sums), a tile, or M neighbours of which at most N stay (N:M).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import ConfigError
from .layers import INT8, KEEP, PRUNE, Layer, Layout, Prunable

__all__ = ["OPERATIONS", "Groups", "gathering", "operate"]

OPERATIONS = ("keep", "prune", "quantise", "shuffle")


@dataclass(frozen=True, eq=False)
class Groups:
    """How the weights of every layer are divided into groups that are decided as one.

    Attributes:
        kind: "weights", "rows", "tiles" or "n:m".
        layout: where tiles lie; rows and N:M groups lie in the layer's own order.
        n, m: of "n:m".
    """

    kind: str = "weights"
    layout: Layout = field(default_factory=Layout)
    n: int = 2
    m: int = 4

    @classmethod
    def of(cls, text: str, orders: Mapping[str, tuple[Tensor | None, Tensor | None]] | None = None) -> Groups:
        """From "weights", "rows", "tiles" (32x32), "tiles:16x16" or "2:4".

        Raises:
            ConfigError: none of these.
        """
        if text in ("weights", "rows"):
            return cls(text, Layout(orders=orders or {}))
        if match := re.fullmatch(r"tiles(?::([1-9]\d*)x([1-9]\d*))?", text):
            tile = (int(match[1]), int(match[2])) if match[1] else (32, 32)
            return cls("tiles", Layout(tile, orders or {}))
        match = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", text)
        if match and int(match[1]) <= int(match[2]):
            return cls("n:m", Layout(orders=orders or {}), int(match[1]), int(match[2]))
        raise ConfigError(f"groups {text!r}: give weights, rows, tiles, tiles:16x16 or 2:4")

    def numbers(self, name: str, weight: Tensor) -> Tensor:
        """The number of the group that each weight is in: int64 of the weight's shape, from 0, on its device.

        Args:
            name: of the layer.
            weight: anything of the layer's weight's shape.
        """
        shape = (len(weight), weight[0].numel())
        rows = torch.arange(shape[0], device=weight.device)[:, None].expand(shape)
        columns = torch.arange(shape[1], device=weight.device).expand(shape)
        if self.kind == "weights":
            found = rows * shape[1] + columns
        elif self.kind == "rows":
            found = rows
        elif self.kind == "tiles":
            height, width = self.layout.tile
            found = rows // height * -(-shape[1] // width) + columns // width
            found = self.layout.untiled(name, found)
        else:
            found = rows * -(-shape[1] // self.m) + columns // self.m
        return found.reshape(weight.shape)

    def in_a_row(self, weight: Tensor) -> int:
        """How many groups lie side by side; of rows, all that lie below one another."""
        rows, columns = len(weight), weight[0].numel()
        width = {"weights": 1, "tiles": self.layout.tile[1], "n:m": self.m}
        return rows if self.kind == "rows" else -(-columns // width[self.kind])

    def pooled(self, name: str, score: Tensor) -> Tensor:
        """The mean score of each weight's group, of the weights in it that may stay: float64."""
        if self.kind == "weights":
            return score.double()
        means = self.means(name, score)
        return means[self.numbers(name, score)]

    def means(self, name: str, score: Tensor) -> Tensor:
        """The mean score of each group, of the weights in it that may stay: float64 [groups]."""
        number, may = self.numbers(name, score).flatten(), self.possible(name, score).flatten()
        count = int(number.max()) + 1
        sums = torch.zeros(count, dtype=torch.float64, device=score.device)
        sizes = torch.zeros_like(sums)
        sums.index_add_(0, number[may], score.flatten()[may].double())
        sizes.index_add_(0, number[may], torch.ones_like(number[may], dtype=torch.float64))
        return sums / sizes

    def possible(self, name: str, score: Tensor) -> Tensor:
        """Which weights may stay: all, but of M neighbours the N with the highest score."""
        if self.kind != "n:m":
            return torch.ones_like(score, dtype=torch.bool)
        matrix = score.reshape(len(score), -1).double()
        padded = torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % self.m), value=-torch.inf)
        parts = padded.view(len(matrix), -1, self.m)
        best = parts.sort(dim=2, descending=True, stable=True).indices[:, :, : self.n]
        chosen = torch.zeros_like(parts, dtype=torch.bool).scatter_(2, best, True)
        return chosen.view(len(matrix), -1)[:, : matrix.shape[1]].reshape(score.shape)

    def by_group(self, name: str, weight: Tensor, decisions: Tensor) -> Tensor:
        """One decision a group, [groups], to one a weight, of the weight's shape."""
        return decisions[self.numbers(name, weight)]

    def __str__(self) -> str:
        if self.kind == "tiles":
            return f"tiles:{self.layout.tile[0]}x{self.layout.tile[1]}"
        return f"{self.n}:{self.m}" if self.kind == "n:m" else self.kind


def operate(
    name: str, weight: Tensor, state: Tensor, groups: Groups, chosen: Tensor, operations: Tensor
) -> tuple[Tensor, Tensor]:
    """Carries out one operation on each chosen group.

    ``keep`` and ``prune`` set the state of the group's weights; a pruned weight's value is not lost, so that
    a later ``keep`` brings it back.  ``quantise`` keeps the group in int8; weights of a tile share one scale,
    so all that is kept in the tiles it touches becomes int8, and float32 again when one of their groups is
    told to keep and none to quantise.  ``shuffle`` is the document's: the group and the next one to its right
    (of rows: below; or the one before, where there is no next of its size) swap places, values with states;
    swaps are made first, in the order of the groups, and a group is moved once.

    Args:
        name: of the layer.
        weight: its weight, any floating dtype.
        state: uint8 0 prune, 1 keep, 2 int8, of the weight's shape.
        chosen: int64 [C], numbers of different groups.
        operations: int64 [C], positions in ``OPERATIONS``.

    Returns:
        A new weight and a new state.
    """
    keep, prune, quantise, shuffle = range(len(OPERATIONS))
    number = groups.numbers(name, weight).flatten()
    decided = torch.full((int(number.max()) + 1,), -1, dtype=torch.int64, device=weight.device)
    decided[chosen] = operations
    decision = decided[number]
    moved = _swapped(number, chosen[operations == shuffle], groups.in_a_row(weight))
    values, states = weight.flatten()[moved], state.flatten()[moved]
    float_before = states != INT8
    states[decision == prune] = PRUNE
    states[(decision == keep) | (decision == quantise)] = KEEP
    tile = Groups("tiles", groups.layout).numbers(name, weight).flatten()

    def touched(rows: Tensor) -> Tensor:
        """Which weights lie in a tile that holds one of ``rows``."""
        tiles = torch.zeros(int(tile.max()) + 1, dtype=torch.bool, device=weight.device)
        tiles[tile[rows]] = True
        return tiles[tile]

    int8 = touched(decision == quantise) | (touched(~float_before) & ~touched(decision == keep))
    states[states != PRUNE] = KEEP
    states[int8 & (states != PRUNE)] = INT8
    return values.view(weight.shape), states.view(state.shape)


def gathering(
    layers: Prunable | Sequence[Layer],
    scores: Mapping[str, Tensor],
    tile: tuple[int, int],
    share: float = 0.1,
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """Permutations of rows and columns that gather high scores into few tiles, and leave the function alone.

    Rows and columns are ordered by their summed score.  A layer for which the best ``share`` of its tiles
    then holds no more of the score than before keeps its order.  A convolution larger than 1 x 1 has its rows
    ordered only, because a column of it is no single input.

    Args:
        scores: by layer name; at least 0 and finite.

    Returns:
        By layer name, (rows, columns) as in ``Layout.orders``; layers that keep their order are left out.
    """
    found: dict[str, tuple[Tensor | None, Tensor | None]] = {}
    for layer in layers:
        matrix = scores[layer.name].reshape(len(layer.weight), -1).double()
        rows = matrix.sum(1).sort(descending=True, stable=True).indices
        single = layer.weight.dim() == 2 or layer.weight.shape[2:] == (1, 1)
        columns = matrix.sum(0).sort(descending=True, stable=True).indices if single else None
        ordered = Layout(tile, {layer.name: (rows, columns)})
        if _held(layer.name, matrix, ordered, share) > _held(layer.name, matrix, Layout(tile), share):
            found[layer.name] = rows, columns
    return found


def _held(name: str, matrix: Tensor, layout: Layout, share: float) -> float:
    """How much of the score the best tiles hold when about ``share`` of the weights may stay."""
    number = Groups("tiles", layout).numbers(name, matrix).flatten()
    count = int(number.max()) + 1
    sums = torch.zeros(count, dtype=torch.float64, device=matrix.device)
    sums.index_add_(0, number, matrix.flatten())
    sizes = number.bincount(minlength=count)
    order = (sums / sizes).sort(descending=True, stable=True).indices
    fits = sizes[order].cumsum(0) <= max(share * matrix.numel(), int(sizes.max()))
    return float(sums[order][fits].sum() / sizes[order][fits].sum())


def _swapped(number: Tensor, groups: Tensor, in_a_row: int) -> Tensor:
    """Positions from which every weight is taken when the given groups swap with a neighbour."""
    moved = torch.arange(len(number), device=number.device)
    if not len(groups):
        return moved
    members = number.sort(stable=True).indices
    sizes = number.bincount()
    ends = sizes.cumsum(0)
    done: set[int] = set()
    for group in sorted(groups.tolist()):
        for other in (group + 1, group - 1):
            beside = 0 <= other < len(sizes) and other // in_a_row == group // in_a_row
            if beside and sizes[other] == sizes[group] and not done & {group, other}:
                here, there = (
                    members[int(ends[which] - sizes[which]) : int(ends[which])] for which in (group, other)
                )
                moved[here], moved[there] = there, here
                done |= {group, other}
                break
    return moved
