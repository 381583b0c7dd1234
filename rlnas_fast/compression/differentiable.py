"""Differentiable masks: what the loss says about keeping each weight, taken along with an evaluation.

A mask m multiplies a weight, so dL/dm = dL/d(m w) * w is there for pruned weights as well as for kept ones.
Steps of fine-tuning compute dL/d(m w) anyway.  Straight through the threshold of the projection, it is the
gradient of the score that decided about the weight (Bengio et al., Estimating or Propagating Gradients
Through Stochastic Neurons (2013)), and by the chain rule that of the policy which gave the score.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import ConfigError
from ..search import Budget
from ..training.loop import train
from . import layers as masking
from .layers import Layout
from .problem import Problem

__all__ = ["Evidence", "probe"]


def probe(
    problem: Problem,
    masks: Mapping[str, Tensor],
    *,
    steps: int,
    seed: int,
    gradients: bool = True,
    carried: Mapping[str, Tensor] | None = None,
    rate: float = 1.0,
) -> tuple[float, float, dict[str, Tensor]]:
    """Accuracy and loss on the validation split after a few steps under ``masks``, and what the steps saw.

    The steps run on a copy, with the problem's recipe, on training images drawn with ``seed``.

    Args:
        steps: of fine-tuning; 0 evaluates the masked network as it is, without gradients.
        carried: the state that the steps start from, as an earlier probe left it; None is the trained
            network's.
        rate: of learning, in the recipe's.

    Returns:
        (accuracy, loss, found).  With gradients found["gain"] is -dL/dm, mean over the steps, for the weights
        of all layers one after the other, float32 [weights].  With ``carried`` the other tensors are the
        state after the steps; weights that are pruned have kept their values in it.  A network that diverges
        has accuracy 0, no gain, and the state that it started from.
    """
    if steps < 0 or (gradients and not steps):
        raise ConfigError(f"steps = {steps}: give at least 0, and at least 1 where gradients are wanted")
    if not steps:
        with masking.masked(problem.model, masks, problem.groups.layout):
            return *problem.accuracy(problem.model), {}
    rows = torch.randperm(len(problem.data.x), generator=torch.Generator().manual_seed(seed))
    rows = rows[: steps * problem.recipe.batch_size].to(problem.device)
    some = replace(problem.data, x=problem.data.x[rows], y=problem.data.y[rows])
    recipe = replace(problem.recipe, learning_rate=rate * problem.recipe.learning_rate)
    tuned = copy.deepcopy(problem.model)
    if carried is not None:
        tuned.load_state_dict(carried)
    recorders = {
        name: _Recorder(name, mask, problem.groups.layout, gradients) for name, mask in masks.items()
    }
    for name, recorder in recorders.items():
        parametrize.register_parametrization(tuned.get_submodule(name), "weight", recorder, unsafe=True)
    result = train(tuned, some, recipe, Budget(1), device=problem.device, seed=seed)
    failed = result.accuracy is None or result.loss is None
    found = {}
    if gradients:
        gain = torch.cat([recorder.gain.flatten() for recorder in recorders.values()]).div_(-steps)
        found["gain"] = torch.zeros_like(gain) if failed else gain
    if carried is not None and failed:
        found |= dict(carried)
    elif carried is not None:
        # Under a parametrization the state holds what lies under the mask by a name of its own.
        under = ".parametrizations.weight.original"
        found |= {name.replace(under, ".weight"): value for name, value in tuned.state_dict().items()}
    if result.accuracy is None or result.loss is None:
        return 0.0, float("inf"), found
    return result.accuracy, result.loss, found


class Evidence:
    """What a policy learned through differentiable masks: a number for every weight, and for every feature.

    Gradient ascent with momentum on the score, in deviations of the gradient over all weights: one weight's
    own score moves by rate x gain, the coefficient of a feature by rate x the mean of feature x gain.

    Args:
        features: float32 [K, weights], of the policy; standardised.
        momentum: weight of earlier evaluations.

    Attributes:
        scores: what is added to the scores, float32 [weights]; 0 at the start.
    """

    def __init__(self, features: Tensor, *, momentum: float = 0.8) -> None:
        self._features, self._momentum = features, momentum
        self._average = torch.zeros(features.shape[1], device=features.device)
        self.coefficients = torch.zeros(len(features), device=features.device)
        self._own = torch.zeros_like(self._average)

    @property
    def scores(self) -> Tensor:
        return self._own + self.coefficients @ self._features

    def add(self, gain: Tensor, rate: float) -> None:
        """One step along ``gain``, float32 [weights]."""
        self._average.lerp_(gain, 1 - self._momentum)
        scaled = self._average / self._average.square().mean().sqrt().clamp_min(1e-12)
        self._own += rate * scaled
        self.coefficients += rate * (self._features @ scaled) / len(scaled)


class _Recorder(nn.Module):
    """The weight of a layer as its mask leaves it; sums the gradients of the mask."""

    def __init__(self, name: str, mask: Tensor, layout: Layout, record: bool) -> None:
        super().__init__()
        self.name, self.mask, self.layout, self.record = name, mask, layout, record
        self.gain = torch.zeros(mask.shape, device=mask.device)

    def forward(self, weight: Tensor) -> Tensor:
        inside = masking.effective(self.name, weight, self.mask, self.layout)
        if self.record and inside.requires_grad:
            inside.register_hook(self._hook(weight.detach()))  # type: ignore[no-untyped-call]
        return inside

    def _hook(self, weight: Tensor) -> Callable[[Tensor], None]:
        def add(gradient: Tensor) -> None:
            self.gain.addcmul_(gradient, weight)

        return add
