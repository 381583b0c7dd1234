"""Composite search: one surrogate for each number that is measured, and the goal worked out from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError
from ..rl.surrogates import hamming_kernel, most_likely
from ..rl.threads import one_blas_thread
from ..search import MAXIMISED, Architecture, Goal, SearchContext, SearchSpace, Trial, sample_uniform
from .moves import encode, neighbours, repair
from .novelty import Novelty

REFIT_GROWTH = 1.5
FIT_ON = 200
WIDTHS = (1.0, 2.0, 4.0, 8.0)


class Composite:
    """Predicts accuracy and each cost by itself, and tries what most improves the goal made of them.

    What a goal is made of does not change when its target, multiplier or weights do: every trial stays
    of use under the goal of the moment (``SearchContext.goal``), and one search can serve several
    targets.  Without a goal the reward itself is the one number that is modelled.

    Candidates are the neighbours of the best trials under the goal, recombinations of them, and uniform
    draws.  The expected improvement of the goal is a mean over draws from the models.

    Source: Astudillo and Frazier, Bayesian Optimization of Composite Functions (2019), sections 3 and 4;
    within a batch the models believe their own predictions (Ginsbourger et al., "kriging believer",
    2010).
    Deviations: candidates are local moves and draws, not the solution of a continuous problem; costs are
    modelled on a logarithmic scale; accuracies far below the median count as equally bad.

    Args:
        space: where to search.
        seed: of its own generator.
        allow_repeats: proposes an architecture again although it was asked or told before.
        initial: random trials before the models are used.
        incumbents: how many of the best trials the candidates start from.
        proposals: how many recombinations, and how many uniform draws, are judged for each batch.
        draws: from the models, to estimate an improvement.
        memory: the models see at most so many trials, one half the best and one half the latest.
    """

    conditioned = True  # can be told a target

    def __init__(
        self,
        space: SearchSpace,
        *,
        seed: int,
        allow_repeats: bool = False,
        initial: int = 10,
        incumbents: int = 20,
        proposals: int = 50,
        draws: int = 64,
        memory: int = 600,
    ) -> None:
        if min(initial, memory) < 2 or min(incumbents, draws) < 1 or proposals < 0:
            raise ConfigError(
                f"initial = {initial}, memory = {memory}, incumbents = {incumbents}, draws = {draws}, "
                f"proposals = {proposals}: give at least 2, 2, 1, 1 and 0"
            )
        self._space = space
        self._rng = np.random.default_rng(seed)
        self._novelty = Novelty(space, self._rng, allow_repeats=allow_repeats)
        self._sizes = [len(decision.choices) for decision in space.decisions]
        self._initial = initial
        self._incumbents = incumbents
        self._proposals = proposals
        self._draws = draws
        self._memory = memory
        self._trials: list[Trial] = []
        self._around: dict[str, list[Architecture]] = {}
        self._hyper: dict[str, tuple[int, float, float]] = {}
        self._models: dict[str, _Model] = {}

    @one_blas_thread()
    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """``count`` new architectures; fewer only when the space has no more."""
        goal = context.goal or Goal(("reward",), lambda values: values[..., 0])
        known = [t for t in self._trials if all(_number(t, name) is not None for name in goal.numbers)]
        missing = min(count, max(0, self._initial - len(self._trials)))
        if missing == count or len(known) < 2:
            return self._novelty.unseen(count)
        asked = self._novelty.unseen(missing)
        return asked + self._promising(count - len(asked), goal, known)

    def tell(self, trials: Sequence[Trial]) -> None:
        """Adds ``trials`` to what the models know."""
        self._novelty.tell(trials)
        self._trials += trials

    def _promising(self, count: int, goal: Goal, known: Sequence[Trial]) -> list[Architecture]:
        values = np.array([[_number(t, name) for name in goal.numbers] for t in known], dtype=float)
        if len(known) > self._memory:
            half = self._memory // 2
            early = np.argsort(-goal.score(values[:-half]), kind="stable")[: self._memory - half]
            kept = np.concatenate([np.sort(early), np.arange(len(known) - half, len(known))])
            known, values = [known[i] for i in kept], values[kept]
        seen = encode(self._space, [t.architecture for t in known])
        models = [self._model(name, seen, values[:, j]) for j, name in enumerate(goal.numbers)]
        smooth = values.copy()
        for j, model in enumerate(models):
            if model.logarithmic:
                continue  # costs are as measured; one training's accuracy is what training noise left of it
            smooth[:, j] = np.where(values[:, j] < model.lowest, values[:, j], model.believed)
        scores = goal.score(smooth)
        order = np.argsort(-scores, kind="stable")[: self._incumbents]
        new = self._candidates([known[i] for i in order])
        if not new:
            return self._novelty.unseen(count)
        beliefs = [_Belief.of(model, encode(self._space, new)) for model in models]
        noise = self._rng.standard_normal((self._draws, len(models)))
        best = float(scores.max()) if goal.reached is None else goal.reached
        chosen: list[Architecture] = []
        left = np.ones(len(new), dtype=bool)
        while len(chosen) < count and left.any():
            mean = np.stack([b.mean for b in beliefs], axis=1)
            deviation = np.stack([b.deviation() for b in beliefs], axis=1)
            for width in WIDTHS:  # where no draw improves anything, further out in the tails
                drawn = mean + width * noise[:, None, :] * deviation  # [draws, candidates, numbers]
                for j, model in enumerate(models):
                    drawn[:, :, j] = model.restore(drawn[:, :, j])
                gain = np.maximum(goal.score(drawn) - best, 0.0).mean(axis=0)
                if gain[left].max() > 0:
                    break
            gain = np.where(left, gain, -np.inf)
            index = int(self._rng.choice(np.flatnonzero(gain == gain.max())))
            left[index] = False
            if self._novelty.take(new[index]):
                chosen.append(new[index])
                for belief in beliefs:
                    belief.believe(index)
                if goal.after is not None:
                    goal = goal.after(
                        np.array([m.restore(b.mean[index]) for m, b in zip(models, beliefs, strict=True)])
                    )
        return chosen + self._novelty.unseen(count - len(chosen))

    def _candidates(self, best: Sequence[Trial]) -> list[Architecture]:
        """New architectures near the best trials, between them, and anywhere."""
        found: dict[Architecture, None] = {}
        for trial in best:
            if trial.key not in self._around:
                self._around[trial.key] = neighbours(self._space, trial.architecture, self._rng, limit=64)
            found.update(dict.fromkeys(self._around[trial.key]))
        for _ in range(self._proposals):
            found[sample_uniform(self._space, self._rng)] = None
            one, other = (best[int(self._rng.integers(len(best)))].architecture.choices for _ in range(2))
            mixed = [
                (self._rng.integers(self._sizes[i]) if u < 0.15 else one[i] if u < 0.6 else other[i])
                for i, u in enumerate(self._rng.random(min(len(one), len(other))))
            ]
            found[repair(self._space, [*map(int, mixed), *one[len(mixed) :]], self._rng)] = None
        return [a for a in found if self._novelty.is_new(a)]

    def _model(self, name: str, seen: np.ndarray, values: np.ndarray) -> _Model:
        fitted_at, length, noise = self._hyper.get(name, (0, 0.0, 0.0))
        logarithmic = name not in (*MAXIMISED, "reward")
        lowest = -np.inf if logarithmic else 2 * float(np.median(values)) - float(values.max())
        targets = np.log(np.maximum(values, 1e-30)) if logarithmic else np.maximum(values, lowest)
        if len(values) >= REFIT_GROWTH * fitted_at:
            length, noise = most_likely(seen[-FIT_ON:], targets[-FIT_ON:])
            self._hyper[name] = (len(values), length, noise)
        before = self._models.get(name)
        model = _Model.of(seen, targets, length, noise, lowest, logarithmic, before)
        self._models[name] = model
        return model


@dataclass(frozen=True)
class _Model:
    """A Gaussian process of one number, with what it has seen of n trials.

    Attributes:
        seen: int [n, T], choices.
        length: of the kernel, in fractions of the decisions.
        noise: variance of the noise, relative to ``scale``.
        lowest: values below count as this.
        logarithmic: it predicts the logarithm.
        mean, scale: of the prior, the most likely ones.
        root: float [n, n], lower triangular: root.T @ root is the inverse of the kernel matrix with noise.
        weights: float [n], that inverse @ (targets - mean).
        believed: float [n], its own mean at what it has seen.
    """

    seen: np.ndarray
    length: float
    noise: float
    lowest: float
    logarithmic: bool
    mean: float
    scale: float
    root: np.ndarray
    weights: np.ndarray
    believed: np.ndarray

    @staticmethod
    def of(
        seen: np.ndarray,
        targets: np.ndarray,
        length: float,
        noise: float,
        lowest: float,
        logarithmic: bool,
        before: _Model | None = None,
    ) -> _Model:
        """The model of ``targets``; sooner done where ``before`` has seen all but the last of it.

        Source: Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), eq. 2.23-2.26.
        """
        root = np.empty((0, 0))
        if before is not None and (before.length, before.noise) == (length, noise):
            known = len(before.seen)
            if known <= len(seen) and np.array_equal(before.seen, seen[:known]):
                root = before.root
        root = _extended(root, seen, length, noise)
        ones, rotated = root.sum(axis=1), root @ targets
        mean = float(ones @ rotated / (ones @ ones))
        weights = (rotated - mean * ones) @ root
        scale = max(float((targets - mean) @ weights) / len(targets), 1e-12)
        believed = targets - noise * weights  # mean + kernel @ weights
        return _Model(seen, length, noise, lowest, logarithmic, mean, scale, root, weights, believed)

    def restore(self, targets: np.ndarray) -> np.ndarray:
        """The number whose logarithm, where it is one, is in ``targets``."""
        return np.exp(targets) if self.logarithmic else targets


@dataclass
class _Belief:
    """What a model says of m candidates, and of those among them that it takes its own word for.

    Attributes:
        choices: int [m, T].
        shared: float [m, n], the kernel with what the model has seen, @ the model's root.T.
        mean, variance: float [m]; the variance is relative to the model's scale.
    """

    model: _Model
    choices: np.ndarray
    shared: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    @staticmethod
    def of(model: _Model, choices: np.ndarray) -> _Belief:
        kernel = hamming_kernel(choices, model.seen, model.length)
        shared = kernel @ model.root.T
        variance = np.maximum(1.0 - np.einsum("ij,ij->i", shared, shared), 1e-9)
        return _Belief(model, choices, shared, model.mean + kernel @ model.weights, variance)

    def deviation(self) -> np.ndarray:
        return np.asarray(np.sqrt(self.model.scale * self.variance))

    def believe(self, index: int) -> None:
        """Conditions on the prediction for candidate ``index``: the mean stays, the variance shrinks."""
        own = hamming_kernel(self.choices, self.choices[index : index + 1], self.model.length)[:, 0]
        explained = (own - self.shared @ self.shared[index]) ** 2 / (self.variance[index] + self.model.noise)
        self.variance = np.maximum(self.variance - explained, 1e-9)


def _extended(root: np.ndarray, seen: np.ndarray, length: float, noise: float) -> np.ndarray:
    """The inverse Cholesky factor of ``seen``'s kernel matrix with noise, from that of its first rows.

    O(n^2) a new row.  The factor, not the inverse, because errors in the inverse grow with every extension.
    """
    known, new = seen[: len(root)], seen[len(root) :]
    if not len(new):
        return root
    shared = root @ hamming_kernel(known, new, length)
    own = hamming_kernel(new, new, length) + noise * np.eye(len(new))
    corner = np.linalg.inv(np.linalg.cholesky(own - shared.T @ shared))
    side = -corner @ shared.T @ root
    return np.block([[root, np.zeros((len(known), len(new)))], [side, corner]])


def _number(trial: Trial, name: str) -> float | None:
    if name == "reward":
        return trial.reward
    return trial.measurement.value(name) if trial.measurement.failure is None else None
