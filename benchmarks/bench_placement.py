"""What a placement costs: a whole network with a block against a textbook's block, and the probe's share.

``python benchmarks/bench_placement.py --check`` prints the tables.  Ratios are peer / ours, interleaved; the
peers are the same network with the block as papers print it (two products and a softmax around the N x N
matrix), or with PyTorch's own attention in its place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from harness import Row, interleaved, main, ratio
from torch import Tensor, nn

from rlnas_fast.networks import ResNet, StageCNN
from rlnas_fast.placement.inserter import NonLocalInserter
from rlnas_fast.placement.probe import ActivationProbe
from rlnas_fast.placement.stages import find_stages, replace

INPUTS = 3  # rotated, so that no run finds its own input in the nearest cache
STAGES = ("stage1", "stage2", "stage3")
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {"stage-cnn": StageCNN, "resnet20": ResNet}
# What a probe says of these is compared with the statistics of everything.
PROBED = NETWORKS | {"stage-cnn of width 8": partial(StageCNN, width=8), "resnet8": partial(ResNet, depth=1)}
SEEDS = 20  # of networks and images, as many of each


class Textbook(nn.Module):
    """z = BatchNorm(W softmax(theta phi) g) + x with 1 x 1 convolutions, as papers print it."""

    def __init__(self, channels: int, *, fused: bool) -> None:
        super().__init__()
        inner = channels // 2
        self.theta, self.phi, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        self.W = nn.Sequential(nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels))
        nn.init.zeros_(self.W[1].weight)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        theta, phi, g = (each(x).flatten(2).mT for each in (self.theta, self.phi, self.g))
        if self.fused:
            y = F.scaled_dot_product_attention(theta[:, None], phi[:, None], g[:, None], scale=1.0)[:, 0]
        else:
            y = (theta @ phi.mT).softmax(dim=-1) @ g
        return self.W(y.mT.unflatten(2, x.shape[2:])) + x


def whole_network(quick: bool) -> list[Row]:
    torch.set_num_threads(2)
    rows = []
    inputs = [torch.randn(32, 3, 32, 32) for _ in range(INPUTS)]
    y = torch.arange(32) % 10
    for name, make in NETWORKS.items():
        for stage in STAGES:
            torch.manual_seed(0)
            plain = make(3, 10)
            ours = copy.deepcopy(plain)
            NonLocalInserter(ours, inputs[0], [stage]).insert(stage)
            networks = {"ours": ours, "none": plain}
            for peer, fused in (("textbook", False), ("sdpa", True)):
                networks[peer] = copy.deepcopy(plain)
                (found,) = find_stages(networks[peer], inputs[0], [stage])
                replace(found, nn.Sequential(found.module, Textbook(found.shape[0], fused=fused)))
            times = interleaved(
                {each: _step(network, inputs, y) for each, network in networks.items()},
                repeats=9 if quick else 31,
                seconds=8 if quick else 20,
            )
            figure, detail = ratio(times, "ours", ["textbook"])
            rows.append(Row(f"{name}, block at {stage}: textbook / ours", figure, must=1.0, detail=detail))
            rows.append(Row(f"{name}, block at {stage}: sdpa / ours", ratio(times, "ours", ["sdpa"])[0]))
    return rows


def _step(network: nn.Module, inputs: list[Tensor], y: Tensor) -> Callable[[], object]:
    turn = 0

    def step() -> None:
        nonlocal turn
        turn += 1
        network.zero_grad(set_to_none=True)
        F.cross_entropy(network(inputs[turn % INPUTS]), y).backward()

    return step


def probe(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    rows = []
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        network = make(3, 10)
        inputs = [_images(128) for _ in range(INPUTS)]
        for x in inputs:
            network(x)  # gives BatchNorm its statistics
        network.eval()
        watched = copy.deepcopy(network)
        with ActivationProbe(watched, STAGES) as watch:
            rows += _shares(name, network, watched, watch, inputs, quick)
    return rows + [_error(name, make, 2 if quick else SEEDS) for name, make in PROBED.items()]


@torch.no_grad()
def _shares(
    name: str,
    network: nn.Module,
    watched: nn.Module,
    watch: ActivationProbe,
    inputs: list[Tensor],
    quick: bool,
) -> Iterator[Row]:
    """What a watched pass costs more than another, and one after which the state is asked for."""
    turn = 0

    def plain() -> None:
        nonlocal turn
        turn += 1
        network(inputs[turn % INPUTS])

    def seen() -> None:
        watched(inputs[turn % INPUTS])

    def read() -> None:
        watched(inputs[turn % INPUTS])
        watch.state()

    times = interleaved({"plain": plain, "seen": seen, "read": read}, repeats=9 if quick else 31)
    for each, what in (("seen", "a watched pass"), ("read", "a watched pass and its state")):
        figure, detail = ratio({kind: times[kind] for kind in ("plain", each)}, "plain", [each])
        yield Row(
            f"{name}, batch 128: {what}, above a pass", 100 * (figure - 1), must=5.0, unit="%",
            at_most=True, detail=detail,
        )  # fmt: skip


@torch.no_grad()
def _error(name: str, make: Callable[[int, int], nn.Module], seeds: int) -> Row:
    """The largest of all statistics, stages and seeds."""
    worst, where = 0.0, ""
    for seed in range(seeds):
        torch.manual_seed(seed)
        network = make(3, 10)
        with (
            ActivationProbe(network, STAGES) as some,
            ActivationProbe(network, STAGES, values=None) as everything,
        ):
            network(_images(128))
        for stage, truth in everything.statistics.items():
            for field, one, other in zip(truth._fields, some.statistics[stage], truth, strict=True):
                if abs(one / other - 1) > worst:
                    worst, where = abs(one / other - 1), f"{field} of {stage}, seed {seed}"
    return Row(
        f"{name}, batch 128: largest error of a statistic, {seeds} seeds", 100 * worst, must=2.0, unit="%",
        at_most=True, detail=where,
    )  # fmt: skip


def _images(count: int) -> Tensor:
    """Smooth as photographs are, each with a brightness of its own."""
    return 3 * F.avg_pool2d(torch.randn(count, 3, 36, 36), 5, 1) + 0.5 * torch.randn(count, 1, 1, 1)


if __name__ == "__main__":
    main(__doc__ or "", {"network": whole_network, "probe": probe})
