"""A network whose compressed layers run on masked kernels; how it is trained, saved and read again."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, RunError
from ..nn import MaskedConv2d, MaskedLinear
from ..ops.masked_matmul import INT8, PRUNE, TileMask
from ..ops.masked_matmul.tile_mask import check_scale
from ..search import Budget
from ..training.data import DeviceData
from ..training.loop import TrainResult, train
from ..training.recipe import Recipe
from .layers import Layout, prunable

__all__ = ["Compressed", "read_description", "save_tensors", "write_whole"]

FORMAT = 1
WEIGHTS, DESCRIPTION = "compressed.safetensors", "compressed.json"


class Compressed(nn.Module):
    """A compressed network: drop-in for the one it came from.

    Attributes:
        network: the network, its compressed layers replaced by ``MaskedLinear`` and ``MaskedConv2d``.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    @classmethod
    def of(cls, model: nn.Module, masks: Mapping[str, Tensor], layout: Layout | None = None) -> Compressed:
        """Lays masks over a copy of ``model``; pruned weights become zero, int8 ones are rounded.

        Args:
            masks: by layer, bool or states, as ``heuristics.project`` makes them; other layers stay dense.
            layout: where tiles lie; by default 32 x 32, in the layers' own order.

        Raises:
            ConfigError: a mask names no layer that can be compressed, or mixes int8 with others in a tile.
        """
        layout = layout or Layout()
        network = copy.deepcopy(model)
        layers = {layer.name: layer.module for layer in prunable(network)}
        for name, mask in masks.items():
            if name not in layers:
                raise ConfigError(f"a mask names {name!r}, which is not a layer that can be compressed")
            module = layers[name]
            with torch.no_grad():
                module.weight.mul_(mask != PRUNE)
            network = _replace(network, module, _masked(module, layout.mask(name, mask)))
        return cls(network).train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """What the network makes of x."""
        answer: Tensor = self.network(x)
        return answer

    def layers(self) -> dict[str, MaskedLinear | MaskedConv2d]:
        """The compressed layers by name."""
        return {
            name: module
            for name, module in self.network.named_modules()
            if isinstance(module, (MaskedLinear, MaskedConv2d))
        }

    def to_dense(self) -> nn.Module:
        """A plain PyTorch network that computes the same up to rounding, with zeros where weights went."""
        network = copy.deepcopy(self.network)
        for module in [m for m in network.modules() if isinstance(m, (MaskedLinear, MaskedConv2d))]:
            network = _replace(network, module, module.to_dense().train(module.training))
        return network

    def fine_tune(self, data: DeviceData, epochs: int, recipe: Recipe, seed: int = 0) -> TrainResult:
        """Trains what is left, in place, on the masked kernels; pruned weights stay exactly zero.

        int8 tiles are rounded again after every step.
        """
        quantised = [layer for layer in self.layers().values() if layer.mask.tensors.payload is not None]

        def round_again() -> None:
            for layer in quantised:
                layer.mask.quantise(layer.weight)

        result = train(
            self, data, recipe, Budget(epochs), device=data.x.device, seed=seed, on_step=round_again
        )
        self.eval()
        return result

    def save(self, folder: Path, description: Mapping[str, Any]) -> None:
        """Writes ``compressed.safetensors`` and then ``compressed.json``, each all of it or none of it.

        Only what is left of a weight is stored: the kept values in the order of the tiles' matrix, int8 ones
        in a byte, one scale a tile, and a bit a weight where tiles are not whole.

        Args:
            folder: is there already.
            description: plain data for the JSON file, beside ``format`` and ``layers``.
        """
        tensors: dict[str, Tensor] = {}
        layers = {}
        for name, layer in self.layers().items():
            prefix = f"{name}."
            tensors |= {prefix + key: value for key, value in _packed(layer).items()}
            layers[name] = {"tile": list(layer.mask.tile), "int8": layer.mask.tensors.payload is not None}
        masked = tuple(f"{name}." for layer in self.layers().values() for name in _names(self.network, layer))
        for key, value in self.network.state_dict().items():
            if not key.startswith(masked):
                tensors[key] = value
        save_tensors(tensors, folder / WEIGHTS)
        text = json.dumps({**description, "format": FORMAT, "layers": layers}, indent=2)
        write_whole(folder / DESCRIPTION, text)

    @classmethod
    def load(cls, folder: Path, model: nn.Module) -> Compressed:
        """Reads what ``save`` wrote.

        Args:
            folder: holds both files.
            model: the network as it was before it was compressed, with any weights; stays as it is.

        Raises:
            DataError: a file is missing, damaged, or of another network; names what is wrong.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        file = folder / WEIGHTS
        layers = read_description(folder)["layers"]
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise DataError(f"{file} cannot be read: {error}") from error
        network = copy.deepcopy(model).cpu()
        known = dict(network.named_modules())
        plain = {key: value for key, value in network.state_dict().items()}
        for name, options in layers.items():
            module = known.get(name)
            if not isinstance(module, (nn.Linear, nn.Conv2d)):
                raise DataError(f"{file} is of another network: this one has no layer {name!r} to compress")
            own = {key: tensors.pop(f"{name}.{key}") for key in _FIELDS if f"{name}.{key}" in tensors}
            bias = tensors.pop(f"{name}.bias", None)
            for alias in _names(network, module):
                for key in ("weight", "bias"):
                    plain.pop(f"{alias}.{key}", None)
            try:
                masked = _unpacked(module, options, own, bias)
            except (KeyError, TypeError, ValueError, RuntimeError) as error:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise DataError(f"{file}: layer {name!r} does not fit the network: {reason}") from error
            network = _replace(network, module, masked)
        wrong = sorted(
            {key for key in plain.keys() ^ tensors.keys()}
            | {key for key in plain.keys() & tensors.keys() if plain[key].shape != tensors[key].shape}
        )
        if wrong:
            raise DataError(f"{file} is of another network: {wrong[0]!r} does not fit")
        network.load_state_dict(tensors, strict=False)
        return cls(network).eval()


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file, all of it or none of it; tensors that share memory are written apart.

    Raises:
        RunError: it cannot be written; says why.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = file.with_name(f"{file.name}.partial")
    plain = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(plain, partial, metadata=metadata)
    except (SafetensorError, OSError) as error:
        raise RunError(
            f"{file} cannot be written: {error}; free some space, or choose a writable --out"
        ) from error
    partial.replace(file)


def write_whole(file: Path, text: str) -> None:
    """Writes a text file, all of it or none of it."""
    partial = file.with_name(f"{file.name}.partial")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def read_description(folder: Path) -> dict[str, Any]:
    """The JSON file of a compressed network.

    Raises:
        DataError: it is missing, damaged or from a newer version.
    """
    file = folder / DESCRIPTION
    try:
        description = json.loads(file.read_text())
        form, layers = description["format"], description["layers"]
        if not isinstance(layers, dict):
            raise TypeError("layers is not a table")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} holds no compressed network that can be read: {error}") from error
    if form != FORMAT:
        raise DataError(f"{file} has format {form}, this version reads {FORMAT}; upgrade rlnas_fast")
    assert isinstance(description, dict)
    return description


def _masked(module: nn.Linear | nn.Conv2d, mask: TileMask) -> MaskedLinear | MaskedConv2d:
    if isinstance(module, nn.Linear):
        made: MaskedLinear | MaskedConv2d = MaskedLinear.from_dense(module, mask)
    else:
        made = MaskedConv2d.from_dense(module, mask)
    made.train(module.training)
    made.weight.requires_grad_(module.weight.requires_grad)
    return made


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Puts ``new`` wherever ``old`` is; the network, or ``new`` where that is all of it."""
    if network is old:
        return new
    for parent in list(network.modules()):
        for name, child in parent._modules.items():  # a layer may be there twice, which named_children hides
            if child is old:
                setattr(parent, name, new)
    return network


