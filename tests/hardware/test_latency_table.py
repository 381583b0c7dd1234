from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rlnas_fast.errors import ConfigError
from rlnas_fast.hardware import latency_table
from rlnas_fast.hardware.identity import device_identity
from rlnas_fast.hardware.latency_table import Conditions, LatencyTable, make_table
from rlnas_fast.hardware.operators import operators_of
from rlnas_fast.search import Architecture, Cost, TaskSpec, sample_uniform
from rlnas_fast.spaces.macro_cnn import MacroCNN

SPEC = TaskSpec((1, 8, 8), 3)
SPACE = MacroCNN(SPEC, layers=3, width=8)


class Scripted:
    """A meter under which a call costs 2 us an operator, 1 ns a multiply-add, and 5 us at all."""

    def measure(self, call: Callable[[], Any]) -> Cost:
        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            seconds = 5e-6

            def __torch_dispatch__(
                self, function: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                out = function(*args, **(kwargs or {}))
                if not function.is_view:
                    Count.seconds += 2e-6
                    if "convolution" in str(function):
                        Count.seconds += 1e-9 * out.numel() * args[1][0].numel()
                return out

        with Count():
            call()
        return Cost(latency_s=Count.seconds)


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    conditions = Conditions("macro", device_identity("cpu"))
    return make_table(
        SPACE, SPEC, conditions, Scripted(), Scripted(), networks=30, held_out=10, most_operators=60
    )


def test_a_composition_that_is_one_is_found(table: LatencyTable) -> None:
    assert table.error < 0.03
    rng = np.random.default_rng(5)
    for _ in range(20):
        architecture = sample_uniform(SPACE, rng)
        took_s = latency_table.network_cost(SPACE, architecture, SPEC, Scripted(), 1, "cpu").latency_s
        assert table.estimate(architecture.choices)["latency_s"] == pytest.approx(took_s, rel=0.06)


def test_what_disturbs_one_round_does_not_bend_the_table(table: LatencyTable) -> None:
    class Disturbed(Scripted):
        """Every seventh measurement takes twice as long."""

        made = 0

        def measure(self, call: Callable[[], Any]) -> Cost:
            Disturbed.made += 1
            cost = super().measure(call)
            assert cost.latency_s is not None
            return Cost(latency_s=cost.latency_s * (1 + (Disturbed.made % 7 == 0)))

    meters = Disturbed(), Disturbed()
    sizes = {"networks": 30, "held_out": 10, "most_operators": 60}
    disturbed = make_table(SPACE, SPEC, table.conditions, *meters, **sizes)  # type: ignore[arg-type]
    rng = np.random.default_rng(7)
    drawn = [sample_uniform(SPACE, rng).choices for _ in range(20)]
    off = [disturbed.estimate(c)["latency_s"] / table.estimate(c)["latency_s"] - 1 for c in drawn]
    assert np.percentile(np.abs(off), 90) < 0.03  # 0.006; one round and plain least squares: 0.31


def test_parameters_and_flops_are_exact(table: LatencyTable) -> None:
    architecture = sample_uniform(SPACE, np.random.default_rng(1))
    network = SPACE.build(architecture, SPEC)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 1, 8, 8))
    estimate = table.estimate(architecture.choices)
    assert estimate["flops"] == counter.get_total_flops()
    assert estimate["parameters"] == sum(p.numel() for p in network.parameters())


def test_a_prefix_costs_what_its_cheapest_network_does(table: LatencyTable) -> None:
    rng = np.random.default_rng(2)
    for _ in range(10):
        choices = sample_uniform(SPACE, rng).choices
        for length in range(len(choices) + 1):
            cheapest = SPACE.cheapest(choices[:length])
            assert table.estimate(choices[:length]) == table.estimate(cheapest.choices)


def test_an_estimate_draws_no_random_number_and_repeats(table: LatencyTable) -> None:
    choices = sample_uniform(SPACE, np.random.default_rng(3)).choices
    before = torch.random.get_rng_state()
    first = table.of(SPACE, SPEC).estimate(choices)
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == table.of(SPACE, SPEC).estimate(choices)


def test_what_was_saved_estimates_the_same(table: LatencyTable, tmp_path: Path) -> None:
    table.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json").of(SPACE, SPEC)
    assert again == table
    choices = sample_uniform(SPACE, np.random.default_rng(4)).choices
    assert again.estimate(choices) == table.estimate(choices)
    assert pickle.loads(pickle.dumps(again)).estimate(choices) == table.estimate(choices)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"device": {"kind": "cpu", "name": "another CPU"}}, "device name .*another CPU"),
        ({"space": "cell"}, "space macro, here it is cell"),
        ({"batch": 8}, "batch 1, here it is 8"),
        ({"torch": "1.0"}, "torch"),
    ],
)
def test_other_conditions_are_refused_in_one_line(changed: dict[str, Any], says: str) -> None:
    made = Conditions("macro", device_identity("cpu"))
    with pytest.raises(ConfigError, match=says) as caught:
        made.refuse(dataclasses.replace(made, **changed), "table.json")
    assert "rlnas profile" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_board_of_the_same_kind_is_accepted() -> None:
    made = Conditions("macro", {"kind": "cuda", "name": "H200", "uuid": "a"})
    made.refuse(Conditions("macro", {"kind": "cuda", "name": "H200", "uuid": "b"}), "table.json")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "conditions": {"a": 1}}']
)
def test_a_file_that_is_no_table_is_named(content: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"table.json.*rlnas profile"):
        LatencyTable.load(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no.json cannot be read"):
        LatencyTable.load(tmp_path / "no.json")


def test_a_space_that_cannot_be_estimated_says_what_it_lacks() -> None:
    class Bare:
        name = "bare"

        def build(self, architecture: Architecture, task_spec: TaskSpec) -> nn.Module:
            return nn.Identity()

    with pytest.raises(ConfigError, match=r"'bare' cannot be profiled: it has no cheapest\(\)"):
        latency_table.require_layered(Bare())


def test_every_operator_runs_alone_and_equal_calls_have_equal_keys() -> None:
    network = SPACE.build(sample_uniform(SPACE, np.random.default_rng(6)), SPEC).eval()
    x = torch.ones(1, 1, 8, 8)
    first, second = (operators_of(network, x) for _ in range(2))
    assert [operator.key for operator in first] == [operator.key for operator in second]
    for operator in first:
        operator.alone("cpu")()
    assert {operator.key for operator in first}.isdisjoint(
        operator.key for operator in operators_of(network, torch.ones(2, 1, 8, 8)) if operator.flops
    )
    assert json.dumps([operator.key for operator in first])
