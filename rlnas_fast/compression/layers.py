"""Which layers of a network can be compressed, and how masks are laid over their weights."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..errors import ConfigError, ShapeError
from ..ops.masked_matmul import INT8, KEEP, PRUNE, TileMask, effective_weight

__all__ = [
    "INT8",
    "KEEP",
    "PRUNE",
    "Layer",
    "Layout",
    "Masks",
    "Prunable",
    "Skipped",
    "bits",
    "check_masks",
    "densities",
    "density",
    "digest",
    "effective",
    "kept",
    "masked",
    "prunable",
]

KEEP_BITS, INT8_BITS = 32, 8

# By layer name, of the weight's shape: bool (True is kept), or where quantising is on uint8 states 0 prune,
# 1 keep, 2 int8.  The kept weights of a tile are all int8 or none of them is, for they share one scale.
Masks = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer whose weights may be pruned.

    Attributes:
        name: as in ``model.named_modules()``.
        module: the layer itself; its weight [out, in] or [out, in, kh, kw] is compressed, its bias is not.
    """

    name: str
    module: nn.Linear | nn.Conv2d

    @property
    def weight(self) -> Tensor:
        """The weight as it is now, detached, sharing memory."""
        return self.module.weight.detach()

    @property
    def matrix(self) -> Tensor:
        """The weight as [N, K]: out features by everything that one of them sums."""
        return self.weight.reshape(len(self.weight), -1)


