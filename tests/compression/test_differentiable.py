"""Gradients through masks: right for kept and pruned weights, and useful."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from rlnas_fast.compression.differentiable import Evidence, probe
from rlnas_fast.compression.layers import Masks
from rlnas_fast.compression.problem import FINE_TUNING, Problem
from rlnas_fast.errors import ConfigError
from rlnas_fast.tasks.task import Task
from rlnas_fast.training.recipe import Recipe

STILL = Recipe(learning_rate=1e-12, batch_size=64, weight_decay=0.0, label_smoothing=0.0, augment=())


def test_the_gain_is_minus_the_gradient_of_the_mask(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task, recipe=STILL)
    masks = problem.by_rule("lamp", 0.1)
    gain = probe(problem, masks, steps=1, seed=3)[2]["gain"]
    rows = torch.randperm(len(problem.data.x), generator=torch.Generator().manual_seed(3))[:64]
    weights = problem.layers.weights
    soft = {name: mask.float().requires_grad_() for name, mask in masks.items()}
    inside = {f"{name}.weight": weights[name] * soft[name] for name in masks}
    logits = functional_call(problem.model, inside, (problem.data.normalise(problem.data.x[rows]),))
    loss = F.cross_entropy(logits, problem.data.y[rows])
    expected = -torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(soft.values()))])
    # float32 sums in another order: the images of the step are shuffled.
    torch.testing.assert_close(gain, expected, rtol=1e-4, atol=1e-6)
    pruned = ~torch.cat([mask.flatten() for mask in masks.values()])
    assert bool((gain[pruned] != 0).any())


def test_a_probe_fine_tunes_a_copy_and_repeats(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task)
    before = copy.deepcopy(problem.model.state_dict())
    masks = problem.by_rule("lamp", 0.05)
    at_once = probe(problem, masks, steps=0, seed=0, gradients=False)
    assert at_once[:2] == (problem.evaluate(masks).accuracy, problem.evaluate(masks).loss)
    accuracy, loss, found = probe(problem, masks, steps=10, seed=0)
    assert loss < at_once[1]
    assert probe(problem, masks, steps=10, seed=0, gradients=False) == (accuracy, loss, {})
    again = probe(problem, masks, steps=10, seed=0)
    assert torch.equal(found["gain"], again[2]["gain"])
    assert all(torch.equal(value, before[name]) for name, value in problem.model.state_dict().items())


def test_carried_weights_go_on_where_they_were_and_those_under_the_mask_stay(
    model: nn.Module, task: Task
) -> None:
    problem = Problem(model, task, recipe=replace(FINE_TUNING, weight_decay=0.0))
    masks, start = problem.by_rule("lamp", 0.05), problem.model.state_dict()
    once = probe(problem, masks, steps=10, seed=0, gradients=False, carried=start)
    for name, mask in masks.items():
        before, after = start[f"{name}.weight"], once[2][f"{name}.weight"]
        assert torch.equal(before[~mask], after[~mask])
        assert not torch.equal(before[mask], after[mask])
    twice = probe(problem, masks, steps=10, seed=1, gradients=False, carried=once[2])
    assert twice[1] < once[1]
    forgetful = {name: value for name, value in once[2].items() if name in start}
    assert probe(problem, masks, steps=10, seed=1, gradients=False, carried=forgetful)[1] != twice[1]


@pytest.mark.parametrize(("steps", "gradients"), [(-1, False), (0, True)])
def test_steps_that_give_no_gradient_are_refused(
    model: nn.Module, task: Task, steps: int, gradients: bool
) -> None:
    problem = Problem(model, task)
    with pytest.raises(ConfigError, match=f"steps = {steps}"):
        probe(problem, problem.by_rule("lamp", 0.1), steps=steps, seed=0, gradients=gradients)


def test_evidence_starts_at_nothing_and_improves_a_mask(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task)
    sizes = [layer.weight.numel() for layer in problem.layers]
    shapes = {layer.name: layer.weight.shape for layer in problem.layers}
    start = torch.cat([layer.weight.flatten().abs().log() for layer in problem.layers])
    evidence = Evidence(torch.randn(2, sum(sizes), generator=torch.Generator().manual_seed(0)))
    assert not bool(evidence.scores.any())

    def masks() -> Masks:
        parts = torch.split(start + evidence.scores, sizes)
        pairs = zip(shapes.items(), parts, strict=True)
        return problem.project({name: part.view(shape) for (name, shape), part in pairs}, 0.03)

    losses = []
    for trial in range(12):
        _, loss, found = probe(problem, masks(), steps=5, seed=trial)
        losses.append(loss)
        evidence.add(found["gain"], 0.3)
    assert min(losses[-3:]) < losses[0]
