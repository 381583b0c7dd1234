"""The recurrent controller of the policy-gradient strategies: all of them but the update and its settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..rl.policies import Choices, Condition, Episodes, RecurrentPolicy
from ..rl.schedules import schedule
from ..search import Architecture, SearchContext, SearchSpace, Trial
from .conditioning import Baselines, Conditioning
from .novelty import Novelty


@dataclass(frozen=True)
class Group:
    """Trials to make one update from.  B trials.

    Attributes:
        sequences: the choices of each.
        episodes: the same, packed for the policy.
        advantages: float32 [B], rewards minus the moving average of their target, in units of its deviation.
    """

    sequences: tuple[Choices, ...]
    episodes: Episodes
    advantages: Tensor


class Controller:
    """A recurrent policy that proposes what is new, and packs what became of it for an update.

    What was proposed before is drawn again, from a policy that is flatter each time.  Each architecture
    keeps the target it was asked under, and each target has its moving average.

    Its settings are those that the strategies describe; ``epsilon`` is a number or a schedule over ``told``.

    Attributes:
        policy: what an update changes.
        told: how many trials ``groups`` has taken in.
    Raises:
        ConfigError: a setting makes no sense.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        allow_repeats: bool,
        cell: str,
        hidden: int,
        value_head: bool = False,
        baseline_decay: float,
        temperature: float,
        tanh_constant: float,
        epsilon: float | str,
    ) -> None:
        self._space = space
        self._generator = torch.Generator().manual_seed(seed)
        self._novelty = Novelty(space, np.random.default_rng(seed), allow_repeats=allow_repeats)
        self.policy = RecurrentPolicy(
            [len(decision.choices) for decision in space.decisions],
            hidden=hidden,
            cell=cell,
            temperature=temperature,
            tanh_constant=tanh_constant or None,
            value_head=value_head,
            generator=self._generator,
        )
        self._epsilon = schedule("epsilon", epsilon, high=1)
        self._baselines = Baselines(baseline_decay)
        self._conditioning = Conditioning()
        self._masks: dict[Choices, Tensor] = {}  # of what is asked and not yet learnt from
        self._waiting: list[tuple[Choices, Condition | None, float]] = []
        self.told = 0

    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures from the policy; fewer only when the space has no more."""
        condition = self._conditioning.of(context)
        drawn: dict[Choices, Tensor] = {}

        def draw(missing: int, attempt: int) -> Iterable[Architecture]:
            sequences, masks = self.policy.sample(
                missing,
                self._space.mask,
                self._space.is_complete,
                self._generator,
                flatten=2.0**attempt,
                epsilon=self._epsilon.at(self.told),
                condition=condition,
            )
            drawn.update(zip(sequences, masks, strict=True))
            return [Architecture(self._space.name, sequence) for sequence in sequences]

        asked = self._novelty.fill(count, draw)
        sequences = [architecture.choices for architecture in asked]
        self._conditioning.remember(sequences)
        self._masks |= {choices: drawn[choices] for choices in sequences if choices in drawn}
        return asked

    def groups(self, trials: Sequence[Trial], size: int) -> Iterator[Group]:
        """Remembers ``trials``, whoever proposed them, and yields each ``size`` of them that are together.

        What does not fill a group waits for the next call.  ``told`` counts up to the last of each group.
        """
        self._novelty.tell(trials)
        for trial in trials:
            self.told += 1
            choices = trial.architecture.choices
            (condition,) = self._conditioning.recall([choices])
            self._waiting.append((choices, condition, trial.reward))
            if len(self._waiting) == size:
                sequences, conditions, rewards = zip(*self._waiting, strict=True)
                self._waiting = []
                episodes = self.policy.episodes(sequences, self._space.mask, self._masks, conditions)
                for sequence in sequences:
                    self._masks.pop(sequence, None)
                yield Group(sequences, episodes, self._baselines.advantages(rewards, conditions))
