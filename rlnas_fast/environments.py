"""What ``gymnasium.make`` composes: an environment whose reward is that of a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

from .components import make
from .compose import TABLE_SPEC, build
from .config import SearchConfig, read_config
from .envs.construction import ArchitectureEnv, ChainCNNEnv
from .search import Architecture, Budget, Measurement, Request, SearchSpace, child_seed

Score = Callable[[Architecture], float]


def chain_cnn(
    *,
    invalid_action: Literal["terminate", "raise"] = "terminate",
    evaluate: Score | None = None,
    **settings: Any,
) -> ChainCNNEnv:
    """The chain as its Markov decision process: ``gymnasium.make("rlnas_fast/ChainCNN-v0")``.

    Args:
        invalid_action: "terminate" or "raise".
        evaluate: the reward of an architecture; None trains it as a search with these settings would.
        settings: of ``SearchConfig``: ``space`` (its options, e.g. {"attention": True}), ``task``,
            ``reward``, ``epochs``, ``recipe``, ``device``, ``seed``...
    Raises:
        ConfigError: a setting is unknown or makes no sense; one line says which.
    """
    environment: ChainCNNEnv = _environment(ChainCNNEnv, invalid_action, evaluate, settings)
    return environment


def architecture(
    *,
    invalid_action: Literal["terminate", "raise"] = "terminate",
    evaluate: Score | None = None,
    **settings: Any,
) -> ArchitectureEnv:
    """Any of our spaces, one decision a step: ``gymnasium.make("rlnas_fast/Architecture-v0")``.

    Takes what ``chain_cnn`` takes; ``space`` names the space.
    """
    environment: ArchitectureEnv = _environment(ArchitectureEnv, invalid_action, evaluate, settings)
    return environment


def _environment(
    kind: type[Any],
    invalid_action: Literal["terminate", "raise"],
    evaluate: Score | None,
    settings: Mapping[str, Any],
) -> Any:
    config = read_config(settings)
    if evaluate is not None:
        score = evaluate
        spec = TABLE_SPEC if config.evaluator.name == "tabular" else make("task", config.task).spec
        space: SearchSpace = make("space", config.space, spec)
        return kind(space, lambda a: (float(score(a)), {}), invalid_action=invalid_action)
    parts = build(config)
    return kind(
        parts.space, _Measured(parts, config), invalid_action=invalid_action, floor=parts.reward.floor
    )


class _Measured:
    """Reward and measurement of an architecture; the same network is measured once.

    A reward that sets its scale by the first batch of a search sees the first network alone here.
    """

    def __init__(self, parts: Any, config: SearchConfig) -> None:
        self._parts = parts
        self._config = config
        self._known: dict[str, Measurement] = {}

    def __call__(self, architecture: Architecture) -> tuple[float, dict[str, Any]]:
        key = self._parts.space.canonical_key(architecture)
        measurement = self._known.get(key)
        if measurement is None:
            budget = Budget(self._config.epochs, self._config.child_seconds)
            request = Request(architecture, budget, child_seed(self._config.seed, key))
            ((_, measurement, _),) = self._parts.executor.run(self._parts.evaluator, [request])
            if not measurement.transient:
                self._known[key] = measurement
        reward = self._parts.reward
        value = reward.floor if measurement.failure else reward([measurement], [])[0]
        seen = {
            name: number
            for name in ("accuracy", "loss", "parameters", "flops", "failure")
            if (number := getattr(measurement, name)) is not None
        }
        return value, seen
