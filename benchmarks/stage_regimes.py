"""The regimes of the stage selection study: five ways in which images may come, and how badly.

The severities were fixed before any network had been trained or judged on them.  A batch is of one regime
and one severity.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SEVERITIES: dict[str, tuple[float, ...]] = {
    "clean": (0.0,),
    "blur": (1.0, 1.5, 2.0),  # deviation of a Gaussian, pixels
    "noise": (0.3, 0.6, 1.0),  # deviation of Gaussian noise, in deviations of the pixels of the set
    "patch shuffle": (16, 8, 4),  # side of the patches of an image that change places, pixels
    "occlusion": (8, 14, 20),  # side of a square that shows the mean colour, pixels
}
REGIMES = tuple(SEVERITIES)


def spoil(x: Tensor, regime: str, severity: float, generator: torch.Generator) -> Tensor:
    """Images [N, C, H, W], normalised, as they come in ``regime``; each has its own chance."""
    return _SPOILERS[regime](x, severity, generator)


def _clean(x: Tensor, severity: float, generator: torch.Generator) -> Tensor:
    return x


def _blur(x: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    """Convolves rows and columns with a Gaussian of 3 deviations on either side, the edge being repeated."""
    reach = math.ceil(3 * deviation)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / deviation) ** 2)
    weights = weights / weights.sum()
    padded = F.pad(x, (reach, reach, reach, reach), mode="replicate")
    rows = padded.unfold(3, 2 * reach + 1, 1) @ weights
    return rows.unfold(2, 2 * reach + 1, 1) @ weights


def _noise(x: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    return x + deviation * torch.randn(x.shape, generator=generator)


def _patch_shuffle(x: Tensor, side: float, generator: torch.Generator) -> Tensor:
    """Cuts each image into squares and puts them together in an order of its own."""
    n, _, height, _ = x.shape
    patches = F.unfold(x, int(side), stride=int(side))  # [N, C x side x side, patches]
    order = torch.rand(n, 1, patches.shape[2], generator=generator).argsort(dim=2)
    return F.fold(patches.gather(2, order.expand_as(patches)), height, int(side), stride=int(side))


def _occlusion(x: Tensor, side: float, generator: torch.Generator) -> Tensor:
    """Covers a square that lies wholly inside, at a random place, with the mean."""
    n, _, height, width = x.shape
    covered = []
    for length in (height, width):
        first = torch.randint(length - int(side) + 1, (n, 1), generator=generator)
        place = torch.arange(length)
        covered.append((place >= first) & (place < first + side))
    return x.masked_fill((covered[0][:, :, None] & covered[1][:, None, :])[:, None], 0.0)


_SPOILERS: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "clean": _clean,
    "blur": _blur,
    "noise": _noise,
    "patch shuffle": _patch_shuffle,
    "occlusion": _occlusion,
}
