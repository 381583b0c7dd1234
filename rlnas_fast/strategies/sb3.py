"""Learners of Stable-Baselines3 as strategies.

Such a learner owns its loop and pulls rewards out of an environment.  Here it runs in a thread that takes
turns with the search: one waits while the other works, so the order of events is fixed, and each side has
the global generators to itself.  Equal seeds and trials therefore give equal proposals.
"""

from __future__ import annotations

import importlib
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import ConfigError, RunError
from ..rl.threads import one_torch_thread
from ..search import Architecture, SearchContext, SearchSpace, Trial

TOTAL_STEPS = 10**9  # more than any search has; a schedule's fraction of it is still exact
INVALID_IN_A_ROW = 10_000


@dataclass(frozen=True)
class _Learner:
    """Where a learner comes from, and when it needs its rewards."""

    name: str
    module: str
    attribute: str
    masked: bool
    buffer: str | None  # the rollout buffer of a learner on policy; None needs each reward at once


def maskable_ppo(
    space: SearchSpace,
    *,
    seed: int,
    learning_rate: float = 3e-4,
    n_steps: int = 64,
    batch_size: int = 64,
    clip_range: float = 0.2,
    gamma: float = 1.0,
    ent_coef: float = 0.0,
    settings: dict[str, Any] | None = None,
) -> SB3:
    """MaskablePPO of sb3-contrib, which never tries what the mask forbids.

    Source of the defaults: Sivaramakrishnan et al., Building Neural Networks using Deep Reinforcement
    Learning.  Deviations: gamma 1, as for Q-learning.

    Args:
        settings: anything else that the learner takes.
    """
    learner = _Learner("maskable-ppo", "sb3_contrib", "MaskablePPO", True, _MASKABLE_ROLLOUTS)
    given = {"learning_rate": learning_rate, "n_steps": n_steps, "batch_size": batch_size}
    given |= {"clip_range": clip_range, "gamma": gamma, "ent_coef": ent_coef}
    return SB3(space, learner, given | (settings or {}), seed=seed)


def ppo(
    space: SearchSpace,
    *,
    seed: int,
    learning_rate: float = 3e-4,
    n_steps: int = 64,
    batch_size: int = 64,
    clip_range: float = 0.2,
    gamma: float = 1.0,
    ent_coef: float = 0.0,
    invalid_reward: float = 0.0,
    settings: dict[str, Any] | None = None,
) -> SB3:
    """PPO of Stable-Baselines3, which learns from ``invalid_reward`` what it may not do.

    Args:
        invalid_reward: what an episode with an invalid decision is worth.
        settings: anything else that the learner takes.
    """
    given = {"learning_rate": learning_rate, "n_steps": n_steps, "batch_size": batch_size}
    given |= {"clip_range": clip_range, "gamma": gamma, "ent_coef": ent_coef}
    learner = _Learner("ppo", "stable_baselines3", "PPO", False, _ROLLOUTS)
    return SB3(space, learner, given | (settings or {}), seed=seed, invalid_reward=invalid_reward)


def a2c(
    space: SearchSpace,
    *,
    seed: int,
    learning_rate: float = 7e-4,
    n_steps: int = 16,
    gamma: float = 1.0,
    ent_coef: float = 0.0,
    invalid_reward: float = 0.0,
    settings: dict[str, Any] | None = None,
) -> SB3:
    """A2C of Stable-Baselines3, which learns from ``invalid_reward`` what it may not do.

    Args:
        invalid_reward: what an episode with an invalid decision is worth.
        settings: anything else that the learner takes.
    """
    given = {"learning_rate": learning_rate, "n_steps": n_steps, "gamma": gamma, "ent_coef": ent_coef}
    learner = _Learner("a2c", "stable_baselines3", "A2C", False, _ROLLOUTS)
    return SB3(space, learner, given | (settings or {}), seed=seed, invalid_reward=invalid_reward)


