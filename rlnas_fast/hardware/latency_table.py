"""What the networks of a space cost on a device, estimated: a table of operators and how they add up."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from ..errors import ConfigError, MeterError
from ..search import Architecture, Cost, Meter, SearchSpace, TaskSpec, sample_uniform
from .operators import Operator, operators_of

FORMAT = 1
TRACED = 200
LEAST_SECONDS = 1e-7
ROUNDS = 2
REWEIGHTINGS = 10


class LayeredSpace(SearchSpace, Protocol):
    """A space whose networks can be built, and estimated before they are decided to the end."""

    def build(self, architecture: Architecture, task_spec: TaskSpec) -> nn.Module: ...

    def cheapest(self, prefix: tuple[int, ...]) -> Architecture:
        """The cheapest network that begins with ``prefix`` and in which all of it has an effect."""
        ...


@dataclass(frozen=True)
class Conditions:
    """What a table holds for, and nothing else.

    Attributes:
        space: the space and its options.
        device: what it was measured on (``identity.device_identity``).
        batch: samples in one pass.
        torch: version of PyTorch.
    """

    space: str
    device: Mapping[str, str]
    batch: int = 1
    torch: str = str(torch.__version__)

    def refuse(self, other: Conditions, name: str) -> None:
        """Raises ConfigError, which says what differs, unless a table for ``self`` holds for ``other``."""
        here, there = self._settings(), other._settings()
        for what, value in here.items():
            if there.get(what) != value:
                raise ConfigError(
                    f"the latency table {name} was made for {what} {value}, here it is {there.get(what)}: "
                    "make one with `rlnas profile`"
                )

    def _settings(self) -> dict[str, str]:
        """One board of a kind stands for another: what tells them apart is not compared."""
        own = {f"device {what}": value for what, value in self.device.items() if what != "uuid"}
        return own | {"space": self.space, "batch": str(self.batch), "torch": self.torch}


@dataclass
class LatencyTable:
    """A ``CostModel``: latency, parameters and FLOPs of the cheapest network that begins with a prefix.

    The latency is a + b x operators + the sum of c_kind x seconds of each operator run alone.  Operators
    that were not measured are taken to cost what their kind does for as many FLOPs and bytes.

    Attributes:
        conditions: what it holds for.
        operators: seconds of one call of each operator measured.
        kinds: by kind of operator: seconds a call, a FLOP and a byte.
        weights: a, b and c by name of the kind; "" for kinds that have none of their own.
        error: 90 % of networks that it was not fitted on were within this of what was measured, relative.
        networks: how many were fitted on, and how many held out for ``error``.
    """

    conditions: Conditions
    operators: dict[str, float]
    kinds: dict[str, tuple[float, float, float]]
    weights: dict[str, float]
    error: float
    networks: tuple[int, int]
    space: LayeredSpace | None = field(default=None, repr=False, compare=False)
    task_spec: TaskSpec | None = field(default=None, repr=False, compare=False)
    _known: dict[tuple[int, ...], dict[str, float]] = field(default_factory=dict, repr=False, compare=False)

    def of(self, space: LayeredSpace, task_spec: TaskSpec) -> LatencyTable:
        """The same table for the space that it was made for."""
        require_layered(space)
        other = copy.copy(self)
        other.space, other.task_spec, other._known = space, task_spec, {}
        return other

    @property
    def errors(self) -> dict[str, float]:
        """How far an estimate may be off, relative, by the name of the cost."""
        return {"latency_s": self.error, "parameters": 0.0, "flops": 0.0}

    def estimate(self, prefix: tuple[int, ...]) -> Mapping[str, float]:
        """Seconds, parameters, FLOPs (of one sample) of the cheapest network that begins with ``prefix``."""
        assert self.space is not None
        if prefix not in self._known:
            choices = self.space.cheapest(prefix).choices
            self._known[prefix] = self._known.get(choices) or self._estimate(choices)
            self._known[choices] = self._known[prefix]
        return self._known[prefix]

    def _estimate(self, choices: tuple[int, ...]) -> dict[str, float]:
        assert self.space is not None
        assert self.task_spec is not None
        architecture = Architecture(self.space.name, choices)
        device = self.conditions.device["kind"]
        network = built(self.space, architecture, self.task_spec).to(device)
        found = operators_of(network, _input(self.task_spec, self.conditions.batch).to(device))
        return {
            "latency_s": self.latency_s(found),
            "parameters": float(sum(p.numel() for p in network.parameters() if p.requires_grad)),
            "flops": float(sum(operator.flops for operator in found) // self.conditions.batch),
        }

    def latency_s(self, operators: list[Operator]) -> float:
        """Seconds of a network that consists of ``operators``."""
        features = _features(operators, self.seconds_of)
        total = sum(self.weights.get(name, self.weights[""]) * value for name, value in features.items())
        return max(total, LEAST_SECONDS)

    def seconds_of(self, operator: Operator) -> float:
        """Seconds of one operator alone, as measured or, if it was not, as its kind costs."""
        if operator.key in self.operators:
            return self.operators[operator.key]
        call, flop, byte = self.kinds.get(operator.kind, self.kinds[""])
        return call + flop * operator.flops + byte * operator.bytes_moved

    def save(self, file: Path) -> None:
        """Writes the table as JSON."""
        record = {
            "format": FORMAT,
            "conditions": vars(self.conditions) | {"device": dict(self.conditions.device)},
            "error": self.error,
            "networks": self.networks,
            "weights": self.weights,
            "kinds": self.kinds,
            "operators": self.operators,
        }
        file.write_text(json.dumps(record, indent=1) + "\n")

    @staticmethod
    def load(file: Path) -> LatencyTable:
        """Reads what ``save`` wrote.

        Raises:
            ConfigError: the file cannot be read or is not such a table.
        """
        try:
            record: dict[str, Any] = json.loads(file.read_text())
            if record["format"] != FORMAT:
                raise ConfigError(
                    f"the latency table {file} has format {record['format']}, this version reads {FORMAT}: "
                    "make one with `rlnas profile`"
                )
            return LatencyTable(
                Conditions(**record["conditions"]),
                record["operators"],
                {kind: (cost[0], cost[1], cost[2]) for kind, cost in record["kinds"].items()},
                record["weights"],
                record["error"],
                (record["networks"][0], record["networks"][1]),
            )
        except OSError as error:
            raise ConfigError(f"the latency table {file} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, IndexError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"{file} is not a latency table ({type(error).__name__}: {error}): "
                "make one with `rlnas profile`"
            ) from error


def make_table(
    space: LayeredSpace,
    task_spec: TaskSpec,
    conditions: Conditions,
    meter: Meter,
    operator_meter: Meter,
    *,
    networks: int = 40,
    held_out: int = 20,
    most_operators: int = 600,
    seed: int = 0,
    device: str = "cpu",
    on_step: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> LatencyTable:
    """Measures operators and whole networks of ``space`` and fits how the ones make up the others.

    Each is measured twice, in an order drawn anew, and the lesser counts: what disturbs a measurement
    makes it longer, and seldom comes twice at the same place.

    Args:
        conditions: what will be measured here, for the record.
        meter: for whole networks, as a search measures them.
        operator_meter: for operators, of which there are hundreds.
        networks: random networks that the composition is fitted on.
        held_out: further ones that tell how far off an estimate may be.
        most_operators: how many to measure, the most frequent first.
        on_step: hears how it goes on.
    Raises:
        ConfigError: the space cannot be estimated, see ``LayeredSpace``.
        MeterError: the device cannot be measured.
    """
    require_layered(space)
    rng = np.random.default_rng(seed)
    x = _input(task_spec, conditions.batch).to(device)

    def traced(architecture: Architecture) -> list[Operator]:
        return operators_of(built(space, architecture, task_spec).to(device), x)

    drawn = [space.cheapest(()), *(sample_uniform(space, rng) for _ in range(networks + held_out - 1))]
    rng.shuffle(drawn)
    found_in = [traced(architecture) for architecture in drawn]
    more = [traced(sample_uniform(space, rng)) for _ in range(TRACED)]
    counted = Counter(operator.key for found in found_in + more for operator in found)
    by_key = {operator.key: operator for found in found_in + more for operator in found}
    wanted = [by_key[key] for key, _ in counted.most_common(most_operators)]
    seconds: dict[str, float] = {}
    measured_s = [math.inf] * len(drawn)
    for round_ in range(ROUNDS):
        for done, number in enumerate(rng.permutation(len(wanted)), round_ * len(wanted)):
            on_step("operators", done, ROUNDS * len(wanted))
            operator = wanted[number]
            took_s = _latency_s(_measured(operator_meter, operator.alone(device)))
            seconds[operator.key] = min(seconds.get(operator.key, math.inf), took_s)
        for done, number in enumerate(rng.permutation(len(drawn)), round_ * len(drawn)):
            on_step("networks", done, ROUNDS * len(drawn))
            cost = network_cost(space, drawn[number], task_spec, meter, conditions.batch, device)
            measured_s[number] = min(measured_s[number], _latency_s(cost))
    kinds = _kinds(wanted, seconds)
    table = LatencyTable(conditions, seconds, kinds, {}, 0.0, (networks, held_out))
    table.weights = _fit(
        [_features(found, table.seconds_of) for found in found_in[:networks]], measured_s[:networks]
    )
    off = [
        abs(table.latency_s(found) / took - 1)
        for found, took in zip(found_in[networks:], measured_s[networks:], strict=True)
    ]
    table.error = float(np.percentile(off, 90))
    return table.of(space, task_spec)


def network_cost(
    space: LayeredSpace,
    architecture: Architecture,
    task_spec: TaskSpec,
    meter: Meter,
    batch: int,
    device: str,
) -> Cost:
    """What one forward pass costs, the network laid out as a search measures it."""
    network = built(space, architecture, task_spec).to(device)
    x = _input(task_spec, batch).to(device)
    return _measured(meter, lambda: network(x))


def built(space: LayeredSpace, architecture: Architecture, task_spec: TaskSpec) -> nn.Module:
    """The network in eval mode, channels last, as a search measures it; no random number is drawn."""
    with torch.random.fork_rng(devices=[]):
        network = space.build(architecture, task_spec)
    return network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def require_layered(space: object) -> None:
    """Raises ConfigError for a space without what an estimate needs."""
    absent = [name for name in ("build", "cheapest") if not hasattr(space, name)]
    if absent:
        raise ConfigError(
            f"space {getattr(space, 'name', space)!r} cannot be profiled: it has no {absent[0]}(); give it "
            "build(architecture, task_spec) and cheapest(prefix) -> Architecture"
        )


def _input(task_spec: TaskSpec, batch: int) -> torch.Tensor:
    return torch.ones(batch, *task_spec.input_shape)


def _measured(meter: Meter, call: Callable[[], Any]) -> Cost:
    def quietly() -> None:
        with torch.inference_mode():
            call()

    return meter.measure(quietly)


def _latency_s(cost: Cost) -> float:
    if cost.latency_s is None:
        raise MeterError("the meter gave no latency: a table needs one that does")
    return cost.latency_s


def _features(operators: list[Operator], seconds_of: Callable[[Operator], float]) -> dict[str, float]:
    """What a latency is a weighted sum of."""
    features = {"constant": 1e-4, "calls": 1e-5 * len(operators)}
    for operator in operators:
        features[operator.kind] = features.get(operator.kind, 0.0) + seconds_of(operator)
    return features


def _fit(
    features: list[dict[str, float]], measured_s: list[float], *, ridge: float = 0.1
) -> dict[str, float]:
    """Weights that minimise the relative errors, drawn towards 1 for every kind of operator and 0 overhead.

    All kinds share one weight, "", and each may differ from it as far as the networks say so.  A network
    that is off by more than 1.5 times what most are counts in proportion to less: it was disturbed.

    Source: iteratively reweighted least squares, Huber and Ronchetti, Robust Statistics (2009), section 7.8.
    """
    kinds = sorted({name for row in features for name in row} - {"constant", "calls"})
    columns = [
        [row["constant"] for row in features],
        [row["calls"] for row in features],
        [sum(row.get(kind, 0.0) for kind in kinds) for row in features],
        *([row.get(kind, 0.0) for row in features] for kind in kinds),
    ]
    matrix = np.array(columns).T / np.array(measured_s)[:, None]
    prior = np.array([0.0, 0.0, 1.0, *(0.0 for _ in kinds)])
    pull = np.sqrt(np.array([1e-3, 1e-3, 1e-3, *(ridge for _ in kinds)]))
    solved, trust = prior, np.ones(len(matrix))
    for _ in range(REWEIGHTINGS):
        rows, targets = np.vstack([matrix * trust[:, None], np.diag(pull)]), [*trust, *(pull * prior)]
        solved = np.linalg.lstsq(rows, np.array(targets), rcond=None)[0]
        off = np.abs(matrix @ solved - 1.0)
        usual = 1.5 * 1.4826 * float(np.median(off))  # 1.4826: median to standard deviation
        trust = np.sqrt(np.minimum(1.0, usual / np.maximum(off, 1e-12)))
    constant, calls, shared, *own = (float(weight) for weight in solved)
    return {
        "constant": constant,
        "calls": calls,
        "": shared,
        **{kind: shared + weight for kind, weight in zip(kinds, own, strict=True)},
    }


def _kinds(measured: list[Operator], seconds: Mapping[str, float]) -> dict[str, tuple[float, float, float]]:
    """Seconds a call, a FLOP and a byte of each kind of operator, none negative; "" for all together."""
    groups: dict[str, list[Operator]] = {"": measured}
    for operator in measured:
        groups.setdefault(operator.kind, []).append(operator)
    kinds = {}
    for kind, members in groups.items():
        took_s = np.array([seconds[operator.key] for operator in members])
        rows = np.array([[1e-6, 1e-9 * o.flops, 1e-9 * o.bytes_moved] for o in members]) / took_s[:, None]
        call, flop, byte = _not_negative(rows, np.ones(len(members)))
        kinds[kind] = (call * 1e-6, flop * 1e-9, byte * 1e-9)
    return kinds


def _not_negative(rows: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least squares with no weight below 0: the best of all subsets of the few columns."""
    best, least = np.zeros(rows.shape[1]), np.inf
    for used in itertools.product((False, True), repeat=rows.shape[1]):
        columns = np.flatnonzero(used)
        weights = np.zeros(rows.shape[1])
        weights[columns] = np.linalg.lstsq(rows[:, columns], target, rcond=None)[0]
        off = float(np.sum((rows @ weights - target) ** 2))
        if off < least and (weights >= 0).all():
            best, least = weights, off
    return best
