"""What a policy sees of every weight."""

from __future__ import annotations

import torch
from torch import nn

from rlnas_fast.compression.autoencoder import Autoencoder
from rlnas_fast.compression.features import features
from rlnas_fast.compression.problem import Problem
from rlnas_fast.tasks.task import Task


def test_features_are_standardised_and_tell_weights_apart(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task)
    plain = features(problem)
    full = features(problem, Autoencoder(problem.layers, steps=5))
    assert plain.shape == (6, problem.layers.total)
    assert full.shape == (7, problem.layers.total)
    for known in (plain, full):
        torch.testing.assert_close(known.mean(1), torch.zeros(len(known)), atol=1e-3, rtol=0)
        torch.testing.assert_close(known.std(1), torch.ones(len(known)), atol=1e-3, rtol=0)