@dataclass(frozen=True, eq=False)
class Layout:
    """How weights lie in tiles, which is what int8 weights share a scale with and what kernels skip.

    Attributes:
        tile: rows and columns of a tile of the matrix [N, K].
        orders: by layer name, (rows, columns), the permutations q and p of ``TileMask``: tiles are cut from
            ``matrix[q][:, p]``.  Either may be None.  They change what lies together, not what is computed.
    """

    tile: tuple[int, int] = (32, 32)
    orders: Mapping[str, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)

    def tiled(self, name: str, matrix: Tensor) -> Tensor:
        """[N, K] in the order in which tiles are cut."""
        rows, columns = self.orders.get(name, (None, None))
        matrix = matrix if rows is None else matrix[rows]
        return matrix if columns is None else matrix[:, columns]

    def untiled(self, name: str, matrix: Tensor) -> Tensor:
        """The inverse of ``tiled``."""
        rows, columns = self.orders.get(name, (None, None))
        matrix = matrix if columns is None else matrix[:, columns.argsort()]
        return matrix if rows is None else matrix[rows.argsort()]

    def mask(self, name: str, mask: Tensor) -> TileMask:
        """A mask in the form that kernels read; its int8 tiles have yet to be quantised.

        Args:
            mask: bool or states, of the weight's shape, in the order of the layer.

        Raises:
            ConfigError: a tile holds both int8 weights and others that are kept.
        """
        states = self.tiled(name, mask.reshape(len(mask), -1)).to(torch.uint8)
        keeps, int8 = states != PRUNE, bool((states == INT8).any())
        rows, columns = self.orders.get(name, (None, None))

        def form(unstructured: bool) -> TileMask:
            return TileMask(
                states.shape,
                self.tile,
                unstructured=unstructured,
                int8=int8,
                input_permutation=columns,
                output_permutation=rows,
                device=mask.device,
            )

        state = self._any(keeps).to(torch.uint8)
        if int8:
            rounded = self._any(states == INT8)
            if bool((rounded & self._any(states == KEEP)).any()):
                raise ConfigError(
                    f"layer {name!r}: a tile holds int8 weights beside others that are kept; decide by tile"
                )
            state[rounded] = INT8
        whole = bool(self._any(states == PRUNE).logical_and(state != PRUNE).logical_not().all())
        made = form(unstructured=not whole)
        made.update(state=state, dense=None if whole else keeps)
        return made

    def _any(self, matrix: Tensor) -> Tensor:
        """One bool a tile: whether any of its weights is True."""
        rows, columns = self.tile
        padded = nn.functional.pad(matrix, (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows))
        return padded.view(padded.shape[0] // rows, rows, padded.shape[1] // columns, columns).any(3).any(1)


@dataclass(frozen=True)
class Skipped:
    """A layer with parameters that is left alone, and why."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Prunable:
    """The layers of a network that can be compressed, in the order in which the network declares them.

    Attributes:
        layers: those that can.
        skipped: those that have parameters and are left alone.
    """

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights by name, detached, sharing memory with the network."""
        return {layer.name: layer.weight for layer in self.layers}

    @property
    def total(self) -> int:
        """How many weights there are."""
        return sum(layer.weight.numel() for layer in self.layers)


def prunable(model: nn.Module) -> Prunable:
    """Finds the linear layers and convolutions whose weights can be compressed.

    Left alone and listed: layers of another type that have parameters, subclasses (they may read their weight
    in ways of their own), convolutions with groups or padding other than zeros, weights that two layers
    share, that are computed (parametrised), empty, or not of floating point.

    Raises:
        ConfigError: nothing can be compressed, or a weight holds NaN or infinity; names the layer.
    """
    modules = {name: module for name, module in model.named_modules() if _has_parameters(module)}
    spans = [
        (name, _span(parameter))
        for name, module in modules.items()
        for parameter in module._parameters.values()
    ]
    layers, skipped = [], []
    for name, module in modules.items():
        reason = _reason_to_skip(module)
        if reason is None:
            own = _span(module.weight)
            sharing = [other for other, span in spans if other != name and _overlap(own, span)]
            reason = f"shares its weight with {sharing[0]!r}" if sharing else None
        if reason is not None:
            skipped.append(Skipped(name or type(module).__name__, reason))
            continue
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        if not bool(torch.isfinite(module.weight).all()):
            raise ConfigError(
                f"layer {name!r} has weights that are NaN or infinite; train the network again before "
                "compressing it"
            )
        layers.append(Layer(name, module))
    if not layers:
        found = "; ".join(f"{entry.name}: {entry.reason}" for entry in skipped) or "it has no parameters"
        raise ConfigError(f"the model has no layer that can be compressed ({found})")
    return Prunable(tuple(layers), tuple(skipped))


@contextmanager
def masked(model: nn.Module, masks: Mapping[str, Tensor], layout: Layout | None = None) -> Iterator[None]:
    """Inside, the weights of ``model`` are masked (and int8 ones rounded); afterwards as before, bit for bit.

    Args:
        masks: of any of the layers; others stay as they are.
        layout: says which int8 weights share a scale.
    """
    weights = {name: _weight(model, name) for name in masks}
    for name, weight in weights.items():
        _check(name, weight, masks[name])
    inside = {name: effective(name, weight, masks[name], layout) for name, weight in weights.items()}
    saved = {name: weight.clone() for name, weight in weights.items()}
    try:
        for name, weight in weights.items():
            weight.copy_(inside[name])
        yield
    finally:
        for name, weight in weights.items():
            weight.copy_(saved[name])


def effective(name: str, weight: Tensor, mask: Tensor, layout: Layout | None = None) -> Tensor:
    """The weight that a mask leaves: zeros where it prunes, int8 ones rounded, with one scale a tile.

    Differentiable in ``weight``: rounding passes gradients straight through.
    """
    if mask.dtype == torch.bool or not bool((mask == INT8).any()):
        return torch.where(mask != PRUNE, weight, torch.zeros_like(weight))
    layout = layout or Layout()
    matrix = layout.tiled(name, weight.reshape(len(weight), -1))
    form = layout.mask(name, mask)
    form.quantise(matrix)
    rounded: Tensor = effective_weight(matrix, form.tensors)
    return layout.untiled(name, rounded).view_as(weight)


def kept(masks: Mapping[str, Tensor]) -> int:
    """How many weights stay."""
    return sum(int((mask != PRUNE).sum()) for mask in masks.values())


def density(masks: Mapping[str, Tensor]) -> float:
    """The share of weights that stay."""
    return kept(masks) / max(1, sum(mask.numel() for mask in masks.values()))


def densities(masks: Mapping[str, Tensor]) -> dict[str, float]:
    """The share of weights that stay, layer by layer."""
    return {name: density({name: mask}) for name, mask in masks.items()}


def bits(masks: Mapping[str, Tensor]) -> int:
    """What the weights cost: 32 bits for each that is kept, 8 for each int8 one.

    Neither scales nor the record of where the weights are is counted.
    """
    int8 = sum(int((mask == INT8).sum()) for mask in masks.values() if mask.dtype != torch.bool)
    return KEEP_BITS * (kept(masks) - int8) + INT8_BITS * int8


def digest(masks: Mapping[str, Tensor]) -> str:
    """One short name for equal masks, and only for them."""
    total = hashlib.sha256()
    for name in sorted(masks):
        mask = masks[name]
        total.update(f"{name}{tuple(mask.shape)}".encode())
        total.update(mask.to(torch.uint8).contiguous().cpu().numpy().tobytes())
    return total.hexdigest()[:32]


def check_masks(layers: Prunable, masks: Mapping[str, Tensor]) -> None:
    """Refuses masks that name other layers than those of ``layers``, or have another shape or dtype."""
    for name in masks:
        if name not in layers.weights:
            raise ConfigError(f"a mask names {name!r}, which is not a layer that can be compressed")
    for layer in layers:
        if layer.name not in masks:
            raise ConfigError(f"layer {layer.name!r} has no mask")
        _check(layer.name, layer.weight, masks[layer.name])


def _check(name: str, weight: Tensor, mask: Tensor) -> None:
    if mask.shape != weight.shape:
        raise ShapeError(f"the mask of {name!r} must be {list(weight.shape)}, got {list(mask.shape)}")
    if mask.dtype not in (torch.bool, torch.uint8):
        raise ConfigError(f"the mask of {name!r} must be bool, or uint8 states, got {mask.dtype}")
    if mask.dtype == torch.uint8 and mask.numel() and int(mask.max()) > INT8:
        raise ConfigError(f"the mask of {name!r} must hold states 0, 1 and 2, got {int(mask.max())}")


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def _reason_to_skip(module: nn.Module) -> str | None:
    if type(module) not in (nn.Linear, nn.Conv2d):
        return f"is a {type(module).__name__}, not nn.Linear or nn.Conv2d"
    weight = module.weight
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        return "its weight is not of floating point"
    if weight.numel() == 0:
        return "its weight is empty"
    if isinstance(module, nn.Conv2d) and module.groups != 1:
        return f"has {module.groups} groups"
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return f"pads with {module.padding_mode}, not zeros"
    return None


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None


def _span(parameter: object) -> tuple[str, int, int]:
    """Device, first byte and the byte after the last; a strided parameter has all that lies between."""
    if (
        not isinstance(parameter, Tensor)
        or isinstance(parameter, nn.parameter.UninitializedParameter)
        or parameter.is_meta
        or not parameter.numel()
    ):
        return "", 0, 0
    last = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
    first = parameter.data_ptr()
    return str(parameter.device), first, first + (last + 1) * parameter.element_size()


def _overlap(one: tuple[str, int, int], other: tuple[str, int, int]) -> bool:
    return one[0] == other[0] and one[1] < other[2] and other[1] < one[2]
