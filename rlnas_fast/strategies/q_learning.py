"""Tabular Q-learning with a replay memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from ..errors import ConfigError
from ..rl.q_values import epsilon_greedy, replay_episode
from ..rl.schedules import schedule
from ..rl.surrogates import half_rank
from ..search import Architecture, SearchContext, SearchSpace, Trial
from .novelty import Novelty

LARGEST_TABLE = 20_000_000


class QLearning:
    """Keeps the value of each choice in each state and follows the best, with random exceptions.

    The state is the number of the decision and the last choices before it.  After each trial, trials from
    all so far are replayed, their last decision first.

    Source: Baker et al., Designing Neural Network Architectures using Reinforcement Learning (2017).
    Deviations: epsilon falls in a line and within the trials that a search has today, not in steps over
    2,700 (which ``epsilon`` takes, too).  Values follow multi-step returns (Peng and Williams, 1996): where
    the state forgets what was chosen earlier, one-step targets cannot tell what an early choice was worth.
    Rewards are those of all trials so far on the scale of ``half_rank``, unless ``scale`` says otherwise.
    What was proposed before is drawn again, with an epsilon that is larger each time.

    Args:
        space: where to search.
        seed: of its own generator.
        allow_repeats: proposes an architecture again although it was asked or told before.
        history: how many of the last choices the state remembers.
        learning_rate: how far a value moves towards each return.
        replays: trials drawn from memory after each trial.
        trace: lambda of the returns: 0 is one-step Q-learning, 1 follows the final rewards.
        scale: "rank" for rewards on the scale of ``half_rank``; "none" for rewards as they are, as in the
            source.
        optimism: initial value of every choice: a reward, or for "rank" in root mean square deviations of
            the good half's rewards above the median.
        epsilon: probability of a uniform draw at each decision; a number or a schedule "start:end:trials",
            or steps "value x trials" such as "1x60,0.1x40".
    Raises:
        ConfigError: a setting makes no sense, or the table would be too large for the space.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        allow_repeats: bool = False,
        history: int = 1,
        learning_rate: float = 0.1,
        replays: int = 30,
        trace: float = 0.9,
        scale: Literal["rank", "none"] = "rank",
        optimism: float = 0.0,
        epsilon: float | str = "1:0.1:100",
    ) -> None:
        if not 0 < learning_rate <= 1 or not 0 <= trace <= 1:
            raise ConfigError(
                f"learning_rate = {learning_rate}, trace = {trace}: give numbers from 0 to 1, a rate above 0"
            )
        if history < 0 or replays < 1:
            raise ConfigError(f"history = {history}, replays = {replays}: give at least 0 and 1")
        sizes = [len(decision.choices) for decision in space.decisions]
        self._radix = 1 + max(sizes)
        states = len(sizes) * self._radix**history
        if states * max(sizes) > LARGEST_TABLE:
            raise ConfigError(
                f"q-learning does not fit space {space.name!r}: a table of {states} states x {max(sizes)} "
                f"choices; remember less than history = {history}, or use dqn"
            )
        self._space = space
        self._rng = np.random.default_rng(seed)
        self._novelty = Novelty(space, self._rng, allow_repeats=allow_repeats)
        self._table = np.full((states, max(sizes)), float(optimism))
        self._history = history
        self._learning_rate = learning_rate
        self._replays = replays
        self._trace = trace
        self._scale = scale
        self._epsilon = schedule("epsilon", epsilon, high=1)
        self._episodes: list[tuple[list[int], tuple[int, ...], list[np.ndarray]]] = []
        self._rewards: list[float] = []

    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures; fewer only when the space has no more."""
        return self._novelty.fill(count, self._draw)

    def tell(self, trials: Sequence[Trial]) -> None:
        """Remembers ``trials``, whoever proposed them, and replays as many times for each."""
        self._novelty.tell(trials)
        for trial in trials:
            choices = trial.architecture.choices
            states = [self._state(choices[:step]) for step in range(len(choices))]
            masks = [self._mask(choices[:step]) for step in range(len(choices))]
            self._episodes.append((states, choices, masks))
            self._rewards.append(trial.reward)
            self._replay()

    def values(self, prefix: tuple[int, ...]) -> np.ndarray:
        """What each choice after ``prefix`` is worth today: float [largest number of choices]."""
        values: np.ndarray = self._table[self._state(prefix)].copy()
        return values

    def _replay(self) -> None:
        rewards = np.array(self._rewards)
        if self._scale == "rank":
            rewards = half_rank(rewards)
        latest = len(self._episodes) - 1
        for index in (latest, *self._rng.integers(latest + 1, size=self._replays).tolist()):
            states, choices, masks = self._episodes[index]
            replay_episode(
                self._table,
                states,
                choices,
                masks,
                float(rewards[index]),
                rate=self._learning_rate,
                trace=self._trace,
            )

    def _draw(self, missing: int, attempt: int) -> Iterator[Architecture]:
        epsilon = max(self._epsilon.at(len(self._episodes)), attempt / 8)
        for _ in range(missing):
            choices: tuple[int, ...] = ()
            while not self._space.is_complete(choices):
                values = self._table[self._state(choices)]
                choices += (epsilon_greedy(values, self._mask(choices), epsilon, self._rng),)
            yield Architecture(self._space.name, choices)

    def _state(self, prefix: tuple[int, ...]) -> int:
        state = len(prefix)
        for back in range(1, self._history + 1):
            state = state * self._radix + (1 + prefix[-back] if back <= len(prefix) else 0)
        return state

    def _mask(self, prefix: tuple[int, ...]) -> np.ndarray:
        """What may follow, padded to the table's width."""
        allowed = self._space.mask(prefix)
        mask = np.zeros(self._table.shape[1], dtype=bool)
        mask[: len(allowed)] = allowed
        return mask
