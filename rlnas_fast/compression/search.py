"""Learns which weights to keep, prune or quantise under an exact budget, from a handful of evaluations.

Every method here corrects the same scores: that of weight g in layer l is

    log LAMP(g) + rule(l) + budget(l) + coefficients . features(g) + evidence(g)

and the highest are kept.  An upper agent picks a layer and changes its budget (or the precision of what it
keeps); a lower one, one policy for all weights, chooses the coefficients; differentiable masks give the
evidence.  The baselines optimise budgets alone (as AMC does), or budgets and coefficients, as black boxes.

What every method spends its evaluations on:

1. The five rules, LAMP first, on the same images.  All of them rank the weights of a layer by size, so
   budgets alone turn LAMP into the best of them; these are rule(l), and every other correction starts at 0.
2. Its own proposals.  The n-th evaluation of every method is fine-tuned on the same images, others than
   those before it: masks must be good for more than 20 steps' worth of images.
   The black boxes' proposals start from the trained weights.  Ours prune gradually: each goes on from the
   weights, and their sizes, that the one before was left with, and keeps fewer.
3. A tenth of them, at least 3, for three candidates, from the trained weights and again on the same images:
   the best rule, the best proposal, and the weights that the later proposals kept most often.  The best of
   these is the result.  Fewer than 10 evaluations leave no room for this.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ConfigError, unknown_name
from ..rl.schedules import Schedule
from ..rl.threads import one_torch_thread
from ..search import child_seed
from . import layers as masking
from .agents import DQN, PPO, Agent, GaussianPPO
from .autoencoder import Autoencoder
from .black_boxes import CrossEntropy, Random, Sampler
from .differentiable import Evidence, probe
from .features import features
from .heuristics import METHODS, check_density, scores
from .latency import masked_latency_s
from .layers import INT8, PRUNE, Layer, Masks
from .problem import Prices, Problem
from .statistics import observe

__all__ = ["SEARCHES", "Allocation", "Settings", "search"]

_BUDGET_STEP = 0.3  # nats of score that the upper agent moves a layer by
_RECENT = 5
_CARRIED_RATE = 0.25  # of the recipe's


@dataclass(frozen=True)
class Settings:
    """What the learned methods are made of; each part can be left out.

    Attributes:
        hierarchical: an upper agent picks layers; without it one agent chooses budgets and coefficients at
            once.
        differentiable: gradients through the mask train the policy too.
        autoencoder: its error is a feature of weights and part of a layer's state.
        carried: the steps of a proposal go on from the weights that those of the one before ended with, and
            the sizes that LAMP ranks are these weights'; without it both are the trained network's.
        curriculum: the share of weights that the first proposal keeps; it falls to what was asked over four
            fifths of the proposals.  0 is no curriculum.
        rate: of the evidence, in deviations of its gradient; falls linearly to a tenth.
        budget_deviation, coefficient_deviation: how far numbers are varied.
    """

    hierarchical: bool = True
    differentiable: bool = True
    autoencoder: bool = True
    carried: bool = True
    curriculum: float = 0.3
    rate: float = 0.05
    budget_deviation: float = 0.1
    coefficient_deviation: float = 0.1


@dataclass(frozen=True, eq=False)
class Allocation:
    """What a search ends with: the best of its candidates, or with few evaluations the best of these.

    Attributes:
        masks: by layer, bool: what stays.
        states: by layer, uint8: 0 prune, 1 keep, 2 int8.
        history: one row an evaluation: what it was of (a rule, "proposal", or a candidate), reward,
            accuracy, loss, density, kept share of each layer, best reward so far.
    """

    masks: Masks
    states: Masks
    history: tuple[dict[str, Any], ...]


def search(
    problem: Problem,
    *,
    density: float,
    method: str = "ppo",
    evaluations: int = 60,
    seed: int = 0,
    int8: bool = False,
    reward: Prices | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    fine_tune_steps: int = 20,
    settings: Settings | None = None,
) -> Allocation:
    """Searches for the masks with the highest reward at exactly the asked density.

    ``"ppo"``, ``"dqn"``
        the upper agent learns by PPO or double deep Q-learning, the lower by PPO and through masks.
    ``"amc"``
        per-layer ratios by PPO, the largest weights of each layer (He et al., AMC (2018), whose agent is
        DDPG).
    ``"random"``, ``"cem"``
        random search and the cross-entropy method over budgets and coefficients.
    ``"random-ratios"``, ``"cem-ratios"``
        the same over per-layer ratios alone.

    Args:
        problem: the network and its task; only training and validation splits are read.
        density: share of weights that stay, or with ``int8`` of the bits.
        evaluations: on the validation split, those of the rules and of the candidates included.
        int8: lets layers be kept in 8 bits.
        reward: prices beside the validation accuracy.
        log: called with each row of the history.
        fine_tune_steps: within each evaluation; masks are differentiated in these steps, so with 0 they are
            not.
        settings: of the learned methods.

    Raises:
        ConfigError: unknown method, or a number out of range.
    """
    if method not in SEARCHES:
        raise unknown_name("method", method, SEARCHES)
    if evaluations < 1 or fine_tune_steps < 0:
        raise ConfigError(
            f"evaluations = {evaluations}, fine_tune_steps = {fine_tune_steps}: give at least 1 and 0"
        )
    check_density(density)
    settings = settings or Settings()
    with one_torch_thread():
        run = _Run(
            problem, density, evaluations, seed, int8, reward or Prices(), log, fine_tune_steps, settings
        )
        run.begin()
        SEARCHES[method](run)
        return run.settle()


class _Run:
    """Evaluations of one search, and what every method needs for them."""

    def __init__(
        self,
        problem: Problem,
        density: float,
        evaluations: int,
        seed: int,
        int8: bool,
        prices: Prices,
        log: Callable[[dict[str, Any]], None] | None,
        steps: int,
        settings: Settings,
    ) -> None:
        self.problem, self.density, self.evaluations = problem, density, evaluations
        self.seed, self.int8, self.prices, self.log = seed, int8, prices, log
        self.steps, self.settings = steps, settings
        layers = problem.layers
        self.names = [layer.name for layer in layers]
        self.shapes = [layer.weight.shape for layer in layers]
        sizes = [layer.weight.numel() for layer in layers]
        self.sizes = sizes
        self.scratch = copy.deepcopy(problem.model)  # for the sizes of weights that are carried
        self.scratch_layers = [Layer(name, _module(self.scratch, name)) for name in self.names]
        self.start = self.lamp()
        self.layer_of = torch.repeat_interleave(
            torch.arange(len(sizes), device=self.start.device), torch.tensor(sizes, device=self.start.device)
        )
        self.autoencoder = (
            Autoencoder(layers, seed=seed) if settings.autoencoder or prices.reconstruction else None
        )
        self.history: list[dict[str, Any]] = []
        self.rule: tuple[float, Masks] = (-math.inf, {})
        self.best = self.rule
        self.often = torch.zeros_like(self.start)  # how many of the later proposals kept each weight
        self.reserved = max(3, evaluations // 10) if evaluations >= 10 else 0  # for the candidates

    @property
    def left(self) -> int:
        """How many proposals may still be evaluated."""
        return self.evaluations - self.reserved - len(self.history)

    def begin(self) -> None:
        """Evaluates the rules, and starts at the best of them."""
        for name in ("lamp", *(name for name in METHODS if name != "lamp")):
            if len(self.history) == self.evaluations:
                break
            scored = scores(name, self.problem.layers, density=self.density)
            masks = self.masks(torch.cat([scored[layer].flatten() for layer in self.names]))
            value, _ = self.evaluate(masks, of=name, images="rules")
            if value > self.rule[0]:
                self.rule = value, masks
        lowest = [
            part[mask.flatten() != PRUNE].min() if bool(mask.any()) else part.max() + 1
            for part, mask in zip(torch.split(self.start, self.sizes), self.rule[1].values(), strict=True)
        ]
        self.budgets = -torch.stack(lowest)
        self.start = self.start + self.budgets[self.layer_of]

    def lamp(self, carried: dict[str, Tensor] | None = None) -> Tensor:
        """Logarithms of the LAMP scores of the trained weights, or of carried ones: float32 [weights]."""
        if carried is not None:
            own = self.scratch.state_dict()
            self.scratch.load_state_dict({name: carried[name] for name in own})
        found = scores("lamp", self.problem.layers if carried is None else self.scratch_layers)
        tiny = torch.finfo(torch.float32).tiny
        return torch.cat([found[name].flatten().clamp_min(tiny).log() for name in self.names]).float()

    def masks(self, score: Tensor, int8: Tensor | None = None, density: float | None = None) -> Masks:
        """The masks of scores [weights], in which the layers of ``int8`` (bool [layers]) are quantised."""
        parts = torch.split(score, self.sizes)
        by_layer = {
            name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }
        cheap = None
        if self.int8:
            which = torch.zeros(len(self.names), dtype=torch.bool) if int8 is None else int8
            cheap = {
                name: torch.full(shape, bool(on), device=score.device)
                for name, shape, on in zip(self.names, self.shapes, which, strict=True)
            }
        return self.problem.project(by_layer, self.density if density is None else density, int8=cheap)

    def evaluate(
        self,
        masks: Masks,
        *,
        of: str = "proposal",
        images: str | None = None,
        counts: bool = True,
        gradients: bool = False,
        carried: dict[str, Tensor] | None = None,
    ) -> tuple[float, dict[str, Tensor]]:
        """The reward of masks, and what the steps found beside (``probe``).

        Args:
            of: what they are, for the history.
            images: evaluations that give the same name here are fine-tuned on the same training images; None
                is a name of their own.
            counts: they are of the asked density and may be what the search ends with.
            carried: what the steps start from instead of the trained network; they learn more slowly then, so
                that the masks still suit the trained weights, which the result starts from again.
        """
        seed = child_seed(self.seed, f"probe {images or len(self.history)}")
        accuracy, loss, found = self.problem.recall(
            f"probe {self.steps} {seed} {gradients} {'' if carried is None else _digest(carried)}",
            masks,
            lambda: probe(
                self.problem,
                masks,
                steps=self.steps,
                seed=seed,
                gradients=gradients,
                carried=carried,
                rate=_CARRIED_RATE,
            ),
        )
        self.problem.evaluations += 1
        total = masking.KEEP_BITS * self.problem.layers.total
        share = masking.bits(masks) / total
        value = self.prices.reward(
            accuracy,
            density=share,
            reconstruction=self._reconstruction(masks) if self.prices.reconstruction else 0.0,
            latency_s=masked_latency_s(self.problem, self.problem.model, masks, self.prices.latency_batch)
            if self.prices.latency_ms
            else 0.0,
        )
        if counts and value > self.best[0]:
            self.best = value, masks
        if counts and of == "proposal" and 2 * len(self.history) >= self.evaluations:
            self.often += torch.cat([mask.flatten() != PRUNE for mask in masks.values()])
        row = {
            "evaluation": len(self.history),
            "of": of,
            "reward": value,
            "accuracy": accuracy,
            "loss": loss,
            "density": share,
            "layers": {name: round(part, 6) for name, part in masking.densities(masks).items()},
            "best": self.best[0] if self.best[1] else None,
        }
        self.history.append(row)
        if self.log is not None:
            self.log(row)
        return value, found

    def settle(self) -> Allocation:
        """Evaluates the candidates side by side, and ends with the best of them."""
        candidates = {"best rule": self.rule[1], "best proposal": self.best[1]}
        if bool(self.often.any()):
            # Among weights that were kept as often, those with the higher score at the start.
            order = self.start.argsort().argsort().to(self.often) / len(self.start)
            int8 = torch.tensor([bool((mask == INT8).any()) for mask in self.best[1].values()])
            candidates["most often kept"] = self.masks(self.often + order, int8)
        rewards = dict.fromkeys(candidates, 0.0)
        masks = self.best[1]
        if rounds := self.reserved // len(candidates):
            for number in range(rounds):
                for name, candidate in candidates.items():
                    rewards[name] += self.evaluate(candidate, of=name, images=f"candidates {number}")[0]
            masks = candidates[max(rewards, key=rewards.__getitem__)]
        return Allocation(
            {name: mask != PRUNE for name, mask in masks.items()},
            {name: mask.to(torch.uint8) for name, mask in masks.items()},
            tuple(self.history),
        )

    def _reconstruction(self, masks: Masks) -> float:
        assert self.autoencoder is not None
        layout = self.problem.groups.layout
        errors = [
            self.autoencoder.error(
                layer.name, masking.effective(layer.name, layer.weight, masks[layer.name], layout)
            )
            for layer in self.problem.layers
        ]
        return sum(errors) / len(errors)


def _learned(run: _Run, agent_class: type[PPO] | type[DQN]) -> None:
    """The hierarchy: the upper agent moves one layer's budget, the lower one the policy of all weights."""
    settings, problem = run.settings, run.problem
    known = features(problem, run.autoencoder if settings.autoencoder else None)
    layers, count = len(run.names), len(known)
    budgets = torch.zeros(layers)
    int8 = torch.zeros(layers, dtype=torch.bool)
    differentiable = settings.differentiable and run.steps > 0
    evidence = Evidence(known)
    deviation = torch.full((count,), settings.coefficient_deviation)
    if not settings.hierarchical:
        deviation = torch.cat([deviation, torch.full((layers,), settings.budget_deviation)])
    lower = GaussianPPO(deviation, seed=child_seed(run.seed, "lower"))
    changes = torch.tensor([-_BUDGET_STEP, 0.0, _BUDGET_STEP, 0.0])  # the fourth changes the precision
    upper: Agent | None = None
    first, proposals = len(run.history), run.left
    rates = Schedule(settings.rate, 0.1 * settings.rate, run.evaluations)
    carried = dict(run.problem.model.state_dict()) if settings.carried and run.steps else None
    masks = run.masks(run.start)
    recent = [run.rule[0]]
    tried_int8 = False
    while run.left:
        drawn = lower.act()
        proposal, precision = budgets, int8
        if not settings.hierarchical:
            proposal = drawn[count:]
        else:
            states = _states(run, masks)
            if upper is None:
                start = torch.tensor([0.0, 1.0, 0.0, 0.0])
                upper = agent_class(states.shape[2], start, seed=child_seed(run.seed, "upper"))
            allowed = torch.ones(1, layers, 4, dtype=torch.bool)
            allowed[:, :, 3] = run.int8
            row, change = divmod(int(upper.act(states, allowed.flatten(1))), 4)
            proposal, precision = budgets.clone(), int8.clone()
            proposal[row] += changes[change]
            precision[row] ^= change == 3
        if run.int8 and not tried_int8:
            precision, tried_int8 = torch.ones_like(int8), True  # as the upper agent could do layer by layer
        score = run.lamp(carried) + (run.budgets + proposal.to(run.budgets))[run.layer_of]
        now = len(run.history)
        early = max(0.0, 1 - (now - first) / max(1.0, 0.8 * (proposals - 1)))
        # The cubic schedule of Zhu and Gupta, To Prune, or Not to Prune (2018), eq. 1.
        wanted = run.density + max(0.0, settings.curriculum - run.density) * early**3
        masks = run.masks(score + drawn[:count].to(known) @ known + evidence.scores, precision, wanted)
        value, found = run.evaluate(
            masks, counts=wanted == run.density, gradients=differentiable, carried=carried
        )
        gain = found.pop("gain", None)
        if carried is not None:
            carried = found
        lower.learn(value)
        if upper is not None:
            upper.learn(value)
        # A change stays if the reward is not below that of late; budgets without the hierarchy are drawn.
        if value >= float(np.mean(recent)):
            int8 = precision
            budgets = proposal if settings.hierarchical else budgets
        recent = [*recent, value][-_RECENT:]
        if gain is not None:
            evidence.add(gain, rates.at(now))


