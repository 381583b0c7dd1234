"""What flows through chosen layers, in five numbers each: the state of an agent that chooses a stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError, DataError, KernelUnavailable, ShapeError, unknown_name
from ..ops import native
from .inserter import StageWithBlock
from .stages import observing, plain_network, run_network

__all__ = ["ActivationProbe", "LayerStatistics", "layer_statistics"]

BINS = 64
REACH = 4.0  # deviations on either side of the mean that the histogram covers
VALUES = 3 * 2**17
ENTROPY_VALUES = 2**13  # are enough for an entropy


class LayerStatistics(NamedTuple):
    """Of one layer's activations.

    Attributes:
        mean: of all values.
        variance: of all values, biased.
        entropy: in nats, of the standardised values: how many of the ``BINS`` bins they spread over.
        sparsity: fraction of values that are exactly 0.
        correlation: root mean square Pearson correlation of two channels.
    """

    mean: float
    variance: float
    entropy: float
    sparsity: float
    correlation: float


class ActivationProbe:
    """Watches layers through forward hooks and keeps statistics of their latest activations, detached.

    A hook looks at every n-th position of every channel, so that at most about ``values`` values are seen;
    equal activations give equal statistics.  Those of float32 on the CPU are worked out there and then, by
    a compiled kernel that passes once over those positions, and nothing else is kept.  Elsewhere a copy of
    what is looked at stays on the device, so that no pass waits for it, until its statistics are asked for.
    A layer with a block inserted is watched before the block.

    Args:
        network: any module; a compiled one counts as the module it was made from.  Attach the probe before
            the network is compiled for the first time, since PyTorch does not look for new hooks after it.
        layers: names of modules whose output is [B, C, ...] or [B, C].
        values: about how many to look at in each layer, at most; None looks at all.
        watch: look at every pass; else only ``observe`` looks, and other passes cost nothing.
    Raises:
        ConfigError: a name that does not exist, or ``values`` below 1.
    """

    def __init__(
        self, network: nn.Module, layers: Sequence[str], *, values: int | None = VALUES, watch: bool = True
    ) -> None:
        self._network = plain_network(network)
        self.layers = tuple(layers)
        if not self.layers:
            raise ConfigError("layers is empty: name at least one module to watch")
        if values is not None and values < 1:
            raise ConfigError(f"values = {values}: look at one or more, or at all with None")
        known = dict(self._network.named_modules())
        for name in self.layers:
            if name not in known:
                raise unknown_name("layer", name, known)
        self._values = values
        self._seen: dict[str, LayerStatistics | Tensor] = {}  # or float32 [C, n], from which they follow
        self._stop_when_seen = False
        # A layer that stands behind a block's wrapper is reached by the name of the wrapper.
        modules = {name: _behind(known[name]) for name in self.layers}
        self._modules, self._watch = modules, watch
        self._handles: list[RemovableHandle] = []
        if watch:
            self._attach()

    @property
    def features(self) -> int:
        """F, the length of ``state``."""
        return len(LayerStatistics._fields) * len(self.layers)

    @property
    def statistics(self) -> dict[str, LayerStatistics]:
        """Of the latest pass, by layer; a layer that has not run yet is left out."""
        found = {}
        for name, seen in self._seen.items():
            if isinstance(seen, Tensor):
                seen = self._seen[name] = _statistics(seen, thin=self._values is not None)
            found[name] = seen
        return found

    def state(self) -> Tensor:
        """Float32 [F] on the CPU: the statistics of the latest pass, layer by layer; log(1 + v) of variances.

        Raises:
            DataError: a layer has not run yet, or its activations are NaN or infinite; names it.
        """
        missing = [name for name in self.layers if name not in self._seen]
        if missing:
            raise DataError(f"layer {missing[0]!r} has not run since the probe was attached")
        statistics = self.statistics
        table = np.array([statistics[name] for name in self.layers])
        for name, row in zip(self.layers, table, strict=True):
            if not np.isfinite(row).all():
                raise DataError(
                    f"layer {name!r} has NaN or infinite activations: "
                    "the batch has them, or training diverged"
                )
        table[:, 1] = np.log1p(table[:, 1])
        return torch.from_numpy(table.astype(np.float32).ravel())

    def observe(self, batch: Tensor) -> Tensor:
        """``state`` of ``batch``: runs the network in evaluation mode, no further than the last layer.

        Raises:
            ShapeError: the network does not take the batch.
            DataError: as ``state``.
        """
        self._seen.clear()
        self._stop_when_seen = True
        if not self._watch:
            self._attach()
        try:
            with observing(self._network):
                run_network(self._network, batch)
        except _SeenAllError:
            pass
        finally:
            self._stop_when_seen = False
            if not self._watch:
                self.close()
        return self.state()

    def close(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _attach(self) -> None:
        self._handles = [
            module.register_forward_hook(_Watch(self, name)) for name, module in self._modules.items()
        ]

    def __enter__(self) -> ActivationProbe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _look(self, name: str, output: Any) -> None:
        if not isinstance(output, Tensor) or output.dim() < 2 or not output.is_floating_point():
            what = (
                f"{output.dtype} {list(output.shape)}"
                if isinstance(output, Tensor)
                else type(output).__name__
            )
            raise ShapeError(
                f"layer {name!r} answers with {what}; a probe needs floating-point [batch, channels, ...]"
            )
        self._seen[name] = _looked_at(output.detach(), self._values)
        if self._stop_when_seen and len(self._seen) == len(self.layers):
            raise _SeenAllError


def _behind(module: nn.Module) -> nn.Module:
    return module.stage if isinstance(module, StageWithBlock) else module


class _SeenAllError(Exception):
    """Ends a pass once every layer was seen."""


class _Watch:
    """A hook; in a deep copy of the network it still tells the same probe."""

    def __init__(self, probe: ActivationProbe, name: str) -> None:
        self._probe, self._name = probe, name

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        return self

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._probe._look(self._name, output)


def layer_statistics(activations: Tensor, *, values: int | None = None) -> LayerStatistics:
    """What an ``ActivationProbe`` says of a layer.

    The entropy is that of a histogram of ``BINS`` equal bins from ``REACH`` deviations below the mean to as
    many above (what lies beyond counts in the outer bins) and of one for values that are exactly 0, plus
    (bins in use - 1) / (2 values) for the bias of few values (Miller 1955); the same for scaled values.
    The mean square of a correlation is the mean product of the correlations in the first and in the second
    half of what was looked at: a square of either would count its noise as correlation.

    Args:
        activations: [B, C, *space], any floating dtype.
        values: look at about so many at most; None looks at all.
    """
    seen = _looked_at(activations.detach(), values)
    return _statistics(seen, thin=values is not None) if isinstance(seen, Tensor) else seen


def _looked_at(x: Tensor, values: int | None) -> LayerStatistics | Tensor:
    """The statistics of [B, C, *space], or the sample float32 [C, n] from which ``_statistics`` gets them."""
    x = x.resolve_neg()  # the kernel reads what lies in memory
    places = _places(tuple(x.shape), x.stride(), values, x.device)
    kernel = _kernel() if x.is_cpu and x.dtype is torch.float32 and len(places) else None
    if kernel is None:
        return _sampled(x, places)
    thin = _thin(x.shape[1], len(places)) if values is not None else 1
    channels, stride = x.shape[1], x.stride(1)
    where = x.data_ptr(), channels, stride, places.data_ptr(), len(places)
    return LayerStatistics(*kernel.activation_statistics(*where, thin, torch.get_num_threads()))


@lru_cache(maxsize=1)
def _kernel() -> ModuleType | None:
    try:
        return native.cpu()
    except KernelUnavailable:
        return None


def _sampled(x: Tensor, places: Tensor) -> Tensor:
    """Float32 [C, n], a copy: every channel of [B, C, *space] at ``places``."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    channels = torch.arange(x.shape[1], device=x.device)[:, None] * x.stride(1)
    return x.as_strided((extent,), (1,))[channels + places].float()


