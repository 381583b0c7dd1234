"""Random changes to a batch of images, on the device it is on, each image its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def flip(x: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors half of the images left to right.  x: [N, C, H, W]."""
    chosen = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device) < 0.5
    return torch.where(chosen, x.flip(3), x)


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Moves each image by up to an eighth of its side, rows and columns apart; what comes in is 0.

    On normalised images 0 is the mean.  x: [N, C, H, W].  The crop of He et al. (2016), 4 of 32.
    """
    n, _, height, width = x.shape
    rows = _moved(n, height, generator, x.device)
    columns = _moved(n, width, generator, x.device)
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    image = torch.arange(n, device=x.device)[:, None, None]
    picked = x.permute(0, 2, 3, 1)[
        image, rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]
    ]
    return picked.permute(0, 3, 1, 2) * inside[:, None]


def cutout(x: Tensor, generator: torch.Generator) -> Tensor:
    """Blanks a square of a quarter of the side at a random place (DeVries and Taylor 2017).

    x: [N, C, H, W].
    """
    n, _, height, width = x.shape
    kept = [
        (torch.arange(side, device=x.device) - centre).abs() > side // 8
        for side in (height, width)
        for centre in [torch.randint(side, (n, 1), generator=generator, device=x.device)]
    ]
    return x * (kept[0][:, None, :, None] | kept[1][:, None, None, :])


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "flip": flip,
    "shift": shift,
    "cutout": cutout,
}


def _moved(n: int, side: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """[n, side]: for every image, which old place each new place shows."""
    reach = side // 8
    by = torch.randint(-reach, reach + 1, (n, 1), generator=generator, device=device)
    return torch.arange(side, device=device) + by
