"""The document's own procedure: exact at the end, resumed where it stopped, its parts as it names them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rlnas_fast.compression.layers import bits, check_masks, kept
from rlnas_fast.compression.layerwise import Layerwise, Procedure, sample_action
from rlnas_fast.compression.operations import Groups
from rlnas_fast.compression.problem import Problem
from rlnas_fast.errors import RunError
from rlnas_fast.tasks.task import Task

SHORT = Procedure(steps=2, subset=0.4)


class Stopped(Exception):
    pass


def test_actions_are_drawn_as_the_probabilities_say() -> None:
    log_probabilities = torch.tensor([[0.1, 0.6, 0.3, 0.0]]).log().expand(20_000, 4)
    drawn = sample_action(log_probabilities, torch.Generator().manual_seed(0))
    shares = drawn.bincount(minlength=4) / len(drawn)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.6, 0.3, 0.0]), atol=0.01, rtol=0)
    assert shares[3] == 0


@pytest.mark.parametrize(("groups", "int8"), [("weights", False), ("tiles:16x16", True), ("rows", False)])
def test_every_layer_has_its_steps_and_the_density_is_exact(
    groups: str, int8: bool, model: nn.Module, task: Task
) -> None:
    problem = Problem(model, task, groups=Groups.of(groups))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    network, masks, history = Layerwise(problem, 0.2, procedure=SHORT, int8=int8, seed=3).run()
    check_masks(problem.layers, masks)
    assert [(row["layer"], row["step"]) for row in history] == [
        (n, s) for n in ("1", "3", "5") for s in (0, 1)
    ]
    if int8:
        assert 0 <= 32 * 10_040 - bits(masks) < 32
        assert any(row["actions"]["quantise"] for row in history)
    else:
        assert kept(masks) == 10_040
        assert not any(row["actions"]["quantise"] for row in history)
    assert any(row["density"] < 1 for row in history)
    assert type(network) is type(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_policy_learns_from_rewards(model: nn.Module, task: Task) -> None:
    run = Layerwise(Problem(model, task, groups=Groups.of("rows")), 0.2, procedure=SHORT)
    x, actions = torch.randn(50, 19), torch.ones(50, dtype=torch.int64)  # all prune

    def chance() -> float:
        return float(run._policy(x).exp()[:, 1].mean().detach())

    before = chance()
    for reward in (0.0, 1.0):  # the first has nothing to be compared with
        old = run._policy(x).detach()[:, 1]
        run._update(x, actions, old, reward)
    liked = chance()
    assert liked > before
    for reward in (-5.0, -9.0):
        run._update(x, actions, run._policy(x).detach()[:, 1], reward)
    assert chance() < liked


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_stopped_procedure_ends_as_an_undisturbed_one(
    after: int, model: nn.Module, task: Task, tmp_path: Path
) -> None:
    problem = Problem(model, task, groups=Groups.of("tiles:16x16"))

    def stop(done: int, total: int) -> None:
        if done == after:
            raise Stopped

    whole = Layerwise(problem, 0.2, procedure=SHORT, int8=True).run()
    with pytest.raises(Stopped):
        Layerwise(problem, 0.2, procedure=SHORT, int8=True, folder=tmp_path, on_step=stop).run()
    seen: list[int] = []
    again = Layerwise(
        problem,
        0.2,
        procedure=SHORT,
        int8=True,
        folder=tmp_path,
        on_step=lambda done, total: seen.append(done),
    ).run()
    assert seen == list(range(after + 1, 7))
    assert again[2] == whole[2]
    assert all(torch.equal(again[1][name], mask) for name, mask in whole[1].items())
    assert all(
        torch.equal(tensor, whole[0].state_dict()[name]) for name, tensor in again[0].state_dict().items()
    )
    with pytest.raises(RunError, match="was made with other settings"):
        Layerwise(problem, 0.3, procedure=SHORT, int8=True, folder=tmp_path)
    (tmp_path / "layerwise.safetensors").write_bytes(b"x")
    with pytest.raises(RunError, match="cannot be read"):
        Layerwise(problem, 0.2, procedure=SHORT, int8=True, folder=tmp_path)
