"""Model-based search: a surrogate of the reward judges local moves that a learned policy proposes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ..errors import ConfigError
from ..rl.surrogates import (
    Posterior,
    advantage_weighted_frequencies,
    condition,
    expected_improvement,
    half_rank,
    most_likely,
)
from ..rl.threads import one_blas_thread
from ..search import Architecture, SearchContext, SearchSpace, Trial, sample_uniform
from .moves import encode, neighbours, repair
from .novelty import Novelty


class ModelBased:
    """Reuses every trial: a Gaussian process predicts the reward, and the most promising move is tried.

    Candidates are the neighbours of the best trials so far, and recombinations of them that a policy
    proposes; the policy imitates all trials in proportion to their advantage.  Where nothing has improved
    for a while, every other trial climbs from a fresh random architecture, with the same model as its
    guide: a model that is sure of one basin has no reason of its own to look for another.

    Source: expected improvement over a surrogate as in White et al., BANANAS (2021), which mutates the
    best architectures, too; the policy is advantage-weighted regression (Peng et al. 2019); within a
    batch the model believes its own predictions (Ginsbourger et al., "kriging believer", 2010).

    Args:
        space: where to search.
        seed: of its own generator.
        allow_repeats: proposes an architecture again although it was asked or told before.
        initial: random trials before the model is used.
        incumbents: how many of the best trials the candidates start from.
        proposals: how many recombinations the policy proposes for each trial.
        policy_temperature: of the policy, in root mean square deviations of the good half's rewards;
            0 proposes uniformly.
        patience: trials without improvement after which every other trial climbs elsewhere; 0 never.
        memory: the model sees at most so many trials, one half the best and one half the latest.
    """

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        allow_repeats: bool = False,
        initial: int = 10,
        incumbents: int = 10,
        proposals: int = 50,
        policy_temperature: float = 0.5,
        patience: int = 10,
        memory: int = 400,
    ) -> None:
        if initial < 2 or incumbents < 1 or memory < 4:
            raise ConfigError(
                f"initial = {initial}, incumbents = {incumbents}, memory = {memory}: give at least 2, 1 and 4"
            )
        if min(proposals, policy_temperature, patience) < 0:
            raise ConfigError(
                f"proposals = {proposals}, policy_temperature = {policy_temperature}, patience = {patience}: "
                "none may be below 0"
            )
        self._space = space
        self._rng = np.random.default_rng(seed)
        self._novelty = Novelty(space, self._rng, allow_repeats=allow_repeats)
        self._sizes = np.array([len(decision.choices) for decision in space.decisions])
        self._initial = initial
        self._incumbents = incumbents
        self._proposals = proposals
        self._policy_temperature = policy_temperature
        self._patience = patience
        self._memory = memory
        self._trials: list[Trial] = []
        self._rewards: dict[tuple[int, ...], float] = {}
        self._pending: dict[str, Architecture] = {}
        self._best = -np.inf
        self._improved_at = 0
        self._around: dict[str, list[Architecture]] = {}
        self._hyper: tuple[float, float] | None = None
        self._fitted_at = 0
        self._climb = _Climb()

    @one_blas_thread()
    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures; fewer only when the space has no more."""
        asked: list[Architecture] = []
        while len(asked) < count:
            chosen = self._choose()
            if not chosen:
                break
            key = self._space.canonical_key(chosen[0])
            self._pending[key] = chosen[0]
            asked += chosen
        return asked

    def tell(self, trials: Sequence[Trial]) -> None:
        """Adds ``trials`` to what the model knows."""
        self._novelty.tell(trials)
        for trial in trials:
            self._trials.append(trial)
            self._rewards[trial.architecture.choices] = trial.reward
            self._pending.pop(trial.key, None)
            self._climb.tell(trial)
            if trial.reward > self._best:
                self._best, self._improved_at = trial.reward, len(self._trials)

    def _choose(self) -> list[Architecture]:
        """The next architecture to try, as a list of one; empty when the space has no more."""
        if len(self._trials) + len(self._pending) < self._initial or len(self._trials) < 2:
            return self._novelty.unseen(1)
        known = self._remembered()
        model, targets = self._fit(known)
        stagnant = len(self._trials) - self._improved_at > self._patience > 0
        if stagnant and self._rng.random() < 0.5:
            return self._elsewhere(model)
        believed = model.predict(model.choices[: len(known)])[0]
        order = np.argsort(-believed, kind="stable")[: self._incumbents]
        best = [known[i] for i in order]
        candidates = [a for trial in best for a in self._neighbours(trial)]
        candidates += self._recombine(best, known, targets)
        return self._most_promising(candidates, model, float(believed.max())) or self._novelty.unseen(1)

    def _elsewhere(self, model: Posterior) -> list[Architecture]:
        """One step of a climb that started from a random architecture, or a new start."""
        top = self._climb.top()
        if self._climb.is_over() or (top is not None and self._is_known_slope(top)):
            self._climb = _Climb()
            top = None
        step: list[Architecture] = []
        if top is not None:
            height = model.predict(encode(self._space, [top.architecture]))[0][0]
            step = self._most_promising(self._neighbours(top), model, float(height))
        if not step:
            step = self._novelty.unseen(1)
        self._climb.keys.update(self._space.canonical_key(architecture) for architecture in step)
        return step

    def _is_known_slope(self, top: Trial) -> bool:
        """Whether a neighbour is better that this climb did not find: it leads where another led."""
        return any(
            self._rewards.get(architecture.choices, -np.inf) > top.reward
            and self._space.canonical_key(architecture) not in self._climb.keys
            for architecture in self._neighbours(top)
        )

    def _most_promising(
        self, candidates: Iterable[Architecture], model: Posterior, best: float
    ) -> list[Architecture]:
        """The new candidate with the largest expected improvement; none if none is new."""
        new = list({a: None for a in candidates if self._novelty.is_new(a)})
        if not new:
            return []
        mean, deviation = model.predict(encode(self._space, new))
        gain = expected_improvement(mean, deviation, best)
        if gain.max() < 1e-12:  # hopeless, by the model: then the least so
            gain = mean
        chosen = new[int(self._rng.choice(np.flatnonzero(gain == gain.max())))]
        self._novelty.take(chosen)
        return [chosen]

    def _fit(self, known: Sequence[Trial]) -> tuple[Posterior, np.ndarray]:
        """The model of the rewards, and those on the scale it works on: float [known]."""
        targets = half_rank(np.array([trial.reward for trial in known]))
        choices = encode(self._space, [trial.architecture for trial in known])
        if self._hyper is None or len(self._trials) >= 1.1 * self._fitted_at:
            self._hyper, self._fitted_at = most_likely(choices, targets), len(self._trials)
        model = condition(choices, targets, *self._hyper)
        if self._pending:
            waiting = encode(self._space, list(self._pending.values()))
            believed = np.concatenate([targets, model.predict(waiting)[0]])
            model = condition(np.concatenate([choices, waiting]), believed, *self._hyper)
        return model, targets

    def _remembered(self) -> list[Trial]:
        if len(self._trials) <= self._memory:
            return self._trials
        half = self._memory // 2
        early = sorted(self._trials[:-half], key=lambda trial: -trial.reward)[: self._memory - half]
        return early + self._trials[-half:]

    def _neighbours(self, trial: Trial) -> list[Architecture]:
        if trial.key not in self._around:
            self._around[trial.key] = neighbours(self._space, trial.architecture, self._rng, limit=64)
        return self._around[trial.key]

    def _recombine(
        self, best: Sequence[Trial], known: Sequence[Trial], targets: np.ndarray
    ) -> list[Architecture]:
        """Good architectures with about half of their decisions drawn anew, from the policy."""
        if self._policy_temperature == 0:
            return [sample_uniform(self._space, self._rng) for _ in range(self._proposals)]
        frequencies = advantage_weighted_frequencies(
            encode(self._space, [trial.architecture for trial in known]),
            targets,
            self._sizes,
            temperature=self._policy_temperature,
            prior=1.0,
        )
        cumulative = frequencies.cumsum(axis=1)
        found = []
        for _ in range(self._proposals):
            old = best[int(self._rng.integers(len(best)))].architecture.choices
            drawn = (self._rng.random((len(self._sizes), 1)) > cumulative).sum(axis=1).tolist()
            kept = (self._rng.random(len(self._sizes)) < 0.5).tolist()
            mixed = [
                old[i] if keep and i < len(old) else choice
                for i, (keep, choice) in enumerate(zip(kept, drawn, strict=True))
            ]
            found.append(repair(self._space, mixed, self._rng))
        return found


class _Climb:
    """A climb away from the best: which trials belong to it, and whether it still gets anywhere."""

    def __init__(self, starts: int = 2, patience: int = 6) -> None:
        self.keys: set[str] = set()
        self._starts = starts
        self._patience = patience
        self._told = 0
        self._best: Trial | None = None
        self._best_at = 0

    def tell(self, trial: Trial) -> None:
        if trial.key in self.keys:
            self._told += 1
            if self._best is None or trial.reward > self._best.reward:
                self._best, self._best_at = trial, self._told

    def is_over(self) -> bool:
        return self._told - self._best_at >= self._patience

    def top(self) -> Trial | None:
        """Where to go on from; None while it needs random starts."""
        return None if self._told < self._starts else self._best
