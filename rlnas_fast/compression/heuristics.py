"""Published rules that say which weights to keep, and the exact projection of any scores to a density.

A rule is a score for every weight that can be compared across layers: the highest are kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown_name
from .layers import INT8, INT8_BITS, KEEP, KEEP_BITS, Layer, Masks, Prunable

if TYPE_CHECKING:
    from .operations import Groups

__all__ = ["METHODS", "check_density", "project", "ratio_scores", "scores"]

_LEAST_OF_LAST = 0.2


def scores(
    method: str, layers: Prunable | Sequence[Layer], *, density: float | None = None
) -> dict[str, Tensor]:
    """One score a weight, float64 of its shape; the highest across all layers are the ones to keep.

    ``"uniform"``
        the largest weights of every layer, the same share of each.
    ``"uniform+"``
        the same, but a first layer that is a convolution stays whole, and of a last layer that is linear at
        least a fifth stays (Gale et al., The State of Sparsity (2019)).  Where ``density`` is given and
        does not have room for these, plain uniform.
    ``"global"``
        the largest weights, wherever they are (Han et al. 2015).
    ``"lamp"``
        w_u^2 / sum of w_v^2 over the weights v of the layer that are no smaller (Lee et al.,
        Layer-adaptive Sparsity for the Magnitude-based Pruning (2021), eq. 3).
    ``"erk"``
        layer densities in proportion to the sum of the sizes of a kernel over their product, at most 1
        (Evci et al., Rigging the Lottery (2020), section 3), the largest weights of each.

    Among equal weights of a layer the earlier one has the higher score.
    """
    if method not in METHODS:
        raise unknown_name("method", method, METHODS)
    if method == "uniform+":
        return _uniform_plus(tuple(layers), density)
    return METHODS[method](tuple(layers))


def ratio_scores(layers: Prunable | Sequence[Layer], ratios: Mapping[str, float]) -> dict[str, Tensor]:
    """Scores by which layers keep shares of their largest weights in the proportion of ``ratios``.

    Whatever the density: the share of layer l is min(1, c * ratios[l]) with one c for all layers.
    """
    for name, ratio in ratios.items():
        if not (ratio > 0 and math.isfinite(ratio)):
            raise ConfigError(f"the ratio of layer {name!r} is {ratio}: give a number above 0")
    return {layer.name: -_ranks(layer.weight) / ratios[layer.name] for layer in layers}


def project(
    scores: Mapping[str, Tensor],
    density: float,
    *,
    groups: Groups | None = None,
    int8: Mapping[str, Tensor] | None = None,
) -> Masks:
    """The masks that keep the highest scores and exactly the asked share of weights.

    ``round(density * total)`` weights are kept; equal scores go to the earlier layer and weight.  With
    ``int8`` the same number of bits is spent: a kept weight takes 32 of them, an int8 one 8, and less is
    spent only if nothing is left that fits.

    Args:
        scores: by layer, of the weights' shapes; the order of the mapping is that of the layers.
        density: in (0, 1].
        groups: keep or prune groups by their mean score; the last one kept is cut to be exact.
        int8: bool, of the weights' shapes: which weights are int8 if they are kept.  Must be equal for all
            weights of a tile (``Groups.by_group`` makes such).

    Returns:
        bool masks, or with ``int8`` uint8 states (0 prune, 1 keep, 2 int8).

    Raises:
        ConfigError: the density is out of range or leaves no weight, or a score is NaN.
    """
    check_density(density)
    for name, score in scores.items():
        if bool(torch.isnan(score).any()):
            raise ConfigError(f"scores of layer {name!r} hold NaN; give every weight a number")
    total = sum(score.numel() for score in scores.values())
    wanted = round(density * total)
    if not wanted:
        raise ConfigError(f"density = {density}: that leaves none of {total:,} weights; give more")
    order = _order(scores, groups)
    if groups is not None and len(order) < wanted:
        raise ConfigError(
            f"density = {density}: {groups} can keep at most {len(order) / total:.4g} of the weights"
        )
    state = torch.zeros(total, dtype=torch.uint8, device=order.device)
    if int8 is None:
        state[order[:wanted]] = KEEP
    else:
        cheap = torch.cat([int8[name].flatten() for name in scores])
        chosen = _affordable(cheap[order], KEEP_BITS * wanted)
        state[order[chosen]] = torch.where(cheap[order[chosen]], INT8, KEEP).to(torch.uint8)
    parts = torch.split(state, [score.numel() for score in scores.values()])
    return {
        name: (part if int8 is not None else part.bool()).view(score.shape)
        for (name, score), part in zip(scores.items(), parts, strict=True)
    }


def check_density(density: float, layers: Prunable | None = None) -> None:
    """Refuses a density outside (0, 1], or one at which the smallest layer's share is less than a weight."""
    if not 0 < density <= 1:
        raise ConfigError(f"density = {density}: give the share of weights to keep, above 0 and at most 1")
    if layers is None:
        return
    smallest = min(layers, key=lambda layer: layer.weight.numel())
    size = smallest.weight.numel()
    if round(density * size) < 1:
        raise ConfigError(
            f"density = {density}: the smallest layer, {smallest.name!r}, has {size:,} weights and would "
            f"keep none of them; give at least {1 / size:.2g}"
        )


