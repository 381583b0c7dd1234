"""How much a compression alters weights, as an autoencoder of the original ones sees it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import Layer, Prunable

__all__ = ["GROUP", "Autoencoder"]

GROUP = 16
_CODE, _HIDDEN = 4, 64
_MOST_GROUPS = 4096
_BATCH = 256


class Autoencoder(nn.Module):
    """Reconstructs groups of ``GROUP`` neighbouring weights of a row from a code of 4 numbers.

    Trained on the original groups of every layer alike, in units of the layer's deviation, it knows what
    weights of this network look like; what it makes of altered ones differs from the originals the more, the
    more was taken away that the code needs.

    Args:
        layers: whose weights are the originals; they are copied.
        steps: of training, with Adam.
        seed: of its parameters and of the groups that it is trained on, 4,096 a layer at most.
    """

    def __init__(self, layers: Prunable | Sequence[Layer], *, steps: int = 300, seed: int = 0) -> None:
        super().__init__()
        device = next(iter(layers)).weight.device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.encoder = nn.Sequential(nn.Linear(GROUP, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, _CODE))
            self.decoder = nn.Sequential(nn.Linear(_CODE, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, GROUP))
        self.to(device)
        self._scale = {layer.name: float(layer.weight.std(correction=0)) or 1.0 for layer in layers}
        self._original = {layer.name: self._grouped(layer.name, layer.weight) for layer in layers}
        self._train(steps, seed)

    def forward(self, groups: Tensor) -> Tensor:
        """[groups, GROUP] to the same."""
        again: Tensor = self.decoder(self.encoder(groups))
        return again

    @torch.no_grad()
    def errors(self, name: str, weight: Tensor) -> Tensor:
        """Mean squared error of each group of an altered layer against its original, [groups].

        Args:
            name: of the layer.
            weight: as it is now, of the layer's shape.
        """
        again: Tensor = self(self._grouped(name, weight))
        return (again - self._original[name]).square().mean(1)

    def error(self, name: str, weight: Tensor) -> float:
        """Error of a whole layer, relative to the mean square of its original weights."""
        return float(self.errors(name, weight).mean() / self._original[name].square().mean().clamp_min(1e-12))

    def _grouped(self, name: str, weight: Tensor) -> Tensor:
        matrix = weight.detach().reshape(len(weight), -1).float() / self._scale[name]
        return F.pad(matrix, (0, -matrix.shape[1] % GROUP)).reshape(-1, GROUP)

    def _train(self, steps: int, seed: int) -> None:
        chance = torch.Generator().manual_seed(seed)
        parts = []
        for groups in self._original.values():
            rows = torch.randperm(len(groups), generator=chance)[:_MOST_GROUPS].to(groups.device)
            parts.append(groups[rows])
        examples = torch.cat(parts)
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        for _ in range(steps):
            rows = torch.randint(len(examples), (min(_BATCH, len(examples)),), generator=chance)
            batch = examples[rows.to(examples.device)]
            loss = F.mse_loss(self(batch), batch)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
