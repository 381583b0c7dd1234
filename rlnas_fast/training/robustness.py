"""How much of its accuracy a network keeps on images that were spoilt in a stated way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError
from .data import DeviceData
from .loop import precision
from .recipe import Recipe

_BATCH = 512
DEFAULT_STRENGTH = {"noise": 0.5, "blur": 1.0, "fgsm": 0.1}


@dataclass(frozen=True)
class Corruption:
    """What is done to an image before a network sees it.

    Attributes:
        kind: "noise" adds Gaussian noise, "blur" convolves with a Gaussian, "fgsm" moves every pixel in
            the direction in which the loss grows (Goodfellow et al., Explaining and Harnessing
            Adversarial Examples (2015), eq. 1: one step; deviation: the loss is the margin, largest wrong
            logit minus right one, because the gradient of cross entropy vanishes where a network is sure).
        strength: deviation of the noise, or size of the step, in standard deviations of the pixels of the
            task (FGSM is not clipped to the range of an image); of the blur in pixels.
    """

    kind: str
    strength: float

    @classmethod
    def of(cls, text: str) -> Corruption:
        """From "kind" or "kind:strength".

        Raises:
            ConfigError: no such kind, or a strength that is not a number above 0.
        """
        kind, colon, number = text.partition(":")
        if kind not in DEFAULT_STRENGTH:
            raise ConfigError(f"robustness {text!r}: give noise, blur or fgsm, as in fgsm:0.1")
        try:
            strength = float(number) if colon else DEFAULT_STRENGTH[kind]
        except ValueError:
            strength = math.nan
        if not (strength > 0 and math.isfinite(strength)):
            raise ConfigError(f"robustness {text!r}: the strength must be a number above 0, as in fgsm:0.1")
        return cls(kind, strength)


def robust_accuracy(
    module: nn.Module, data: DeviceData, recipe: Recipe, corruption: Corruption, seed: int
) -> float:
    """Fraction of the validation images that ``module`` gets right after ``corruption``.

    Args:
        module: on the data's device.
        seed: of the noise; the same images are spoilt alike for every network.
    """
    module.eval()
    device = data.x_validation.device
    generator = torch.Generator(device).manual_seed(seed)

    def logits_of(x: Tensor) -> Tensor:
        with precision(recipe, device):
            return module(x).float()  # type: ignore[no-any-return]

    right = 0
    for raw, y in zip(
        torch.split(data.x_validation, _BATCH), torch.split(data.y_validation, _BATCH), strict=True
    ):
        x = data.normalise(raw)
        if corruption.kind == "fgsm":
            x = _attacked(logits_of, x, y, corruption.strength)
        else:
            x = corrupted(x, corruption, generator)
        with torch.no_grad():
            right += int((logits_of(x).argmax(1) == y).sum())
    return right / len(data.y_validation)


def corrupted(x: Tensor, corruption: Corruption, generator: torch.Generator) -> Tensor:
    """Normalised images x [N, C, H, W] with noise, or blurred.

    Raises:
        ConfigError: ``corruption`` needs a network to attack.
    """
    if corruption.kind == "noise":
        return x + corruption.strength * torch.randn(x.shape, generator=generator, device=x.device)
    if corruption.kind == "blur":
        return _blurred(x, corruption.strength)
    raise ConfigError(f"{corruption.kind} attacks a network: images alone can have noise or blur")


def _attacked(logits_of: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, step: float) -> Tensor:
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        logits = logits_of(x)
        others = logits.masked_fill(F.one_hot(y, logits.shape[1]).bool(), -math.inf).amax(dim=1)
        (gradient,) = torch.autograd.grad((others - logits.gather(1, y[:, None])[:, 0]).sum(), x)
    return (x + step * gradient.sign()).detach()


def _blurred(x: Tensor, deviation: float) -> Tensor:
    """Two passes of a Gaussian of 3 deviations on either side, the edge being repeated."""
    reach = min(max(1, math.ceil(3 * deviation)), min(x.shape[-2:]) - 1)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=x.device) / deviation) ** 2)
    weights = weights / weights.sum()
    channels = x.shape[1]
    for shape, padding in (((1, -1), (reach, reach, 0, 0)), ((-1, 1), (0, 0, reach, reach))):
        kernel = weights.reshape(1, 1, *shape).expand(channels, 1, -1, -1)
        x = F.conv2d(F.pad(x, padding, mode="replicate"), kernel, groups=channels)
    return x