def dqn(
    space: SearchSpace,
    *,
    seed: int,
    learning_rate: float = 1e-3,
    learning_starts: int = 50,
    batch_size: int = 64,
    gamma: float = 1.0,
    exploration_steps: int = 1000,
    exploration_final_eps: float = 0.1,
    target_update_interval: int = 200,
    invalid_reward: float = 0.0,
    settings: dict[str, Any] | None = None,
) -> SB3:
    """DQN of Stable-Baselines3, which learns from ``invalid_reward`` what it may not do.

    Args:
        exploration_steps: decisions over which epsilon falls from 1 to ``exploration_final_eps``.
        invalid_reward: what an episode with an invalid decision is worth.
        settings: anything else that the learner takes.
    """
    given = {
        "learning_rate": learning_rate, "learning_starts": learning_starts, "batch_size": batch_size,
        "gamma": gamma, "exploration_fraction": exploration_steps / TOTAL_STEPS,
        "exploration_final_eps": exploration_final_eps, "target_update_interval": target_update_interval,
        "train_freq": 1, "buffer_size": 20_000,
    }  # fmt: skip
    learner = _Learner("dqn", "stable_baselines3", "DQN", False, None)
    return SB3(space, learner, given | (settings or {}), seed=seed, invalid_reward=invalid_reward)


_MASKABLE_ROLLOUTS = "sb3_contrib.common.maskable.buffers:MaskableRolloutBuffer"
_ROLLOUTS = "stable_baselines3.common.buffers:RolloutBuffer"


class SB3:
    """A learner of Stable-Baselines3 or sb3-contrib that takes part in a search.

    Batches: a learner on policy proposes the episodes that end within one rollout of ``n_steps``
    decisions, which may be evaluated side by side; DQN proposes one at a time.  ``ask`` answers with fewer
    than ``count`` where no more are ready.  The learner goes on when it has been told all that it proposed.
    Asked while it waits for that, it answers from its policy as it is, and does not learn from those: this
    is how networks are generated after a search.

    Replay: asked and told again in the same order, it proposes the same.  Trials it did not ask for are not
    learnt from, and architectures are repeated: a search answers those from its cache.  Without masks an
    invalid decision ends an episode at ``invalid_reward``; the search never hears of it.

    Raises:
        ConfigError: Stable-Baselines3 is not installed, or does not take a setting.
        RunError: (from ``ask``) the learner has found no valid architecture for a long time.
    """

    def __init__(
        self,
        space: SearchSpace,
        learner: _Learner,
        settings: Mapping[str, Any],
        *,
        seed: int,
        invalid_reward: float = 0.0,
    ) -> None:
        factory = _imported(learner, f"{learner.module}:{learner.attribute}")
        from ..envs.construction import ArchitectureEnv, ChainCNNEnv

        layered = hasattr(space, "layers") and len({len(d.choices) for d in space.decisions}) == 1
        kind: Any = ChainCNNEnv if layered else ArchitectureEnv
        self._space = space
        self._learner = learner
        self._slots: list[_Slot] = []
        self._ready: deque[_Slot] = deque()
        self._invalid = 0
        self._failure: BaseException | None = None
        self._search_turn, self._learner_turn = threading.Semaphore(0), threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._generators = _Generators(seed)
        self._own_environment = kind(space, lambda architecture: (0.0, {}), floor=invalid_reward)
        environment = kind(space, self._proposed, floor=invalid_reward)
        extra: dict[str, Any] = {}
        if learner.buffer is not None:
            extra["rollout_buffer_class"] = _waiting(_imported(learner, learner.buffer), self._rewards)
        try:
            with self._generators.own(), one_torch_thread():
                self._model = factory(
                    "MlpPolicy", environment, seed=seed, device="cpu", **extra, **dict(settings)
                )
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"strategy 'sb3:{learner.name}': {error}") from error

    def ask(self, count: int, context: SearchContext) -> list[Architecture]:
        """Up to ``count`` architectures: of the learner's rollout, or of its policy while it waits."""
        if all(slot.reward is not None for slot in self._slots):
            self._let_learn()
        if not self._ready:
            with self._generators.own(), one_torch_thread():
                return [self._sample() for _ in range(count)]
        taken = [self._ready.popleft() for _ in range(min(count, len(self._ready)))]
        return [slot.architecture for slot in taken]

    def tell(self, trials: Sequence[Trial]) -> None:
        """Keeps the rewards of what was asked until the learner has its turn."""
        asked = [slot for slot in self._slots if slot not in self._ready]
        for trial in trials:
            for slot in asked:
                if slot.reward is None and slot.architecture == trial.architecture:
                    slot.reward = trial.reward
                    break

    def _let_learn(self) -> None:
        """Gives the learner its turn until it needs rewards."""
        with self._generators.own():
            if self._thread is None:
                self._thread = threading.Thread(target=self._learn, name="sb3", daemon=True)
                self._thread.start()
            else:
                self._learner_turn.release()
            self._search_turn.acquire()
        if self._failure is not None:
            raise RunError(f"strategy 'sb3:{self._learner.name}' stopped: {self._failure}") from self._failure

    def _learn(self) -> None:
        """The learner's thread."""
        try:
            with one_torch_thread():
                self._model.learn(TOTAL_STEPS, callback=self._watch)
            self._failure = RunError(
                f"no valid architecture in {self._invalid} episodes; sb3:maskable-ppo sees the mask"
            )
        except BaseException as error:  # the search raises it
            self._failure = error
        self._search_turn.release()

    def _watch(self, scope: dict[str, Any], _: dict[str, Any]) -> bool:
        """Called after every decision; False ends the learner."""
        for info in scope["infos"]:
            if "invalid_action" in info:
                self._invalid = self._invalid + 1 if info["invalid_action"] else 0
        return self._invalid < INVALID_IN_A_ROW

    def _proposed(self, architecture: Architecture) -> tuple[float, dict[str, Any]]:
        """The environment's reward: NaN where it follows at the end of the rollout."""
        self._slots.append(slot := _Slot(architecture))
        self._ready.append(slot)
        return (np.nan if self._learner.buffer is not None else self._rewards()[0]), {}

    def _rewards(self) -> list[float]:
        """Waits until everything proposed has its reward; called by the learner."""
        if not self._slots:
            return []
        self._search_turn.release()
        self._learner_turn.acquire()
        slots, self._slots = self._slots, []
        return [slot.reward for slot in slots if slot.reward is not None]

    def _sample(self) -> Architecture:
        """One architecture of the policy; draws again what is not valid."""
        environment = self._own_environment
        for _ in range(INVALID_IN_A_ROW):
            seen, info = environment.reset()
            ended = False
            while not ended:
                masks = {"action_masks": environment.action_masks()} if self._learner.masked else {}
                action, _ = self._model.predict(seen, deterministic=False, **masks)
                seen, _, ended, _, info = environment.step(action)
            if not info["invalid_action"]:
                return Architecture(self._space.name, info["choices"])
        raise RunError(f"strategy 'sb3:{self._learner.name}' has learnt no valid architecture")


