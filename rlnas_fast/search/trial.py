"""What was seen: frozen records that a log can keep and a strategy can learn from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .space import Architecture


@dataclass(frozen=True)
class Budget:
    """How much training a child network gets: whichever is used up first.

    Attributes:
        epochs: passes over the training split.
        seconds: wall-clock seconds of training, or None for no such limit.
    """

    epochs: int
    seconds: float | None = None


@dataclass(frozen=True)
class Cost:
    """What running a network once costs on a device.  Unknown is None, never 0.

    Attributes:
        latency_s: median seconds a call.
        latency_low_s, latency_high_s: 10th and 90th percentile.
        energy_j: joules a call above idle.
        power_w: mean power while running.
        peak_memory_bytes: most device memory held during a call.
        caveats: what makes these figures less than they seem, one short clause each.
    """

    latency_s: float | None = None
    latency_low_s: float | None = None
    latency_high_s: float | None = None
    energy_j: float | None = None
    power_w: float | None = None
    peak_memory_bytes: int | None = None
    caveats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measurement:
    """What an evaluator found out about one architecture.

    Attributes:
        accuracy: fraction of the validation split that is right, 0 to 1.
        loss: mean validation loss.
        curve: validation accuracy after each epoch.
        train_seconds: seconds spent training.
        parameters: trainable parameters.
        flops: floating-point operations of one forward pass of one sample (a multiply-add is two).
        cost: what the meter measured.
        extra: further numbers by name (a table's columns, a user's own).
        failure: why the child has no result, or None.  A failed child is data.
        transient: the failure is the machine's, not the child's, and is never cached.
    """

    accuracy: float | None = None
    loss: float | None = None
    curve: tuple[float, ...] = ()
    train_seconds: float | None = None
    parameters: int | None = None
    flops: int | None = None
    cost: Cost = Cost()
    extra: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None
    transient: bool = False

    def value(self, name: str) -> float | None:
        """The number called ``name``: a field of this record, of its cost, or of ``extra``."""
        for owner in (self, self.cost):
            found = getattr(owner, name, None)
            if isinstance(found, (int, float)) and not isinstance(found, bool):
                return float(found)
        extra = self.extra.get(name)
        return None if extra is None else float(extra)

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, default=float)  # a user's NumPy scalars

    @staticmethod
    def from_json(text: str) -> Measurement:
        fields: dict[str, Any] = json.loads(text)
        cost = fields.pop("cost")
        cost["caveats"] = tuple(cost["caveats"])
        fields["curve"] = tuple(fields["curve"])
        return Measurement(cost=Cost(**cost), **fields)


@dataclass(frozen=True)
class Trial:
    """One architecture that was asked, what came of it, and the reward for it.

    Attributes:
        number: position in the run, from 0; the order in which trials are told.
        batch: which call of ``ask`` proposed it, from 0.
        key: the architecture's canonical key.
        seconds: wall-clock seconds the evaluation took (0 when it came from the cache).
        cached: the measurement was not made in this run.
    """

    number: int
    batch: int
    architecture: Architecture
    key: str
    measurement: Measurement
    reward: float
    seconds: float = 0.0
    cached: bool = False

    @property
    def state(self) -> str:
        """Either "complete" or "failed"."""
        return "complete" if self.measurement.failure is None else "failed"


def child_seed(run_seed: int, key: str) -> int:
    """The seed of one child: the same wherever and whenever in a run it is trained.  31 bits."""
    digest = hashlib.sha256(f"{run_seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def measurement_key(identity: Mapping[str, str], key: str, budget: Budget, seed: int) -> str:
    """The one key under which a child's measurement is cached: everything that it depends on.

    Args:
        identity: what the evaluator says it depends on: space, task and data hash, recipe, dtype,
            device, versions.
        key: the architecture's canonical key.
    """
    parts = {"identity": dict(identity), "key": key, "budget": asdict(budget), "seed": seed}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
