"""How long networks take, side by side on the same machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..hardware import meter_for
from ..search import Meter
from .compressed import Compressed
from .layers import density
from .problem import Problem

__all__ = ["Timing", "Twins", "density_within", "masked_latency_s", "side_by_side", "twins"]


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
    caveats: dict[str, str] = {}  # one of those that differ in their figures alone
    for _ in range(rounds):
        for name, network in networks.items():
            cost = meter.measure(_pass(network, x))
            assert cost.latency_s is not None
            seconds[name].append(cost.latency_s)
            caveats |= {re.sub(r"\d+", "#", clause): clause for clause in cost.caveats}
    first = seconds[next(iter(networks))]
    return Timing(
        latency_s={name: median(values) for name, values in seconds.items()},
        speedup={
            name: median(before / after for before, after in zip(first, values, strict=True))
            for name, values in seconds.items()
        },
        batch=len(x),
        caveats=tuple(caveats.values()),
    )


def masked_latency_s(problem: Problem, network: nn.Module, masks: Mapping[str, Tensor], batch: int) -> float:
    """Seconds that ``network`` takes under masks for ``batch`` validation images, on masked kernels."""
    compressed = Compressed.of(network, masks, problem.groups.layout)
    return side_by_side({"": compressed}, problem.images(batch), rounds=1).latency_s[""]


@dataclass(frozen=True)
class Twins:
    """A network on masked kernels, the dense network with the same zeros, and the network before.

    Attributes:
        density: share of weights that stay.
        accuracy, dense_accuracy: on the test split, of the first two.
        speedup: latency of the network before over that on masked kernels.
        timing: of all three: "before", "masked", "dense".
    """

    density: float
    accuracy: float
    dense_accuracy: float
    speedup: float
    timing: Timing


def twins(
    problem: Problem, masks: Mapping[str, Tensor], *, epochs: int = 0, batch: int = 64, rounds: int = 5
) -> Twins:
    """What masked kernels gain over the dense network, and that they compute what its masked twin does.

    Args:
        problem: the network before; reads the test split.
        masks: what stays.
        epochs: of fine-tuning under the masks first.
        batch: images in the pass that is timed.
        rounds: of the timing.
    """
    compressed = Compressed.of(problem.model, masks, problem.groups.layout).eval()
    if epochs:
        compressed.fine_tune(problem.data, epochs, problem.recipe, problem.seed)
    dense = compressed.to_dense().eval()
    networks = {"before": problem.model, "masked": compressed, "dense": dense}
    timing = side_by_side(networks, problem.images(batch), rounds=rounds)
    return Twins(
        density=density(masks),
        accuracy=problem.test_accuracy(compressed),
        dense_accuracy=problem.test_accuracy(dense),
        speedup=timing.speedup["masked"],
        timing=timing,
    )


def density_within(
    problem: Problem, density: float, limit_ms: float, *, method: str, int8: bool, batch: int, tries: int = 8
) -> tuple[float, tuple[str, ...]]:
    """The largest density, at most the one asked, at which the network takes at most ``limit_ms``.

    Found by bisection with the masks of a published rule, which is what a search starts from.

    Returns:
        The density, and what a user should know where it is not the one asked.

    Raises:
        ConfigError: even with next to no weights the network takes longer; says how long.
    """

    def takes_ms(share: float) -> float:
        masks = problem.by_rule(method, share, int8=int8)
        return 1e3 * masked_latency_s(problem, problem.model, masks, batch)

    if takes_ms(density) <= limit_ms:
        return density, ()
    low, high = min(density, 1 / min(layer.weight.numel() for layer in problem.layers)), density
    fastest_ms = takes_ms(low)
    if fastest_ms > limit_ms:
        raise ConfigError(
            f"max_latency_ms = {limit_ms:g}: even with {100 * low:.2g} % of its weights the network takes "
            f"{fastest_ms:.3g} ms for {batch} images here; give more"
        )
    for _ in range(tries):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if takes_ms(middle) <= limit_ms else (low, middle)
    return low, (f"density {low:.4g} instead of {density:g}, to take at most {limit_ms:g} ms",)


def _pass(network: nn.Module, x: Tensor) -> Callable[[], None]:
    def call() -> None:
        with torch.inference_mode():
            network(x)

    return call
