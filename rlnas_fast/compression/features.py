"""What a policy sees of every weight of a network."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autoencoder import GROUP, Autoencoder
from .layers import Prunable
from .problem import Problem

__all__ = ["features"]

_BATCHES = 20


def features(problem: Problem, autoencoder: Autoencoder | None = None) -> Tensor:
    """What the policy sees of each weight, standardised over all of them: float32 [K, weights].

    The logarithms of: its size; its squared gradient (Fisher information, mean over 20 batches of the trained
    network); the deviation of its input; the mean square of its row and of its column, which say whether a
    unit dies; the error with which the autoencoder gives its group back.  And its layer's place.
    """
    layers = problem.layers
    squares, deviations = _gradients(problem, layers)
    rows = []
    for place, layer in enumerate(layers):
        weight = layer.weight.float()
        matrix = weight.reshape(len(weight), -1)
        inputs = deviations[layer.name]
        spread = inputs.repeat_interleave(matrix.shape[1] // len(inputs))
        known = [
            matrix.abs(),
            squares[layer.name].reshape(matrix.shape).sqrt(),
            spread.expand_as(matrix),
            matrix.square().mean(1, keepdim=True).sqrt().expand_as(matrix),
            matrix.square().mean(0, keepdim=True).sqrt().expand_as(matrix),
        ]
        if autoencoder is not None:
            errors = autoencoder.errors(layer.name, layer.weight).view(len(matrix), -1)
            known.append(errors.sqrt().repeat_interleave(GROUP, dim=1)[:, : matrix.shape[1]])
        logs = [(part / part.mean().clamp_min(1e-20)).clamp_min(1e-4).log().flatten() for part in known]
        rows.append(torch.stack([*logs, torch.full_like(logs[0], place / max(1, len(layers) - 1))]))
    found = torch.cat(rows, dim=1)
    spread = found.std(dim=1, correction=0, keepdim=True)
    return (found - found.mean(dim=1, keepdim=True)) / spread.clamp_min(1e-6)


def _gradients(problem: Problem, layers: Prunable) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean squared gradients of the weights, and deviations of each input feature or channel."""
    data, size = problem.data, problem.recipe.batch_size
    weights = {layer.name: layer.module.weight for layer in layers}
    squares = {name: torch.zeros_like(weight.detach()) for name, weight in weights.items()}
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0].detach()
            x = (
                x.reshape(-1, x.shape[-1])
                if isinstance(module, nn.Linear)
                else x.transpose(0, 1).flatten(1).T
            )
            inputs[name] = x.std(dim=0, correction=0)

        return hook

    handles = [layer.module.register_forward_pre_hook(keep(layer.name)) for layer in layers]
    order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(problem.seed))
    wanted = [weight.requires_grad for weight in weights.values()]
    try:
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in range(_BATCHES):
            picked = order[batch * size : (batch + 1) * size].to(problem.device)
            if not len(picked):
                break
            with torch.enable_grad():
                loss = F.cross_entropy(problem.model(data.normalise(data.x[picked])).float(), data.y[picked])
            for square, gradient in zip(
                squares.values(), torch.autograd.grad(loss, list(weights.values())), strict=True
            ):
                square.addcmul_(gradient, gradient)
    finally:
        for handle in handles:
            handle.remove()
        for weight, before in zip(weights.values(), wanted, strict=True):
            weight.requires_grad_(before)
    return squares, inputs
