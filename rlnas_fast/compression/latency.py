"""How long networks take, side by side on the same machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from ..hardware import meter_for
from ..search import Meter

__all__ = ["Timing", "side_by_side"]


@dataclass(frozen=True)
class Timing:
    """Latencies of several networks on the same batch.

    Attributes:
        latency_s: seconds of one pass by name, median of the rounds' medians.
        speedup: of the first network's latency over each one's, median over the rounds: what a machine that
            drifts between rounds leaves alone.
        batch: images in a pass.
        caveats: what makes the figures less than they seem.
    """

    latency_s: dict[str, float]
    speedup: dict[str, float]
    batch: int
    caveats: tuple[str, ...]


def side_by_side(
    networks: Mapping[str, nn.Module], x: Tensor, *, rounds: int = 3, meter: Meter | None = None
) -> Timing:
    """Times the networks in turns, in eval mode and without gradients.

    Args:
        networks: by name, on x's device; the first is what the others are compared with.
        x: [batch, ...] normalised images.
        rounds: how many times each one's turn comes.
        meter: by default that of x's device.
    """
    meter = meter or meter_for(str(x.device))
    for network in networks.values():
        network.eval()
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    caveats: list[str] = []
    for _ in range(rounds):
        for name, network in networks.items():
            cost = meter.measure(_pass(network, x))
            assert cost.latency_s is not None
            seconds[name].append(cost.latency_s)
            caveats += [clause for clause in cost.caveats if clause not in caveats]
    first = seconds[next(iter(networks))]
    return Timing(
        latency_s={name: median(values) for name, values in seconds.items()},
        speedup={
            name: median(before / after for before, after in zip(first, values, strict=True))
            for name, values in seconds.items()
        },
        batch=len(x),
        caveats=tuple(caveats),
    )


def _pass(network: nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode():
            network(x)

    return call
