"""Differentiable masks: what the loss says about keeping each weight, taken along with an evaluation.

A mask m multiplies a weight, so dL/dm = dL/d(m w) * w is there for pruned weights as well as for kept ones.
Steps of fine-tuning compute dL/d(m w) anyway.  Straight through the threshold of the projection, it is the
gradient of the score that decided about the weight (Bengio et al., Estimating or Propagating Gradients
Through Stochastic Neurons (2013)), and by the chain rule that of the policy which gave the score.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from ..errors import ConfigError
from ..search import Budget
from ..training.loop import make_optimizer, precision, train
from . import layers as masking
from .layers import Layout
from .problem import Problem

__all__ = ["Evidence", "probe"]


# Found["optimizer/<parameter>/<name>"] of a state that is carried.
_OPTIMIZER = "optimizer/"


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
        carried: the state that the steps go on from, the network's or what an earlier probe found, at a
            constant rate and without augmentation; None starts from the trained network, with the schedule
            of the recipe.
        rate: of learning from a carried state, in the recipe's.

    Returns:
        (accuracy, loss, found).  With gradients found["gain"] is -dL/dm, mean over the steps, for the weights
        of all layers one after the other, float32 [weights].  With ``carried`` the other tensors are the
        state after the steps, that of the optimizer included; in it pruned weights keep their values.  A
        network that diverges has accuracy 0, no gain, and the state that it started from.
    """
    if steps < 0 or (gradients and not steps):
        raise ConfigError(f"steps = {steps}: give at least 0, and at least 1 where gradients are wanted")
    if not steps:
        with masking.masked(problem.model, masks, problem.groups.layout):
            return *problem.accuracy(problem.model), {}
    rows = torch.randperm(len(problem.data.x), generator=torch.Generator().manual_seed(seed))
    rows = rows[: steps * problem.recipe.batch_size].to(problem.device)
    tuned = copy.deepcopy(problem.model)
    if carried is not None:
        own = {name: value for name, value in carried.items() if not name.startswith(_OPTIMIZER)}
        tuned.load_state_dict(own)
    recorders = {
        name: _Recorder(name, mask, problem.groups.layout, gradients) for name, mask in masks.items()
    }
    for name, recorder in recorders.items():
        parametrize.register_parametrization(tuned.get_submodule(name), "weight", recorder, unsafe=True)
    state: dict[str, Tensor] = {}
    accuracy, loss = None, None
    if carried is None:
        some = replace(problem.data, x=problem.data.x[rows], y=problem.data.y[rows])
        result = train(tuned, some, problem.recipe, Budget(1), device=problem.device, seed=seed)
        accuracy, loss = result.accuracy, result.loss
    else:
        state = _go_on(problem, tuned, carried, rows, rate)
        accuracy, loss = problem.accuracy(tuned)
        if not math.isfinite(loss):
            accuracy, loss, state = None, None, dict(carried)
    if gradients:
        gain = torch.cat([recorder.gain.flatten() for recorder in recorders.values()]).div_(-steps)
        state["gain"] = torch.zeros_like(gain) if loss is None else gain
    if accuracy is None or loss is None:
        return 0.0, float("inf"), state
    return accuracy, loss, state


def _go_on(
    problem: Problem, tuned: nn.Module, carried: Mapping[str, Tensor], rows: Tensor, rate: float
) -> dict[str, Tensor]:
    """Trains ``tuned`` on one batch of the images ``rows`` after the other, and gives its state after it."""
    recipe = replace(problem.recipe, learning_rate=rate * problem.recipe.learning_rate)
    optimizer = make_optimizer(tuned, recipe)
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in carried.items():
        if name.startswith(_OPTIMIZER):
            _, parameter, part = name.split("/")
            moments.setdefault(int(parameter), {})[part] = value.clone()
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    tuned.train()
    for some in torch.split(rows, recipe.batch_size):
        with precision(recipe, problem.device):
            logits = tuned(problem.data.normalise(problem.data.x[some]))
            loss = F.cross_entropy(logits, problem.data.y[some], label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
    # Under a parametrization the state holds what lies under the mask by a name of its own.
    under = ".parametrizations.weight.original"
    after = {name.replace(under, ".weight"): value for name, value in tuned.state_dict().items()}
    for parameter, parts in optimizer.state_dict()["state"].items():
        after |= {f"{_OPTIMIZER}{parameter}/{part}": value for part, value in parts.items()}
    return after


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
