"""Trust region policy optimisation with a recurrent controller."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from ..errors import ConfigError
from ..rl.policies import Scored
from ..rl.schedules import schedule
from ..rl.threads import one_torch_thread
from ..rl.trust_region import line_search, mean_divergence, natural_step
from ..search import Architecture, SearchContext, SearchSpace, Trial
from .controller import Controller, Group


class TRPO:
    """Learns an autoregressive controller by one natural-gradient step, as long as allowed, on each group.

    The advantage of a trial is its reward relative to a moving average, in units of the moving deviation.
    The defaults learn fast, for a hundred trials or so, and settle early: with several hundred, larger groups
    and a smaller divergence (10 and 0.05, say) end higher.

    Source: Schulman et al., Trust Region Policy Optimization (2015), with the recurrent controller of Zoph
    and Le (2017).
    Deviations: a trial is one episode whose only reward is its last, without discount; the Fisher matrix
    is damped; what was proposed before is drawn again, from a policy that is flatter each time.

    Args:
        space: where to search.
        seed: of its own generators.
        allow_repeats: proposes an architecture again although it was asked or told before.
        cell: "lstm" or "gru".
        hidden: width of the controller.
        group: how many trials are told between two updates.
        divergence: nats by which a decision's distribution may move in an update, in the mean.
        iterations: of the conjugate gradient.
        damping: added to the diagonal of the Fisher matrix.
        entropy_weight: nats of entropy a decision are worth this many deviations of the reward; a number
            or a schedule "start:end:trials".
        baseline_decay: weight of the past in the moving average.
        temperature: divides the logits.
        tanh_constant: bounds the logits to +- this; 0 leaves them free.
        epsilon: probability of a uniform draw at each decision; a number or a schedule.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        allow_repeats: bool = False,
        cell: str = "lstm",
        hidden: int = 64,
        group: int = 5,
        divergence: float = 0.2,
        iterations: int = 10,
        damping: float = 1e-3,
        entropy_weight: float | str = 0.01,
        baseline_decay: float = 0.9,
        temperature: float = 1.0,
        tanh_constant: float = 2.5,
        epsilon: float | str = 0.0,
    ) -> None:
        if group < 1 or iterations < 1 or divergence <= 0 or damping < 0:
            raise ConfigError(
                f"group = {group}, iterations = {iterations}, divergence = {divergence}, "
                f"damping = {damping}: all must be above 0, the damping at least 0"
            )
        self._controller = Controller(
            space, seed=seed, allow_repeats=allow_repeats, cell=cell, hidden=hidden,
            baseline_decay=baseline_decay, temperature=temperature, tanh_constant=tanh_constant,
            epsilon=epsilon,
        )  # fmt: skip
        self._group = group
        self._divergence = divergence
        self._iterations = iterations
        self._damping = damping
        self._entropy_weight = schedule("entropy_weight", entropy_weight)

    @one_torch_thread()
    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures from the policy; fewer only when the space has no more."""
        return self._controller.ask(count, SearchContext())  # it is told no target

    @one_torch_thread()
    def tell(self, trials: Sequence[Trial]) -> None:
        """Updates the policy whenever a group is full; trials it never asked for count like its own."""
        for group in self._controller.groups(trials, self._group):
            self._update(group)

    def _update(self, group: Group) -> None:
        policy, episodes, advantages = self._controller.policy, group.episodes, group.advantages[:, None]
        present, entropy_weight = episodes.present, self._entropy_weight.at(self._controller.told)
        parameters = list(policy.parameters())
        here = parameters_to_vector(parameters).detach()

        def gain_of(scored: Scored) -> Tensor:
            ratio = (scored.log_probs - old.log_probs.detach()).exp()
            each: Tensor = (ratio * advantages + entropy_weight * scored.entropies) * present
            return each.sum() / present.sum()

        def product(vector: Tensor) -> Tensor:
            return _gradient(slope @ vector, parameters) + self._damping * vector

        @torch.no_grad()
        def evaluate(step: Tensor) -> tuple[float, float]:
            vector_to_parameters(here + step, parameters)
            scored = policy(episodes)
            moved = mean_divergence(old.log_all, scored.log_all, present)
            return float(gain_of(scored) - before), float(moved)

        old = policy(episodes)
        before = gain_of(old)
        gradient = _gradient(before, parameters)
        divergence = mean_divergence(old.log_all.detach(), old.log_all, present)
        slope = _gradient(divergence, parameters, create_graph=True)
        step = natural_step(gradient, product, divergence=self._divergence, iterations=self._iterations)
        step = line_search(evaluate, step, divergence=self._divergence)
        vector_to_parameters(here + step, parameters)


def _gradient(value: Tensor, parameters: Sequence[Tensor], *, create_graph: bool = False) -> Tensor:
    """Of a scalar, as one vector; 0 for parameters that it does not depend on."""
    gradients = torch.autograd.grad(
        value, parameters, retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