@dataclass(eq=False)
class _Slot:
    """One proposal and, once told, its reward."""

    architecture: Architecture
    reward: float | None = None


class _Generators:
    """The global generators of Python, NumPy and torch, as one side of a conversation left them."""

    def __init__(self, seed: int) -> None:
        self._states: Any = None
        self._seed = seed

    @contextmanager
    def own(self) -> Iterator[None]:
        """Puts this side's states in place, and the other's back."""
        import torch

        def states() -> Any:
            return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002

        def restore(saved: Any) -> None:
            random.setstate(saved[0])
            np.random.set_state(saved[1])  # noqa: NPY002
            torch.set_rng_state(saved[2])

        before = states()
        if self._states is None:
            random.seed(self._seed)
            np.random.seed(self._seed)  # noqa: NPY002
            torch.default_generator.manual_seed(self._seed)
        else:
            restore(self._states)
        try:
            yield
        finally:
            self._states = states()
            restore(before)


def _waiting(buffer: Any, rewards: Callable[[], list[float]]) -> Any:
    """A rollout buffer that has its missing rewards filled in before advantages are computed."""

    class Waiting(buffer):  # type: ignore[misc]
        def compute_returns_and_advantage(self, last_values: Any, dones: Any) -> None:
            self.rewards[np.isnan(self.rewards)] = rewards()
            super().compute_returns_and_advantage(last_values, dones)

    return Waiting


def _imported(learner: _Learner, name: str) -> Any:
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ConfigError(
            f"strategy 'sb3:{learner.name}' needs {module.partition('.')[0].replace('_', '-')}: "
            "pip install 'rlnas_fast[sb3]'"
        ) from error
