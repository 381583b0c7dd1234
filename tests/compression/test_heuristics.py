"""Published rules against small sums done by hand, and the exactness of every projection."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rlnas_fast.compression.heuristics import METHODS, check_density, project, ratio_scores, scores
from rlnas_fast.compression.layers import INT8, bits, densities, kept, prunable
from rlnas_fast.compression.operations import Groups
from rlnas_fast.errors import ConfigError


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(50, 40), nn.Linear(40, 10))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("density", [1.0, 0.5, 0.123, 0.02])
def test_every_rule_keeps_exactly_what_was_asked(method: str, density: float) -> None:
    layers = prunable(network())
    masks = project(scores(method, layers, density=density), density)
    assert kept(masks) == round(density * layers.total)


def test_uniform_keeps_the_same_share_of_every_layer() -> None:
    layers = prunable(network())
    found = densities(project(scores("uniform", layers), 0.25))
    assert all(abs(share - 0.25) <= 1 / 108 for share in found.values())


def test_uniform_plus_spares_the_first_convolution_and_a_fifth_of_the_last_layer() -> None:
    layers = prunable(network())
    found = densities(project(scores("uniform+", layers, density=0.12), 0.12))
    assert found["0"] == 1.0
    assert found["3"] == 0.2
    without_room = densities(project(scores("uniform+", layers, density=0.02), 0.02))
    assert without_room["0"] < 0.05


def test_global_keeps_the_largest_weights() -> None:
    layers = prunable(network())
    masks = project(scores("global", layers), 0.3)
    stay = torch.cat([layer.weight[masks[layer.name]].abs() for layer in layers])
    go = torch.cat([layer.weight[~masks[layer.name]].abs() for layer in layers])
    assert stay.min() >= go.max()


def test_lamp_is_the_share_of_the_squares_that_are_no_smaller() -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -3.0, 2.0]]))
        model[1].weight.fill_(5.0)
    found = scores("lamp", prunable(model))
    torch.testing.assert_close(
        found["0"], torch.tensor([[1 / 14, 1.0, 4 / 13]], dtype=torch.float64), rtol=1e-12, atol=0
    )
    assert found["1"].item() == 1.0


def test_lamp_of_equal_and_of_zero_weights_is_defined() -> None:
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
        model[1].weight.zero_()
    found = scores("lamp", prunable(model))
    assert found["0"].flatten().tolist() == [1, 1 / 2, 1 / 3, 1 / 4]
    assert found["1"].flatten().tolist() == [0, 0]


def test_erk_densities_are_in_proportion_until_a_layer_is_full() -> None:
    layers = prunable(network())
    raw = {layer.name: sum(layer.weight.shape) / layer.weight.numel() for layer in layers}
    found = densities(project(scores("erk", layers), 0.05))
    factors = {name: share / raw[name] for name, share in found.items() if share < 1}
    assert max(factors.values()) / min(factors.values()) < 1.1
    assert densities(project(scores("erk", layers), 0.5))["3"] > found["3"]


def test_ratios_say_the_proportion_of_layer_densities() -> None:
    layers = prunable(network())
    found = densities(project(ratio_scores(layers, {"0": 4.0, "2": 1.0, "3": 2.0}), 0.1))
    assert found["0"] / found["2"] == pytest.approx(4, rel=0.15)
    assert found["3"] / found["2"] == pytest.approx(2, rel=0.15)
    with pytest.raises(ConfigError, match="ratio of layer '0' is 0"):
        ratio_scores(layers, {"0": 0.0, "2": 1.0, "3": 1.0})


def test_ties_go_to_the_earlier_layer_and_weight() -> None:
    masks = project({"a": torch.zeros(2, 2), "b": torch.zeros(4)}, 5 / 8)
    assert masks["a"].all()
    assert masks["b"].tolist() == [True, False, False, False]


shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)
kinds = st.sampled_from(["weights", "rows", "tiles:4x4", "tiles:3x5", "2:4"])


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, density=st.floats(0.01, 1), seed=st.integers(0, 99), kind=kinds, int8=st.booleans())
def test_projection_is_exact_and_keeps_the_best(
    shapes: list[tuple[int, int]], density: float, seed: int, kind: str, int8: bool
) -> None:
    torch.manual_seed(seed)
    given_scores = {str(i): torch.randint(0, 5, shape).double() for i, shape in enumerate(shapes)}
    total = sum(score.numel() for score in given_scores.values())
    wanted = round(density * total)
    groups = Groups.of(kind)
    possible = sum(int(groups.possible(name, score).sum()) for name, score in given_scores.items())
    quantised = {name: torch.rand(()) < 0.5 for name in given_scores} if int8 else None
    cheap = {
        name: torch.full_like(given_scores[name], bool(q)).bool() for name, q in (quantised or {}).items()
    }
    arguments = {"groups": groups, "int8": cheap if int8 else None}
    if not 1 <= wanted <= possible:
        with pytest.raises(ConfigError):
            project(given_scores, density, **arguments)
        return
    masks = project(given_scores, density, **arguments)
    budget = 32 * wanted
    if int8:
        spare = budget - bits(masks)
        assert spare >= 0
        more = sum(
            int(((masks[name] == 0) & cheap[name] & groups.possible(name, score)).sum())
            for name, score in given_scores.items()
        )
        assert spare < 8 or not more
        assert all(bool((masks[name][cheap[name]] != 1).all()) for name in masks)
    else:
        assert kept(masks) == wanted
    if kind == "weights" and not int8:
        stay = torch.cat([score[masks[name]] for name, score in given_scores.items()])
        go = torch.cat([score[~masks[name]] for name, score in given_scores.items()])
        assert not len(go) or stay.min() >= go.max()


def test_groups_go_together_and_only_the_last_is_cut() -> None:
    score = torch.rand(12, 12)
    masks = project({"x": score}, 0.4, groups=Groups.of("tiles:4x4"))
    tiles = masks["x"].view(3, 4, 3, 4).permute(0, 2, 1, 3).reshape(9, 16).sum(1)
    assert sorted(tiles.tolist()) == [0, 0, 0, 0, 0, 10, 16, 16, 16]


def test_two_of_four() -> None:
    masks = project({"x": torch.rand(8, 16)}, 0.5, groups=Groups.of("2:4"))
    assert bool((masks["x"].view(8, 4, 4).sum(2) == 2).all())
    with pytest.raises(ConfigError, match=r"2:4 can keep at most 0\.5"):
        project({"x": torch.rand(8, 16)}, 0.6, groups=Groups.of("2:4"))


def test_int8_weights_cost_a_quarter() -> None:
    score = {"x": torch.rand(10, 10)}
    states = project(score, 0.1, int8={"x": torch.ones(10, 10, dtype=torch.bool)})
    assert kept(states) == 40
    assert bits(states) == 320
    assert bool(((states["x"] == INT8) | (states["x"] == 0)).all())


@pytest.mark.parametrize("density", [0.0, -0.1, 1.1, float("nan"), float("inf")])
def test_a_density_out_of_range_is_refused(density: float) -> None:
    with pytest.raises(ConfigError, match="density"):
        project({"x": torch.rand(4, 4)}, density)


def test_a_budget_that_the_smallest_layer_cannot_meet_is_refused() -> None:
    layers = prunable(network())
    with pytest.raises(ConfigError, match=r"smallest layer, '0', has 108 weights .* give at least 0\.0093"):
        check_density(0.001, layers)
    check_density(0.01, layers)


def test_nan_scores_and_unknown_methods_are_refused() -> None:
    with pytest.raises(ConfigError, match="scores of layer 'x' hold NaN"):
        project({"x": torch.tensor([[1.0, torch.nan]])}, 0.5)
    with pytest.raises(ConfigError, match="did you mean 'lamp'"):
        scores("lamb", prunable(network()))
