"""A memory of whole trials for methods that learn off-policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .policies import Choices, Episodes
from .surrogates import half_rank


class EpisodeMemory:
    """Keeps every finished sequence with its reward, and draws some of them at a time.

    Args:
        mask: which choices may follow a prefix, bool [choices of that decision].
        sizes: how many choices each decision has, [T].
    """

    def __init__(self, mask: Callable[[Choices], np.ndarray], sizes: Sequence[int]) -> None:
        self.sizes = tuple(sizes)
        self._mask = mask
        self._choices = np.zeros((64, len(sizes)), dtype=np.int64)
        self._masks = np.zeros((64, len(sizes), max(sizes)), dtype=bool)
        self._lengths = np.zeros(64, dtype=np.int64)
        self._rewards: list[float] = []
        self._scaled = np.zeros(0)

    def __len__(self) -> int:
        return len(self._rewards)

    def add(self, choices: Choices, reward: float) -> None:
        """Adds one sequence."""
        row = len(self)
        if row == len(self._lengths):
            self._choices = np.concatenate([self._choices, np.zeros_like(self._choices)])
            self._masks = np.concatenate([self._masks, np.zeros_like(self._masks)])
            self._lengths = np.concatenate([self._lengths, np.zeros_like(self._lengths)])
        self._choices[row, : len(choices)] = choices
        self._masks[row, :, 0] = True
        for step in range(len(choices)):
            allowed = self._mask(choices[:step])
            self._masks[row, step, : len(allowed)] = allowed
        self._lengths[row] = len(choices)
        self._rewards.append(reward)
        self._scaled = half_rank(np.array(self._rewards))

    def draw(self, count: int, rng: np.random.Generator) -> tuple[Episodes, Tensor]:
        """The latest sequence and ``count`` - 1 others, drawn uniformly, with replacement.

        Returns:
            The sequences, and their rewards on the scale of ``half_rank``: float32 [count].
        """
        rows = rng.integers(len(self), size=count)
        rows[0] = len(self) - 1
        lengths = self._lengths[rows]
        longest = int(lengths.max())
        episodes = Episodes(
            torch.from_numpy(self._choices[rows, :longest]),
            torch.from_numpy(self._masks[rows, :longest]),
            torch.from_numpy(lengths),
        )
        return episodes, torch.from_numpy(self._scaled[rows]).float()
