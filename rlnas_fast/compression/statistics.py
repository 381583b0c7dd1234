"""The state of a layer, as an agent sees it: its weights, activations and gradients, and where it stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..training.data import DeviceData
from . import layers as masking
from .autoencoder import Autoencoder
from .layers import Layout, Prunable

__all__ = ["LayerState", "observe", "weight_entropy"]

BATCH = 256
_BINS = 64
_WIDTH = 4.0  # deviations that the histogram spans on either side
_TINY = 1e-12


@dataclass(frozen=True)
class LayerState:
    """What is known of a layer before its next operation.

    Attributes:
        weight_mean, weight_variance: of all its weights, pruned ones counting as zero.
        weight_entropy: of their histogram, from 0 (all alike) towards 1 (``weight_entropy``).
        activation_mean, activation_variance: of the layer's outputs, before what follows it.
        activation_sparsity: share of its outputs that are not above 0, which a rectifier makes zero.
        gradient_mean, gradient_variance: of the loss with respect to its weights.
        reconstruction_error: relative error of the autoencoder against the original weights.
        place: from 0 for the first layer to 1 for the last.
        share: of all weights of the network that lie in this layer.
        convolution: 1 for a convolution, 0 for a linear layer.
        density: of the layer so far, by bits: 1 is all weights in float32.
        density_before: of all layers so far, likewise.
        budget: what may still be kept of what is not decided: bits asked of the network less those of the
            layers before, over the bits of the undecided ones; 1 or more is everything.
    """

    weight_mean: float
    weight_variance: float
    weight_entropy: float
    activation_mean: float
    activation_variance: float
    activation_sparsity: float
    gradient_mean: float
    gradient_variance: float
    reconstruction_error: float
    place: float
    share: float
    convolution: float
    density: float
    density_before: float
    budget: float

    def vector(self) -> Tensor:
        """float32 [15], every number of the order of one: means in deviations, variances as logarithms."""
        values = asdict(self)
        for name in ("weight", "activation", "gradient"):
            variance = values[f"{name}_variance"]
            values[f"{name}_mean"] /= math.sqrt(variance) + _TINY
            values[f"{name}_variance"] = math.log10(variance + _TINY) / 6
        values["budget"] = min(values["budget"], 2.0)
        values["reconstruction_error"] = min(values["reconstruction_error"], 2.0)
        return torch.tensor([values[field.name] for field in fields(self)], dtype=torch.float32)


def observe(
    model: nn.Module,
    layers: Prunable,
    masks: Mapping[str, Tensor],
    data: DeviceData,
    *,
    density: float,
    autoencoder: Autoencoder | None = None,
    layout: Layout | None = None,
    undecided: frozenset[str] = frozenset(),
) -> dict[str, LayerState]:
    """The states of all layers under ``masks``, from one pass over a fixed batch of training images.

    Args:
        model: holds ``layers``; in eval mode, on the data's device; left as it is, gradients too.
        masks: of every layer; a layer that is not decided yet keeps all.
        density: asked of the whole network.
        autoencoder: of the original weights; without it the reconstruction error is 0.
        layout: of int8 weights.
        undecided: names of the layers whose share of the budget is still open.
    """
    outputs: dict[str, Tensor] = {}
    handles = [layer.module.register_forward_hook(_keeper(outputs, layer.name)) for layer in layers]
    kept_mode = model.training
    weights = [layer.module.weight for layer in layers]
    before = [weight.requires_grad for weight in weights]
    try:
        model.eval()
        for weight in weights:
            weight.requires_grad_(True)
        with masking.masked(model, masks, layout), torch.enable_grad():
            loss = F.cross_entropy(model(data.normalise(data.x[:BATCH])).float(), data.y[:BATCH])
            gradients = torch.autograd.grad(loss, weights)
            inside = {layer.name: layer.weight.clone() for layer in layers}
    finally:
        for handle in handles:
            handle.remove()
        for weight, wanted in zip(weights, before, strict=True):
            weight.requires_grad_(wanted)
        model.train(kept_mode)
    bits = {name: masking.bits({name: mask}) for name, mask in masks.items()}
    sizes = {layer.name: masking.KEEP_BITS * layer.weight.numel() for layer in layers}
    total = sum(sizes.values())
    open_bits = sum(sizes[name] for name in undecided) or total
    left = density * total - sum(bits[name] for name in bits if name not in undecided)
    states = {}
    for place, (layer, gradient) in enumerate(zip(layers, gradients, strict=True)):
        name, weight, output = layer.name, inside[layer.name], outputs[layer.name]
        states[name] = LayerState(
            weight_mean=float(weight.mean()),
            weight_variance=float(weight.var(correction=0)),
            weight_entropy=weight_entropy(weight),
            activation_mean=float(output.mean()),
            activation_variance=float(output.var(correction=0)),
            activation_sparsity=float((output <= 0).double().mean()),
            gradient_mean=float(gradient.mean()),
            gradient_variance=float(gradient.var(correction=0)),
            reconstruction_error=0.0 if autoencoder is None else autoencoder.error(name, weight),
            place=place / max(1, len(layers) - 1),
            share=sizes[name] / total,
            convolution=float(weight.dim() == 4),
            density=bits[name] / sizes[name],
            density_before=sum(bits.values()) / total,
            budget=left / open_bits,
        )
    return states


def weight_entropy(weight: Tensor) -> float:
    """Entropy of the histogram of weights in 64 bins over 4 deviations on either side, over log 64."""
    flat = weight.detach().flatten().double()
    deviation = float(flat.std(correction=0))
    if not deviation > 0:
        return 0.0
    standard = ((flat - flat.mean()) / deviation).clamp(-_WIDTH, _WIDTH)
    counts = torch.histc(standard, _BINS, -_WIDTH, _WIDTH)
    shares = counts[counts > 0] / len(flat)
    return float(-(shares * shares.log()).sum() / math.log(_BINS))


def _keeper(outputs: dict[str, Tensor], name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        outputs[name] = output.detach()

    return keep
