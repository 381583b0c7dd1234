"""What flows through chosen layers, in five numbers each: the state of an agent that chooses a stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, ShapeError, unknown_name
from .stages import observing, plain_network, run_network

__all__ = ["ActivationProbe", "LayerStatistics", "layer_statistics"]

BINS = 64
REACH = 4.0  # deviations on either side of the mean that the histogram covers
VALUES = 2**16


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

    A hook looks at every n-th position of every channel and sample, n so that about ``values`` values are
    seen; equal activations give equal statistics.  Nothing of the pass is kept but five numbers a layer.
    A layer with a block inserted is watched before the block.

    Args:
        network: any module; a compiled one counts as the module it was made from.  Attach the probe before
            the network is compiled for the first time, since PyTorch does not look for new hooks after it.
        layers: names of modules whose output is [B, C, ...] or [B, C].
        values: about how many to look at in each layer; None looks at all.
    Raises:
        ConfigError: a name that does not exist, or ``values`` below 1.
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], *, values: int | None = VALUES) -> None:
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
        self._seen: dict[str, Tensor] = {}
        self._stop_when_seen = False
        # A layer that stands behind a block's wrapper is reached by the name of the wrapper.
        modules = {name: getattr(known[name], "stage", known[name]) for name in self.layers}
        self._handles = [module.register_forward_hook(_Watch(self, name)) for name, module in modules.items()]

    @property
    def features(self) -> int:
        """F, the length of ``state``."""
        return len(LayerStatistics._fields) * len(self.layers)

    @property
    def statistics(self) -> dict[str, LayerStatistics]:
        """Of the latest pass, by layer; a layer that has not run yet is left out."""
        return {
            name: LayerStatistics(*self._seen[name].tolist()) for name in self.layers if name in self._seen
        }

    def state(self) -> Tensor:
        """Float32 [F] on the CPU: the statistics of the latest pass, layer by layer; log(1 + v) of variances.

        Raises:
            DataError: a layer has not run yet, or its activations are NaN or infinite; names it.
        """
        missing = [name for name in self.layers if name not in self._seen]
        if missing:
            raise DataError(f"layer {missing[0]!r} has not run since the probe was attached")
        table = torch.stack([self._seen[name] for name in self.layers]).to("cpu", torch.float32)
        for name, row in zip(self.layers, table, strict=True):
            if not torch.isfinite(row).all():
                raise DataError(
                    f"layer {name!r} has NaN or infinite activations: the batch has them, or training diverged"
                )
        table[:, 1].log1p_()
        return table.flatten()

    def observe(self, batch: Tensor) -> Tensor:
        """``state`` of ``batch``: runs the network in evaluation mode, no further than the last layer.

        Raises:
            ShapeError: the network does not take the batch.
            DataError: as ``state``.
        """
        self._seen.clear()
        self._stop_when_seen = True
        try:
            with observing(self._network):
                run_network(self._network, batch)
        except _SeenAllError:
            pass
        finally:
            self._stop_when_seen = False
        return self.state()

    def close(self) -> None:
        """Takes the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

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
        self._seen[name] = layer_statistics(output, values=self._values)
        if self._stop_when_seen and len(self._seen) == len(self.layers):
            raise _SeenAllError


class _SeenAllError(Exception):
    """Ends a pass once every layer was seen."""


class _Watch:
    """A hook that holds its probe, and can be deep-copied with the network only as a hook of the same probe."""

    def __init__(self, probe: ActivationProbe, name: str) -> None:
        self._probe, self._name = probe, name

    def __deepcopy__(self, memo: dict[int, Any]) -> _Watch:
        return self

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._probe._look(self._name, output)


@torch.no_grad()
def layer_statistics(activations: Tensor, *, values: int | None = None) -> Tensor:
    """The numbers of ``LayerStatistics``, in its order, as float32 [5] on the activations' device.

    The entropy is that of a histogram of ``BINS`` equal bins from ``REACH`` deviations below the mean to as
    many above (what lies beyond counts in the outer bins), plus (bins in use - 1) / (2 values) for the bias
    of few values (Miller 1955).  It does not change when all values are scaled or shifted.  The mean square of
    a sample's correlations is too large by (1 - it) / (positions - 1), which is taken off.

    Args:
        activations: [B, C, *space], any floating dtype.
        values: look at about so many, at every n-th position of all samples; None looks at all.
    """
    rows = _sampled(activations, values)  # [C, positions of all samples]
    channels, positions = rows.shape
    variances, means = torch.var_mean(rows, dim=1, correction=0)
    mean = means.mean()
    variance = variances.mean() + means.var(correction=0)
    sparsity = 1 - torch.count_nonzero(rows) / rows.numel()
    deviation = variance.sqrt().clamp_min(1e-12)
    bins = ((rows - (mean - REACH * deviation)) * (BINS / (2 * REACH * deviation))).clamp_(0, BINS - 1)
    counts = torch.histc(bins, BINS, 0, BINS)
    share = counts / rows.numel()
    entropy = -torch.xlogy(share, share).sum() + (torch.count_nonzero(counts) - 1) / (2 * rows.numel())
    correlation = torch.zeros_like(mean)
    if channels > 1 and positions > 2:
        centred = (rows - means[:, None]) * torch.where(variances > 1e-12, variances, math.inf).rsqrt()[
            :, None
        ]
        products = centred @ centred.mT / positions
        square = (products.square().sum() - products.diagonal().square().sum()) / (channels * (channels - 1))
        correlation = ((square - (1 - square) / (positions - 1)).clamp_min(0)).sqrt()
    return torch.stack([mean, variance, entropy, sparsity, correlation])


def _sampled(activations: Tensor, values: int | None) -> Tensor:
    """Float32 [C, n]: every channel at every step-th place of all samples and positions, one after another."""
    flat = activations.detach().flatten(2) if activations.dim() > 2 else activations.detach()[:, :, None]
    batch, channels, positions = flat.shape
    step = 1 if values is None else max(1, flat.numel() // values)
    if step > 1:
        if positions > 1:
            flat = flat[:, :, :: _coprime(min(step, positions), positions)]
        else:
            flat = flat[::step]
    return flat.transpose(0, 1).reshape(channels, -1).float()


def _coprime(step: int, positions: int) -> int:
    """The next step that meets every column of a square image, not the same ones in every row."""
    side = math.isqrt(positions)
    while step > 1 and math.gcd(step, side) > 1:
        step += 1
    return step
