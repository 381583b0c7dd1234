"""Masks evaluated on a task: counted, remembered, fine-tuned, and the model left as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from rlnas_fast.compression import problem as problems
from rlnas_fast.compression.layers import INT8, KEEP, masked
from rlnas_fast.compression.operations import Groups
from rlnas_fast.compression.problem import Prices, Problem, fine_tune
from rlnas_fast.errors import ConfigError, ShapeError
from rlnas_fast.storage.measurement_cache import SqliteCache
from rlnas_fast.tasks.task import Task


def test_evaluation_is_that_of_the_masked_network_and_counts_once(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    masks = problem.by_rule("lamp", 0.2)
    found = problem.evaluate(masks)
    with masked(model, masks):
        expected = problem.accuracy(model)
    assert (found.accuracy, found.loss) == expected
    assert (found.density, found.bits) == (10_040 / 50_200, 32 * 10_040)
    assert problem.evaluate({name: mask.clone() for name, mask in masks.items()}) is found
    assert problem.evaluations == 1
    tuned = problem.evaluate(masks, fine_tune_steps=20)
    assert tuned.loss < found.loss
    assert problem.evaluations == 2
    assert problem.evaluate(masks, fine_tune_steps=20) == tuned
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(torch.equal(t, before[name]) for name, t in problem.model.state_dict().items())


def test_evaluations_outlive_the_process_and_are_not_made_again(
    model: nn.Module, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with SqliteCache(tmp_path / "log.sqlite") as log:
        first = Problem(model, task, memory=log)
        masks = first.by_rule("erk", 0.1)
        before = first.evaluate(masks), first.evaluate(masks, 3)

    def refuse(*_: object) -> None:
        raise AssertionError("evaluated again")

    with SqliteCache(tmp_path / "log.sqlite") as log:
        second = Problem(model, task, memory=log)
        with monkeypatch.context() as patch:
            patch.setattr(second, "_evaluate", refuse)
            again = second.evaluate(masks), second.evaluate(masks, 3)
        assert second.evaluations == 2, "a budget counts what was remembered too"
        assert [(e.accuracy, e.loss) for e in again] == [(e.accuracy, e.loss) for e in before]
        with torch.no_grad():
            model[1].weight[0, 0] += 1
        other = Problem(model, task, memory=log)
        monkeypatch.setattr(other, "_evaluate", refuse)
        with pytest.raises(AssertionError, match="evaluated again"):
            other.evaluate(masks)  # of another network


def test_gradients_are_recalled_with_the_evaluation_that_found_them(
    model: nn.Module, task: Task, tmp_path: Path
) -> None:
    asked = []

    def answer() -> tuple[float, float, dict[str, torch.Tensor]]:
        asked.append(1)
        return 0.5, float("inf"), {"gain": torch.arange(3.0)}

    def recall() -> tuple[float, float, dict[str, torch.Tensor]]:
        with SqliteCache(tmp_path / "log.sqlite") as log:
            problem = Problem(model, task, memory=log, gains=tmp_path / "gains")
            return problem.recall("probe 0", problem.by_rule("lamp", 0.1), answer)

    for _ in range(2):
        accuracy, loss, found = recall()
        assert (accuracy, loss, found["gain"].tolist()) == (0.5, float("inf"), [0, 1, 2])
    assert len(asked) == 1
    for file in (tmp_path / "gains").iterdir():
        file.unlink()
    recall()
    assert len(asked) == 2, "without its gradient an evaluation is made again"


def test_fine_tuning_keeps_zeros_and_improves(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task)
    masks = problem.by_rule("lamp", 0.05)
    tuned = problem.fine_tune(masks, epochs=2)
    assert problem.accuracy(tuned)[0] > problem.evaluate(masks).accuracy
    for layer in problem.layers:
        weight = tuned.get_submodule(layer.name).weight
        assert type(weight) is nn.Parameter
        assert bool((weight[~masks[layer.name]] == 0).all())
    untouched = fine_tune(model, {"1": masks["1"]}, problem.data, 0)
    assert torch.equal(untouched[3].weight, model[3].weight)


def test_fine_tuning_rounds_int8_weights_to_one_scale_a_tile(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task, groups=Groups.of("tiles:20x16"))
    states = {layer.name: torch.full_like(layer.weight, KEEP, dtype=torch.uint8) for layer in problem.layers}
    states["3"][:] = INT8
    tuned = problem.fine_tune(states, epochs=1)
    tile = tuned.get_submodule("3").weight[:20, :16].detach()
    steps = tile / (tile.abs().max() / 127)
    torch.testing.assert_close(steps, steps.round(), atol=2e-3, rtol=0)
    assert not torch.equal(tile, model[3].weight[:20, :16])


def test_a_head_of_another_size_is_refused(model: nn.Module, task: Task) -> None:
    model[5] = nn.Linear(100, 7)
    with pytest.raises(ShapeError, match="task 'digits' has 10 classes, the model's head answers with 7"):
        Problem(model, task)


def test_images_of_another_size_are_refused(task: Task) -> None:
    with pytest.raises(ShapeError, match="does not take the images"):
        Problem(nn.Sequential(nn.Flatten(), nn.Linear(9, 10)), task)


def test_masks_must_name_every_layer(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task)
    masks = problem.by_rule("lamp", 0.5)
    with pytest.raises(ConfigError, match="layer '1' has no mask"):
        problem.evaluate({"3": masks["3"], "5": masks["5"]})
    with pytest.raises(ConfigError, match="a mask names '9'"):
        problem.evaluate(masks | {"9": masks["3"]})


def test_the_reward_is_accuracy_minus_what_is_charged() -> None:
    prices = Prices(density=0.5, reconstruction=0.1, latency_ms=0.01)
    found = prices.reward(0.9, density=0.2, reconstruction=0.3, latency_s=2e-3)
    assert found == pytest.approx(0.9 - 0.1 - 0.03 - 0.02)
    with pytest.raises(ConfigError, match="price of density = -1"):
        Prices(density=-1)
    with pytest.raises(ConfigError, match="latency_batch = 0"):
        Prices(latency_batch=0)


def test_fine_tuning_has_a_recipe_of_its_own() -> None:
    assert problems.FINE_TUNING.label_smoothing == 0


def test_layers_that_share_through_views_are_left_alone_in_the_copy_too(
    model: nn.Sequential, task: Task
) -> None:
    model.append(nn.Linear(10, 10))
    model.append(nn.Linear(10, 10))
    model[7].weight = nn.Parameter(model[6].weight.detach())
    problem = Problem(model, task)
    assert [layer.name for layer in problem.layers] == ["1", "3", "5"]
    assert all(layer.module is problem.model.get_submodule(layer.name) for layer in problem.layers)
    assert [entry.name for entry in problem.layers.skipped] == ["6", "7"]