def _names(network: nn.Module, module: nn.Module) -> list[str]:
    """Every name that a layer goes by."""
    return [name for name, other in network.named_modules(remove_duplicate=False) if other is module]


_FIELDS = ("state", "bits", "values", "payload", "scale", "rows", "columns")


def _packed(layer: MaskedLinear | MaskedConv2d) -> dict[str, Tensor]:
    """What must be stored of a layer."""
    mask = layer.mask
    t = mask.tensors
    dense = mask.dense()
    int8 = _per_weight(mask.state == INT8, mask)
    found = {"state": t.state, "values": layer.weight.detach()[dense & ~int8]}
    if t.bits is not None:
        found["bits"] = t.bits
    if t.payload is not None and t.scale is not None:
        found |= {"payload": t.payload[dense & int8], "scale": t.scale}
    for key, order in (("rows", t.output_permutation), ("columns", t.input_permutation)):
        if order is not None:
            found[key] = order
    if layer.bias is not None:
        found["bias"] = layer.bias
    return found


def _unpacked(
    module: nn.Linear | nn.Conv2d,
    options: Mapping[str, Any],
    stored: Mapping[str, Tensor],
    bias: Tensor | None,
) -> MaskedLinear | MaskedConv2d:
    """The layer that ``_packed`` came from; raises what says that it does not fit."""
    tile = options["tile"]
    mask = TileMask(
        (len(module.weight), module.weight[0].numel()),
        (int(tile[0]), int(tile[1])),
        unstructured="bits" in stored,
        int8=bool(options["int8"]),
        input_permutation=stored.get("columns"),
        output_permutation=stored.get("rows"),
    )
    t = mask.tensors
    if t.bits is not None:
        _fill("bits", t.bits, stored["bits"])
    mask.update(state=stored["state"])
    dense, int8 = mask.dense(), _per_weight(mask.state == INT8, mask)
    layer = _masked(module, mask)
    with torch.no_grad():
        weight = torch.zeros_like(layer.weight)
        weight[dense & ~int8] = _sized("values", stored["values"], int((dense & ~int8).sum()))
        t = layer.mask.tensors
        if t.payload is not None and t.scale is not None:
            _fill("scale", t.scale, stored["scale"])
            check_scale(t.scale, t)
            t.payload.zero_()
            t.payload[dense & int8] = _sized("payload", stored["payload"], int((dense & int8).sum()))
            weight += _per_weight(t.scale, mask) * t.payload * int8
        if not bool(torch.isfinite(weight).all()):
            raise ValueError("its weights are NaN or infinite")
        layer.weight.copy_(weight)
        if (bias is None) != (layer.bias is None):
            raise ValueError("one of them has a bias, the other has not")
        if bias is not None and layer.bias is not None:
            _fill("bias", layer.bias, bias)
    return layer


def _fill(name: str, own: Tensor, stored: Tensor) -> None:
    if own.shape != stored.shape or own.dtype != stored.dtype:
        raise ValueError(
            f"{name} is {stored.dtype} {list(stored.shape)}, expected {own.dtype} {list(own.shape)}"
        )
    own.copy_(stored)


def _sized(name: str, stored: Tensor, count: int) -> Tensor:
    if stored.shape != (count,):
        raise ValueError(f"{name} holds {list(stored.shape)} numbers, expected {count}")
    return stored


def _per_weight(tiles: Tensor, mask: TileMask) -> Tensor:
    wide = tiles.repeat_interleave(mask.tile[0], 0).repeat_interleave(mask.tile[1], 1)
    return wide[: mask.shape[0], : mask.shape[1]]
