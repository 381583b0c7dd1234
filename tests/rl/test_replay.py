"""The memory gives back what was put in."""

from __future__ import annotations

import numpy as np
import torch

from rlnas_fast.rl.replay import EpisodeMemory
from rlnas_fast.rl.surrogates import half_rank

SIZES = (3, 2, 4)


def mask(prefix: tuple[int, ...]) -> np.ndarray:
    valid = np.ones(SIZES[len(prefix)], dtype=bool)
    if prefix and prefix[-1] < len(valid):
        valid[prefix[-1]] = False  # no choice follows itself
    return valid


def test_draws_the_latest_and_others_with_their_masks_and_scaled_rewards() -> None:
    memory = EpisodeMemory(mask, SIZES)
    rng = np.random.default_rng(0)
    kept = [(int(rng.integers(3)), int(rng.integers(2)), int(rng.integers(4))) for _ in range(150)]
    kept = [choices if i % 3 else choices[:1] for i, choices in enumerate(kept)]
    rewards = rng.standard_normal(150)
    for choices, reward in zip(kept, rewards, strict=True):
        memory.add(choices, float(reward))
    assert len(memory) == 150
    episodes, scaled = memory.draw(400, rng)
    assert episodes.masks.shape == (400, 3, 4)
    by_scaled = dict(zip(half_rank(rewards).astype(np.float32).tolist(), kept, strict=True))
    assert scaled[0] == np.float32(half_rank(rewards)[-1])
    for row, value in enumerate(scaled.tolist()):
        choices = by_scaled[value]
        length = int(episodes.lengths[row])
        assert tuple(episodes.choices[row, :length].tolist()) == choices
        assert episodes.present[row].sum() == len(choices)
        for step in range(3):
            expected = torch.zeros(4, dtype=torch.bool)
            if step < length:
                expected[: SIZES[step]] = torch.from_numpy(mask(choices[:step]))
            expected[0] |= step >= length
            assert torch.equal(episodes.masks[row, step], expected)
    assert len(set(scaled.tolist())) > 100


def test_a_batch_of_short_sequences_is_not_padded_further_than_needed() -> None:
    memory = EpisodeMemory(mask, SIZES)
    memory.add((2,), 0.0)
    episodes, scaled = memory.draw(5, np.random.default_rng(0))
    assert episodes.choices.tolist() == [[2]] * 5
    assert scaled.tolist() == [0.0] * 5
