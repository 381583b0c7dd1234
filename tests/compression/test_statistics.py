"""The state of a layer against plain sums, and the autoencoder that judges alterations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlnas_fast.compression.autoencoder import Autoencoder
from rlnas_fast.compression.layers import masked, prunable
from rlnas_fast.compression.problem import Problem
from rlnas_fast.compression.statistics import BATCH, observe, weight_entropy
from rlnas_fast.tasks.task import Task


def test_entropy_of_one_value_two_values_and_a_spread() -> None:
    assert weight_entropy(torch.full((5, 5), 3.0)) == 0
    assert weight_entropy(torch.tensor([-1.0, 1.0] * 50)) == pytest.approx(math.log(2) / math.log(64))
    assert weight_entropy(torch.randn(20_000) * 7) == pytest.approx(3.494 / math.log(64), abs=0.01)


def test_states_are_plain_statistics_and_change_nothing(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task)
    before = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    masks = problem.by_rule("lamp", 0.3)
    found = observe(
        problem.model, problem.layers, masks, problem.data, density=0.25, undecided=frozenset(["3", "5"])
    )
    x = problem.data.normalise(problem.data.x[:BATCH])
    with masked(problem.model, masks):
        weight = problem.layers.layers[1].module.weight
        hidden = problem.model[:4](x)
        (gradient,) = torch.autograd.grad(F.cross_entropy(problem.model(x), problem.data.y[:BATCH]), weight)
        weight, hidden = weight.detach(), hidden.detach()
        assert found["3"].weight_mean == pytest.approx(float(weight.mean()), rel=1e-5)
        assert found["3"].weight_variance == pytest.approx(float(weight.var(correction=0)), rel=1e-5)
    assert found["3"].activation_mean == pytest.approx(float(hidden.mean()), rel=1e-5)
    assert found["3"].activation_variance == pytest.approx(float(hidden.var(correction=0)), rel=1e-5)
    assert found["3"].activation_sparsity == pytest.approx(float((hidden <= 0).double().mean()))
    assert found["3"].gradient_mean == pytest.approx(float(gradient.mean()), rel=1e-4)
    assert found["3"].gradient_variance == pytest.approx(float(gradient.var(correction=0)), rel=1e-4)
    assert [found[name].place for name in ("1", "3", "5")] == [0, 0.5, 1]
    assert found["3"].density == pytest.approx(float(masks["3"].double().mean()))
    assert found["3"].density_before == pytest.approx(0.3, abs=1e-4)
    left = 0.25 * problem.layers.total - int(masks["1"].sum())
    assert found["3"].budget == pytest.approx(left / 31_000)
    assert found["3"].vector().shape == (15,)
    assert bool(torch.isfinite(found["3"].vector()).all())
    assert all(torch.equal(t, before[name]) for name, t in problem.model.state_dict().items())
    assert all(parameter.grad is None for parameter in problem.model.parameters())
    assert not any(module._forward_hooks for module in problem.model.modules())


def test_the_autoencoder_learns_the_weights_and_sees_what_is_taken(model: nn.Module) -> None:
    layers = prunable(model)
    untrained, trained = Autoencoder(layers, steps=0), Autoencoder(layers)
    weight = layers.weights["3"]
    assert trained.error("3", weight) < 0.9 * untrained.error("3", weight)
    errors = [
        trained.error("3", torch.where(weight.abs() > bar, weight, torch.zeros_like(weight)))
        for bar in (0.0, 0.05, 0.1, 10.0)
    ]
    assert errors == sorted(errors)
    assert errors[-1] > errors[0]
    assert trained.errors("3", weight).shape == (100 * 19,)
    assert torch.equal(trained.errors("3", weight), Autoencoder(layers).errors("3", weight)), "seeded"