def _order(scores: Mapping[str, Tensor], groups: Groups | None) -> Tensor:
    """Positions in the concatenated weights, the first to keep first; those that can never stay left out."""
    flat = torch.cat([score.flatten().double() for score in scores.values()])
    order = flat.sort(descending=True, stable=True).indices
    if groups is None:
        return order
    means, numbers, possible = [], [], []
    before = 0
    for name, score in scores.items():
        means.append(groups.pooled(name, score).flatten())
        numbers.append(groups.numbers(name, score).flatten() + before)
        possible.append(groups.possible(name, score).flatten())
        before += score.numel()  # no layer has more groups than weights
    number = torch.cat(numbers)
    # From the last key to the first: score within the group, the group's place, the group's mean.
    order = order[number[order].sort(stable=True).indices]
    order = order[torch.cat(means)[order].sort(descending=True, stable=True).indices]
    return order[torch.cat(possible)[order]]


def _affordable(cheap: Tensor, budget: int) -> Tensor:
    """Which of the ordered weights a budget of bits buys, cheap ones at 8 and others at 32, in order."""
    costs = torch.where(cheap, INT8_BITS, KEEP_BITS)
    chosen = costs.cumsum(0) <= budget
    left = (budget - int(costs[chosen].sum())) // INT8_BITS
    rest = (cheap & ~chosen).nonzero().flatten()[:left]
    chosen[rest] = True
    return chosen


def _ranks(weight: Tensor) -> Tensor:
    """The place of each weight in its layer by size, from 0 for the largest to below 1."""
    flat = weight.abs().flatten()
    order = flat.sort(descending=True, stable=True).indices
    ranks = torch.empty(len(flat), dtype=torch.float64, device=weight.device)
    ranks[order] = torch.arange(len(flat), dtype=torch.float64, device=weight.device) / len(flat)
    return ranks.view(weight.shape)


def _uniform(layers: Sequence[Layer]) -> dict[str, Tensor]:
    return ratio_scores(layers, {layer.name: 1.0 for layer in layers})


def _uniform_plus(layers: Sequence[Layer], density: float | None = None) -> dict[str, Tensor]:
    plain = _uniform(layers)
    first, last = layers[0], layers[-1]
    certain: dict[str, Tensor] = {}
    if isinstance(first.module, nn.Conv2d):
        certain[first.name] = torch.ones_like(plain[first.name], dtype=torch.bool)
    if isinstance(last.module, nn.Linear):
        fifth = -plain[last.name] < _LEAST_OF_LAST
        certain[last.name] = certain.get(last.name, torch.zeros_like(fifth)) | fifth
    taken = sum(int(part.sum()) for part in certain.values())
    total = sum(layer.weight.numel() for layer in layers)
    if density is not None and taken + len(layers) > round(density * total):
        return plain
    # Ranks lie above -1, so one more puts what is certain before everything else.
    return plain | {name: plain[name] + part.double() for name, part in certain.items()}


def _global(layers: Sequence[Layer]) -> dict[str, Tensor]:
    return {layer.name: layer.weight.abs().double() for layer in layers}


def _lamp(layers: Sequence[Layer]) -> dict[str, Tensor]:
    found = {}
    for layer in layers:
        squares = layer.weight.flatten().double().square()
        order = squares.sort(descending=True, stable=True).indices
        sums = squares[order].cumsum(0)
        score = torch.zeros_like(squares)
        score[order] = squares[order] / sums.clamp_min(torch.finfo(torch.float64).tiny)
        found[layer.name] = score.view(layer.weight.shape)
    return found


def _erk(layers: Sequence[Layer]) -> dict[str, Tensor]:
    return ratio_scores(
        layers, {layer.name: sum(layer.weight.shape) / layer.weight.numel() for layer in layers}
    )


METHODS: dict[str, Callable[[Sequence[Layer]], dict[str, Tensor]]] = {
    "uniform": _uniform,
    "uniform+": _uniform_plus,
    "global": _global,
    "lamp": _lamp,
    "erk": _erk,
}
