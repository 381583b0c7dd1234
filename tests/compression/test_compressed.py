"""Compressed networks: the same function as their dense twin, trained, saved, read again, timed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from rlnas_fast.compression.compressed import Compressed
from rlnas_fast.compression.latency import density_within, side_by_side, twins
from rlnas_fast.compression.layers import INT8, KEEP, Layout, masked, prunable
from rlnas_fast.compression.operations import Groups, gathering
from rlnas_fast.compression.problem import Problem
from rlnas_fast.errors import ConfigError, DataError
from rlnas_fast.networks import make_network
from rlnas_fast.search import Cost, TaskSpec
from rlnas_fast.tasks.task import Task

SPEC = TaskSpec((1, 8, 8), 10)


def some_masks(model: nn.Module, layout: Layout, int8: bool) -> dict[str, torch.Tensor]:
    """Random weights within random tiles, some of them int8."""
    found = {}
    for layer in prunable(model):
        number = Groups("tiles", layout).numbers(layer.name, layer.weight)
        state = torch.randint(0, 3 if int8 else 2, (int(number.max()) + 1,), dtype=torch.uint8)
        found[layer.name] = state[number] * (torch.rand(layer.weight.shape) < 0.7)
    return found


@pytest.mark.parametrize("name", ["lenet-300-100", "small-cnn"])
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("gather", [False, True])
def test_kernels_dense_twin_and_masked_original_agree_and_are_saved(
    name: str, int8: bool, gather: bool, tmp_path: Path
) -> None:
    model = make_network(name, SPEC).eval()
    layers = prunable(model)
    squares = {layer.name: layer.weight.square() for layer in layers}
    layout = Layout((8, 16), gathering(layers, squares, (8, 16)) if gather else {})
    masks = some_masks(model, layout, int8)
    compressed = Compressed.of(model, masks, layout)
    dense, x = compressed.to_dense(), torch.randn(6, 1, 8, 8)
    assert not any("Masked" in type(module).__name__ for module in dense.modules())
    with masked(model, masks, layout), torch.no_grad():
        expected = model(x)
        twin = {layer.name: layer.weight.clone() for layer in layers}
    with torch.no_grad():
        torch.testing.assert_close(compressed(x), expected)
        torch.testing.assert_close(dense(x), expected)
    for layer in prunable(dense):
        torch.testing.assert_close(layer.weight, twin[layer.name], rtol=0, atol=0)
    compressed.save(tmp_path, {"origin": None})
    again = Compressed.load(tmp_path, make_network(name, SPEC, seed=5))
    with torch.no_grad():
        torch.testing.assert_close(again(x), compressed(x))  # each packs for the kernel that was fastest then
    for layer in prunable(again.to_dense()):
        torch.testing.assert_close(layer.weight, twin[layer.name], rtol=0, atol=0)
    whole = sum(p.numel() * 4 for p in model.parameters())
    assert (tmp_path / "compressed.safetensors").stat().st_size < whole


def test_fine_tuning_on_masked_kernels_is_that_of_the_masked_twin(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task)
    masks = problem.by_rule("lamp", 0.1)
    compressed = Compressed.of(model, masks)
    result = compressed.fine_tune(problem.data, 1, problem.recipe)
    twin = problem.fine_tune(masks, 1)
    assert result.accuracy == pytest.approx(problem.accuracy(twin)[0], abs=0.02)
    assert problem.accuracy(compressed)[1] == pytest.approx(problem.accuracy(twin)[1], rel=2e-2)
    for layer in prunable(compressed.to_dense()):
        name = layer.name
        assert bool((layer.weight[~masks[name]] == 0).all())


def test_int8_tiles_stay_rounded_while_they_are_trained(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task, groups=Groups.of("tiles:20x16"))
    states = {layer.name: torch.full_like(layer.weight, INT8, dtype=torch.uint8) for layer in problem.layers}
    states["5"][:] = KEEP
    compressed = Compressed.of(model, states, problem.groups.layout)
    before = problem.accuracy(compressed)[1]
    compressed.fine_tune(problem.data, 2, problem.recipe)
    assert problem.accuracy(compressed)[1] < before
    torch.testing.assert_close(problem.accuracy(compressed.to_dense())[1], problem.accuracy(compressed)[1])
    tile = prunable(compressed.to_dense()).weights["3"][:20, :16]
    steps = tile / (tile.abs().max() / 127)
    torch.testing.assert_close(steps, steps.round(), atol=2e-3, rtol=0)


def test_a_layer_that_is_there_twice_and_tied_weights_are_saved(tmp_path: Path) -> None:
    twice, first, second = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    model = nn.Sequential(twice, nn.ReLU(), twice, first, second).eval()
    mask = torch.rand(8, 8) < 0.5
    compressed = Compressed.of(model, {"0": mask}, Layout((4, 4)))
    x = torch.randn(3, 8)
    with masked(model, {"0": mask}):
        torch.testing.assert_close(compressed(x), model(x))
    compressed.save(tmp_path, {})
    again = Compressed.load(tmp_path, model)
    torch.testing.assert_close(again(x), compressed(x))
    assert again.network[0] is again.network[2]


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    model = make_network("lenet-300-100", SPEC)
    compressed = Compressed.of(model, some_masks(model, Layout(), True))
    with pytest.raises(DataError, match="holds no compressed network"):
        Compressed.load(tmp_path, model)
    compressed.save(tmp_path, {})
    with pytest.raises(DataError, match="is of another network"):
        Compressed.load(tmp_path, make_network("small-cnn", SPEC))
    with pytest.raises(DataError, match=r"layer '1' does not fit the network: (bits|state)"):
        Compressed.load(tmp_path, make_network("lenet-300-100", TaskSpec((1, 9, 9), 10)))
    description = json.loads((tmp_path / "compressed.json").read_text())
    (tmp_path / "compressed.json").write_text(json.dumps(description | {"format": 99}))
    with pytest.raises(DataError, match="has format 99"):
        Compressed.load(tmp_path, model)
    description["layers"]["1"]["tile"] = ["rm", 0]
    (tmp_path / "compressed.json").write_text(json.dumps(description))
    with pytest.raises(DataError, match="layer '1' does not fit"):
        Compressed.load(tmp_path, model)
    (tmp_path / "compressed.json").write_text("{")
    with pytest.raises(DataError, match="holds no compressed network"):
        Compressed.load(tmp_path, model)
    compressed.save(tmp_path, {})
    whole = (tmp_path / "compressed.safetensors").read_bytes()
    (tmp_path / "compressed.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        Compressed.load(tmp_path, model)


def test_masked_kernels_answer_on_the_test_split_as_the_dense_twin_does(model: nn.Module, task: Task) -> None:
    problem = Problem(model, task, groups=Groups.of("tiles"))
    found = twins(problem, problem.by_rule("lamp", 0.1), epochs=1, batch=8, rounds=1)
    assert abs(found.accuracy - found.dense_accuracy) < 1e-4
    assert found.density == 0.1
    assert set(found.timing.latency_s) == {"before", "masked", "dense"}


class Clock:
    """A meter that says a network takes a millisecond for every kept weight in a thousand."""

    def __init__(self) -> None:
        self.calls = 0

    def measure(self, call: object) -> Cost:
        self.calls += 1
        return Cost(latency_s=float(self.calls), caveats=(f"call {self.calls}",))


def test_networks_are_timed_in_turns() -> None:
    found = side_by_side({"a": nn.Identity(), "b": nn.Identity()}, torch.zeros(4, 1), rounds=2, meter=Clock())
    assert found.latency_s == {"a": 2.0, "b": 3.0}  # calls 1 and 3, 2 and 4
    assert found.speedup == {"a": 1.0, "b": (1 / 2 + 3 / 4) / 2}
    assert found.batch == 4
    assert len(found.caveats) == 1


def test_a_latency_limit_lowers_the_density_or_is_out_of_reach(
    model: nn.Module, task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(model, task)

    def timed(networks: dict[str, nn.Module], x: torch.Tensor, *, rounds: int) -> object:
        (name, network), *_ = networks.items()
        kept = sum(layer.mask.nonzeros() for layer in network.layers().values())
        return type("T", (), {"latency_s": {name: 1e-6 * kept}})

    monkeypatch.setattr("rlnas_fast.compression.latency.side_by_side", timed)
    within = {"method": "lamp", "int8": False, "batch": 4}
    assert density_within(problem, 0.1, 5.03, **within) == (0.1, ())
    density, caveats = density_within(problem, 0.5, 2.51, **within)
    assert 0.045 < density <= 0.05
    assert "instead of 0.5" in caveats[0]
    with pytest.raises(ConfigError, match=r"max_latency_ms = 0\.01: even with 0\.1 % of its weights"):
        density_within(problem, 0.5, 0.01, **within)