def _thin(channels: int, positions: int) -> int:
    """Of which positions that are looked at the entropy is."""
    return _coprime(max(1, channels * positions // ENTROPY_VALUES), positions)


@torch.no_grad()
def _statistics(rows: Tensor, *, thin: bool) -> LayerStatistics:
    """Of values [C, n]; with ``thin`` the histogram is of about ``ENTROPY_VALUES`` of them.

    What csrc/cpu/activation_statistics.isa.cpp does, for other devices and dtypes.
    """
    channels, positions = rows.shape
    some = rows[:, :: _thin(channels, positions) if thin else 1].cpu().numpy()
    sparsity = 1 - float(torch.count_nonzero(rows)) / rows.numel()
    row_means = rows.mean(dim=1, keepdim=True)
    centred = rows - row_means
    half = positions // 2
    parts = centred[:, :half], centred[:, half:]
    first, second = ((part @ part.mT).cpu().numpy().astype(float) for part in parts)
    means = row_means.cpu().numpy().astype(float)
    variances = (first.diagonal() + second.diagonal()) / positions
    mean, variance = float(means.mean()), float(variances.mean() + means.var())
    if not math.isfinite(variance):
        return LayerStatistics(*[math.nan] * 5)
    square = 0.0
    if channels > 1 and half:
        scale = np.divide(1, variances, out=np.zeros_like(variances), where=variances > 1e-12)
        products = first * second
        square = scale @ products @ scale - products.diagonal() @ scale**2
        square /= half * (positions - half) * channels * (channels - 1)
    entropy = _entropy(some, mean, math.sqrt(variance), sparsity)
    return LayerStatistics(mean, variance, entropy, sparsity, math.sqrt(max(square, 0.0)))


def _entropy(values: np.ndarray, mean: float, deviation: float, sparsity: float) -> float:
    """In nats; see ``layer_statistics``.  ``sparsity``, of more values, says how many are 0."""
    scale = BINS / (2 * REACH) / max(deviation, 1e-12)
    bins = values[values != 0] * np.float32(scale) + np.float32(BINS / 2 - mean * scale)
    counts = np.bincount(np.clip(bins, 0, BINS - 1).astype(np.intp))
    share = (1 - sparsity) * counts[counts > 0] / max(counts.sum(), 1)
    share = np.append(share, sparsity)
    share = share[share > 0]
    return float(-(share @ np.log(share)) + (len(share) - 1) / (2 * values.size))


def _step(about: int, space: tuple[int, ...]) -> int:
    """Every how many positions to look, so that those looked at in a sample are far from each other.

    The step shares no divisor with the number of positions, so that over the samples all are met alike.
    """
    positions = math.prod(space)
    first = _coprime(max(1, about), positions)
    candidates = [s for s in range(first, first + about) if math.gcd(s, positions) == 1]

    def least_square_distance(step: int) -> int:
        walk = (np.arange(1, 1 + min(16, positions)) * step) % positions
        apart = [
            np.minimum(at, size - at) for at, size in zip(np.unravel_index(walk, space), space, strict=True)
        ]
        return int(np.square(apart).sum(axis=0).min())

    return max(candidates, key=least_square_distance) if space else first


def _coprime(least: int, number: int) -> int:
    while math.gcd(least, number) > 1:
        least += 1
    return least


@lru_cache(maxsize=64)
def _places(
    shape: tuple[int, ...], strides: tuple[int, ...], values: int | None, device: torch.device
) -> Tensor:
    """Int64 [n]: where in memory the positions are that are looked at, one sample after another."""
    batch, _, *space = shape
    positions = math.prod(space)
    step = 1 if values is None else _step(math.ceil(math.prod(shape) / values), tuple(space))
    walk = torch.arange(0, batch * positions, step)
    place, rest = (walk // positions) * strides[0], walk % positions
    for size, stride in zip(reversed(space), reversed(strides[2:]), strict=True):
        place, rest = place + (rest % size) * stride, rest // size
    return place.to(device)
