"""REINFORCE with a recurrent controller."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import ConfigError
from ..rl.losses import reinforce_loss, value_loss
from ..rl.schedules import schedule
from ..rl.threads import one_torch_thread
from ..search import Architecture, SearchContext, SearchSpace, Trial
from .controller import Controller


class Reinforce:
    """Learns an autoregressive LSTM controller by REINFORCE, one step of Adam for each batch told.

    Advantages are rewards minus a moving average (one for each target it is told), divided by their moving
    deviation, so that neither the scale of the reward nor its unit matters.

    Source: Zoph and Le, Neural Architecture Search with Reinforcement Learning (2017).
    Deviations: what was proposed before is drawn again, from a policy that is flatter each time (which
    makes those draws slightly off-policy), and one process takes the place of their asynchronous ones.

    Args:
        space: where to search.
        seed: of its own generators.
        allow_repeats: proposes an architecture again although it was asked or told before.
        cell: "lstm" or "gru".
        hidden: width of the controller.
        learning_rate: of Adam.
        entropy_weight: nats of entropy are worth this many deviations of the reward; a number or a schedule
            "start:end:trials".
        value_head: learns the expected reward before each decision as a second baseline, beside the moving
            average.
        value_weight: of the value head's loss.
        baseline_decay: weight of the past in the moving average.
        temperature: divides the logits.
        tanh_constant: bounds the logits to +- this; 0 leaves them free.
        epsilon: probability of a uniform draw at each decision; a number or a schedule.
    """

    conditioned = True  # can be told a target

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        allow_repeats: bool = False,
        cell: str = "lstm",
        hidden: int = 64,
        learning_rate: float = 0.01,
        entropy_weight: float | str = 0.01,
        value_head: bool = False,
        value_weight: float = 0.5,
        baseline_decay: float = 0.9,
        temperature: float = 1.0,
        tanh_constant: float = 2.5,
        epsilon: float | str = 0.0,
    ) -> None:
        if learning_rate <= 0 or value_weight < 0:
            raise ConfigError(
                f"learning_rate = {learning_rate}, value_weight = {value_weight}: give a rate above 0 and a "
                "weight of at least 0"
            )
        self._controller = Controller(
            space, seed=seed, allow_repeats=allow_repeats, cell=cell, hidden=hidden, value_head=value_head,
            baseline_decay=baseline_decay, temperature=temperature, tanh_constant=tanh_constant,
            epsilon=epsilon,
        )  # fmt: skip
        self._optimizer = torch.optim.Adam(self._controller.policy.parameters(), lr=learning_rate, fused=True)
        self._entropy_weight = schedule("entropy_weight", entropy_weight)
        self._value_weight = value_weight

    @one_torch_thread()
    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures from the policy; fewer only when the space has no more."""
        return self._controller.ask(count, context)

    @one_torch_thread()
    def tell(self, trials: Sequence[Trial]) -> None:
        """One gradient step on ``trials``, whoever proposed them."""
        entropy_weight = self._entropy_weight.at(self._controller.told)
        for group in self._controller.groups(trials, len(trials)):
            scored, present = self._controller.policy(group.episodes), group.episodes.present
            returns = group.advantages[:, None] * present
            loss = reinforce_loss(
                scored.log_probs,
                returns if scored.values is None else returns - scored.values,
                scored.entropies,
                entropy_weight=entropy_weight,
            )
            if scored.values is not None:
                loss = loss + self._value_weight * value_loss(scored.values, returns, present)
            self._optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
