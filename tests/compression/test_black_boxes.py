"""Optimisers that see rewards alone."""

from __future__ import annotations

import torch

from rlnas_fast.compression.black_boxes import CrossEntropy, Random


def test_cross_entropy_finds_what_random_draws_do_not() -> None:
    target = torch.tensor([0.5, -0.4, 0.3])

    def last_distance(sampler: CrossEntropy | Random) -> float:
        distances = []
        for _ in range(120):
            numbers = sampler.act()
            distances.append(float((numbers - target).norm()))
            sampler.learn(-distances[-1])
        return sum(distances[-12:]) / 12

    deviation = torch.full((3,), 0.3)
    assert sum(last_distance(CrossEntropy(deviation, seed=seed)) for seed in range(5)) / 5 < 0.35
    assert sum(last_distance(Random(deviation, seed=seed)) for seed in range(5)) / 5 > 0.7
