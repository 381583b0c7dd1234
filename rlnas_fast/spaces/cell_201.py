"""The cell space of NAS-Bench-201: six edges, five operations each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, product

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn.child_layers import Residual, initialise
from ..search import Architecture, Decision, TaskSpec

EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")


@dataclass(frozen=True)
class Cell201:
    """Cells of four nodes in which every node sums what its edges bring from all nodes before it.

    Decisions and choices are in the order of the published table, so that a row of its ``ops`` is an
    architecture.  The network is a stem, three stages of equal cells with a residual block that halves
    the image between them, and global average pooling.

    Source: Dong and Yang, NAS-Bench-201 (2020), section 2.1 and figure 1.  Deviation: an edge that leaves
    a node nothing reaches carries nothing, whatever its operation (in the original a convolution of
    zeros still adds its normalisation's bias).

    Args:
        task_spec: the images are (channels, height, width).
        width: channels of the first stage; 16 in the paper.
        cells: cells a stage; 5 in the paper.
        distinct: "networks": two spellings of one network have one key; "cells": every one of the
            15,625 spellings is its own, as in the table.
    """

    task_spec: TaskSpec
    width: int = 16
    cells: int = 5
    distinct: str = "networks"

    def __post_init__(self) -> None:
        if len(self.task_spec.input_shape) != 3:
            raise ConfigError(
                f"cell-201 needs images (channels, height, width), the task has {self.task_spec.input_shape}"
            )
        if self.width < 1 or self.cells < 1:
            raise ConfigError(
                f"cell-201: width = {self.width}, cells = {self.cells}: give at least 1 of each"
            )
        if self.distinct not in ("networks", "cells"):
            raise ConfigError(f"cell-201: distinct = {self.distinct!r}: give 'networks' or 'cells'")

    @property
    def name(self) -> str:
        """Of the kind of space, whatever its options."""
        return "cell-201"

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """One for each edge."""
        return _DECISIONS

    def mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        """Every operation may follow any prefix: bool [5]."""
        return np.ones(len(OPERATIONS), dtype=bool)

    def is_complete(self, prefix: tuple[int, ...]) -> bool:
        """Whether every edge has its operation."""
        return len(prefix) == len(EDGES)

    def cheapest(self, prefix: tuple[int, ...]) -> Architecture:
        """The rest as skip connections, for without them what is chosen leads nowhere; or nothing at all."""
        rest = "skip_connect" if any(OPERATIONS[choice] != "none" for choice in prefix) else "none"
        return Architecture(self.name, prefix + (OPERATIONS.index(rest),) * (len(EDGES) - len(prefix)))

    def canonical_key(self, architecture: Architecture) -> str:
        """What the cell computes, so that edges without effect and the order of nodes do not show."""
        if self.distinct == "cells":
            return f"{self.name}:{''.join(map(str, architecture.choices))}"
        return f"{self.name}:{_computation(architecture.choices)}"

    def describe(self, architecture: Architecture) -> str:
        """The cell as the table writes it."""
        nodes: list[list[str]] = [[], [], []]
        for (source, target), choice in zip(EDGES, architecture.choices, strict=True):
            nodes[target - 1].append(f"{OPERATIONS[choice]}~{source}")
        return "+".join(f"|{'|'.join(node)}|" for node in nodes)

    def build(self, architecture: Architecture, task_spec: TaskSpec) -> nn.Module:
        """A module from [N, channels, height, width] to [N, outputs]."""
        width = self.width
        layers: list[nn.Module] = [
            nn.Conv2d(task_spec.input_shape[0], width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
        ]
        for stage in range(3):
            if stage:
                layers.append(_halve(width, 2 * width))
                width *= 2
            layers.extend(_Cell(architecture.choices, width) for _ in range(self.cells))
        layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return initialise(nn.Sequential(*layers, nn.Linear(width, task_spec.outputs)))


_DECISIONS = tuple(Decision(f"{source}>{target}", OPERATIONS) for source, target in EDGES)


class _Cell(nn.Module):
    """[N, width, H, W] to the same shape."""

    def __init__(self, choices: Sequence[int], width: int) -> None:
        super().__init__()
        self.edges = nn.ModuleDict(
            {
                f"{source}>{target}": _operation(OPERATIONS[choice], width)
                for (source, target), choice in zip(EDGES, choices, strict=True)
                if (source, target) in _live_edges(tuple(choices))
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        arrived: dict[int, Tensor] = {0: x}
        for source, target in EDGES:
            if f"{source}>{target}" in self.edges:
                value = self.edges[f"{source}>{target}"](arrived[source])
                arrived[target] = arrived[target] + value if target in arrived else value
        return arrived.get(3, torch.zeros_like(x))


def _operation(name: str, width: int) -> nn.Module:
    match name:
        case "skip_connect":
            return nn.Identity()
        case "avg_pool_3x3":
            return nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)
    return _normal_conv(width, width, int(name[-1]))


def _normal_conv(channels_in: int, channels_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels_out),
    )


def _halve(channels_in: int, channels_out: int) -> nn.Module:
    layer = nn.Sequential(
        _normal_conv(channels_in, channels_out, 3, stride=2), _normal_conv(channels_out, channels_out, 3)
    )
    shortcut = nn.Sequential(
        nn.AvgPool2d(2, stride=2, ceil_mode=True), nn.Conv2d(channels_in, channels_out, 1, bias=False)
    )
    return Residual(layer, shortcut)


@lru_cache(maxsize=1 << 14)
def _live_edges(choices: tuple[int, ...]) -> frozenset[tuple[int, int]]:
    """Edges on a path from input to output that no "none" breaks."""
    present = [edge for edge, choice in zip(EDGES, choices, strict=True) if OPERATIONS[choice] != "none"]
    reached, used = {0}, {3}
    for source, target in present:
        if source in reached:
            reached.add(target)
    for source, target in reversed(present):
        if target in used:
            used.add(source)
    return frozenset((s, t) for s, t in present if s in reached and t in used)


@lru_cache(maxsize=1 << 14)
def _computation(choices: tuple[int, ...]) -> str:
    """A string for what the output node is, equal for isomorphic computations alone.

    A node's value is a sum of terms: the cell's input, or what one operation makes of a node's value.
    ``skip_connect`` passes terms on.  Two convolutions of one value are two terms, for each has its own
    weights; two poolings of one value are the same term twice.
    """
    live = _live_edges(choices)
    operations: list[tuple[str, tuple[int, ...]]] = []  # term t > 0 is operations[t - 1]; term 0 the input
    values: dict[int, tuple[int, ...]] = {0: (0,), 1: (), 2: (), 3: ()}
    for edge, choice in zip(EDGES, choices, strict=True):
        if edge not in live:
            continue
        source, target = edge
        terms = values[source]
        if OPERATIONS[choice] != "skip_connect":
            made = (OPERATIONS[choice], tuple(sorted(terms)))
            if made[0] != "avg_pool_3x3" or made not in operations:
                operations.append(made)
                terms = (len(operations),)
            else:
                terms = (operations.index(made) + 1,)
        values[target] += terms
    return min(_spelled(order, operations, values[3]) for order in _orders(operations))


def _orders(operations: list[tuple[str, tuple[int, ...]]]) -> list[tuple[int, ...]]:
    """Orders of the operations worth comparing: by what each expands to, ties in every order."""

    def expanded(term: int) -> str:
        if term == 0:
            return "x"
        name, inputs = operations[term - 1]
        return f"{name}({'+'.join(sorted(map(expanded, inputs)))})"

    tied: dict[str, list[int]] = {}
    for term in range(1, len(operations) + 1):
        tied.setdefault(expanded(term), []).append(term)
    groups = [list(permutations(tied[text])) for text in sorted(tied)]
    return [tuple(term for group in choice for term in group) for choice in product(*groups)]


def _spelled(
    order: tuple[int, ...], operations: list[tuple[str, tuple[int, ...]]], output: tuple[int, ...]
) -> str:
    label = {0: "x"} | {term: f"{operations[term - 1][0]}#{i}" for i, term in enumerate(order)}
    parts = [f"{label[term]}({_sum(operations[term - 1][1], label)})" for term in order]
    return ";".join([*parts, _sum(output, label) or "nothing"])


def _sum(terms: tuple[int, ...], label: dict[int, str]) -> str:
    return "+".join(sorted(label[term] for term in terms))