def _module(network: nn.Module, name: str) -> nn.Linear | nn.Conv2d:
    found = network.get_submodule(name)
    assert isinstance(found, nn.Linear | nn.Conv2d)
    return found


def _digest(state: dict[str, Tensor]) -> str:
    """One name for equal states."""
    total = hashlib.sha256()
    for _, tensor in sorted(state.items()):
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def _states(run: _Run, masks: Masks) -> Tensor:
    """What the upper agent sees: the document's state of every layer, float32 [1, layers, F]."""
    seen = observe(
        run.problem.model,
        run.problem.layers,
        masks,
        run.problem.data,
        density=run.density,
        autoencoder=run.autoencoder if run.settings.autoencoder else None,
        layout=run.problem.groups.layout,
    )
    return torch.stack([seen[name].vector() for name in run.names])[None]


# How far black boxes vary a number: 0.3 was better than 1 on one development seed; less was not tried.
_WIDTH = 0.3


def _black_box(run: _Run, make: Callable[..., Sampler], *, ratios: bool) -> None:
    """Optimises budgets, and without ``ratios`` coefficients too, by their rewards alone."""
    layers = len(run.names)
    known = None if ratios else features(run.problem, run.autoencoder if run.settings.autoencoder else None)
    size = layers + (0 if known is None else len(known))
    sampler = make(torch.full((size,), _WIDTH), seed=child_seed(run.seed, "sampler"))
    int8 = torch.ones(layers, dtype=torch.bool) if run.int8 else None
    while run.left:
        numbers = sampler.act()
        score = run.start + numbers[:layers].to(run.start)[run.layer_of]
        if known is not None:
            score = score + numbers[layers:].to(known) @ known
        value, _ = run.evaluate(run.masks(score, int8))
        sampler.learn(value)


SEARCHES: dict[str, Callable[[_Run], None]] = {
    "ppo": lambda run: _learned(run, PPO),
    "dqn": lambda run: _learned(run, DQN),
    "amc": lambda run: _black_box(run, GaussianPPO, ratios=True),
    "random": lambda run: _black_box(run, Random, ratios=False),
    "cem": lambda run: _black_box(run, CrossEntropy, ratios=False),
    "random-ratios": lambda run: _black_box(run, Random, ratios=True),
    "cem-ratios": lambda run: _black_box(run, CrossEntropy, ratios=True),
}
