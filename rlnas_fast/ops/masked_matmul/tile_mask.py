"""Which weights of a matrix take part in a product, in the form that kernels read.

Layout, shared by every backend.  With N output features, K input features, tiles of R x C, TN = ceil(N / R),
TK = ceil(K / C) and W = ceil(K / 32), all tensors contiguous and on one device:

====================  =================  ================================================================
field                 dtype and shape    meaning
====================  =================  ================================================================
``state``             uint8 [TN, TK]     0 prune, 1 keep, 2 int8; the source of truth for tiles
``bits``              int32 [N, W]|None  bit ``k % 32`` of word ``[n, k // 32]`` is set where weight (n, k)
                                         is kept inside a live tile; bits past K are 0; bits of pruned
                                         tiles are ignored.  ``None``: live tiles are complete
``row_count``         int32 [TN, 2]      number of keep and of int8 tiles in tile row i
``row_tiles``         int32 [TN, TK]     column-tile indices of row i: its keep tiles, ascending, then its
                                         int8 tiles, ascending; the rest of the row is undefined
``col_count``         int32 [TK, 2]      the same by tile column j: for the gradient to x
``col_tiles``         int32 [TK, TN]     row-tile indices of column j, keep tiles then int8 tiles, ascending
``stats``             int64 [4]          keep tiles, int8 tiles, kept weights, live tiles not complete
``payload``           int8 [N, K]|None   integers of the int8 tiles, in the weight's layout; else undefined
``scale``             fp32 [TN, TK]|None an int8 tile's weight is ``scale * payload``; > 0 and finite
``input_permutation`` int32 [K]|None     column k of the weight multiplies ``x[..., input_permutation[k]]``
``output_permutation``int32 [N]|None     row n of the weight makes ``y[..., output_permutation[n]]``
====================  =================  ================================================================

A weight (n, k) is kept when ``state[n // R, k // C] != 0`` and its bit, if there are bits, is set; edge tiles
are ragged (smaller), never padded.  ``update_lists`` derives counts, lists and stats from ``state`` and
``bits`` in place, on the device, without telling the host: the tensors never move, so a captured CUDA graph
sees the new mask.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple, Self

import torch

from rlnas_fast.errors import ConfigError, ShapeError

PRUNE, KEEP, INT8 = 0, 1, 2


class TileTensors(NamedTuple):
    """The tensors of a mask as kernels receive them; the module's docstring gives the layout."""

    shape: tuple[int, int]
    tile: tuple[int, int]
    state: torch.Tensor
    bits: torch.Tensor | None
    row_count: torch.Tensor
    row_tiles: torch.Tensor
    col_count: torch.Tensor
    col_tiles: torch.Tensor
    stats: torch.Tensor
    payload: torch.Tensor | None
    scale: torch.Tensor | None
    input_permutation: torch.Tensor | None
    output_permutation: torch.Tensor | None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> TileTensors:
        """Applies a function to every tensor."""
        fields = self._asdict().items()
        changed: dict[str, Any] = {k: function(v) for k, v in fields if isinstance(v, torch.Tensor)}
        return self._replace(**changed)


class TileMask:
    """A mask over tiles of a weight, with single weights dropped inside them where wanted.

    Starts with every weight kept.  ``update`` and ``quantise`` change it in place; the layout of its tensors
    is in the module's docstring.

    Args:
        shape: [N, K] of the weight, output by input features.
        tile: rows and columns of a tile; edge tiles are smaller where they do not divide the shape.
        unstructured: room for one bit a weight, so that ``update(dense=...)`` may drop single weights.
        int8: room for int8 tiles (one byte a weight and one scale a tile).
        input_permutation: int [K] permutation p: column k of the weight multiplies ``x[..., p[k]]``.  With
            ``weight = dense_weight[:, p]`` the product does not change: weights can be gathered into tiles.
        output_permutation: int [N] permutation q: row n of the weight makes ``y[..., q[n]]``; likewise with
            ``weight = dense_weight[q]``.  A bias is in the order of y.
        device: where the tensors live.

    Raises:
        ShapeError: a size that is not one, or a permutation that is not one.
    """

    def __init__(
        self,
        shape: Sequence[int],
        tile: Sequence[int] = (32, 32),
        *,
        unstructured: bool = False,
        int8: bool = False,
        input_permutation: torch.Tensor | None = None,
        output_permutation: torch.Tensor | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        rows, cols = _two_sizes("shape", shape, at_least=0)
        tile_rows, tile_cols = _two_sizes("tile", tile, at_least=1)
        tiles_n, tiles_k = -(-rows // tile_rows), -(-cols // tile_cols)

        def room(dtype: torch.dtype, *sizes: int) -> torch.Tensor:
            return torch.zeros(sizes, dtype=dtype, device=device)

        self.tensors = TileTensors(
            shape=(rows, cols),
            tile=(tile_rows, tile_cols),
            state=room(torch.uint8, tiles_n, tiles_k).fill_(KEEP),
            bits=room(torch.int32, rows, -(-cols // 32)).fill_(-1) if unstructured else None,
            row_count=room(torch.int32, tiles_n, 2),
            row_tiles=room(torch.int32, tiles_n, tiles_k),
            col_count=room(torch.int32, tiles_k, 2),
            col_tiles=room(torch.int32, tiles_k, tiles_n),
            stats=room(torch.int64, 4),
            payload=room(torch.int8, rows, cols) if int8 else None,
            scale=room(torch.float32, tiles_n, tiles_k).fill_(1.0) if int8 else None,
            input_permutation=_permutation("input_permutation", input_permutation, cols, device),
            output_permutation=_permutation("output_permutation", output_permutation, rows, device),
        )
        if self.tensors.bits is not None and cols % 32:
            self.tensors.bits[:, -1] = (1 << cols % 32) - 1
        update_lists(self.tensors)

    @classmethod
    def from_tensors(cls, tensors: TileTensors) -> Self:
        """Wraps tensors of the documented layout; they are neither copied nor checked."""
        mask = cls.__new__(cls)
        mask.tensors = tensors
        return mask

    @classmethod
    def from_dense(cls, dense: torch.Tensor, tile: Sequence[int] = (32, 32), **options: Any) -> Self:
        """Makes the mask of a bool tensor [N, K], on its device.

        Tiles without kept weights are pruned.  ``options`` are those of ``TileMask``.
        """
        if dense.dim() != 2:
            raise ShapeError(f"dense must be [out features, in features], got shape {list(dense.shape)}")
        mask = cls(dense.shape, tile, **cls._options(options, unstructured=True, device=dense.device))
        mask.update(dense=dense)
        return mask

    @classmethod
    def from_scores(
        cls,
        scores: torch.Tensor,
        density: float,
        tile: Sequence[int] = (32, 32),
        *,
        whole_tiles: bool = False,
        **options: Any,
    ) -> Self:
        """Keeps the weights, or the tiles, with the largest scores.

        Args:
            scores: [N, K], larger is kept first; ties go to the earlier weight.
            density: share of weights to keep, in [0, 1]; exactly ``round(density * N * K)`` weights are kept,
                or with ``whole_tiles`` the best tiles by mean score until that many weights are reached, the
                last tile being the one that comes closest.
            tile: rows and columns of a tile.
            whole_tiles: decide by tile.
            options: as for ``TileMask``.

        Raises:
            ShapeError: scores are not a matrix.
            ConfigError: density is outside [0, 1], or scores hold NaN.
        """
        if scores.dim() != 2:
            raise ShapeError(f"scores must be [out features, in features], got shape {list(scores.shape)}")
        if not 0 <= density <= 1:
            raise ConfigError(f"density must be in [0, 1], got {density}")
        if torch.isnan(scores).any():
            raise ConfigError("scores hold NaN; give every weight a number")
        wanted = round(density * scores.numel())
        if not whole_tiles:
            order = scores.flatten().sort(descending=True, stable=True).indices
            dense = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
            dense[order[:wanted]] = True
            return cls.from_dense(dense.view_as(scores), tile, **options)
        mask = cls(scores.shape, tile, **cls._options(options, device=scores.device))
        ones = torch.ones_like(scores, dtype=torch.float64)
        sizes = _tile_sums(ones, mask.tensors.tile)
        means = _tile_sums(scores.double(), mask.tensors.tile) / sizes
        order = means.flatten().sort(descending=True, stable=True).indices
        reached = sizes.flatten()[order].cumsum(0)
        count = (
            int(torch.cat([reached.new_zeros(1), reached]).sub(wanted).abs().argmin()) if len(order) else 0
        )
        state = torch.zeros_like(mask.tensors.state).flatten()
        state[order[:count]] = KEEP
        mask.update(state=state.view_as(mask.tensors.state))
        return mask

    @classmethod
    def two_of_four(cls, scores: torch.Tensor, tile: Sequence[int] = (32, 32), **options: Any) -> Self:
        """Keeps the two largest scores of every four along a row (2:4); K must be a multiple of 4."""
        if scores.dim() != 2 or scores.shape[1] % 4:
            raise ShapeError(
                f"scores must be [out, in] with in a multiple of 4, got shape {list(scores.shape)}"
            )
        fours = scores.reshape(-1, 4)
        order = fours.sort(dim=1, descending=True, stable=True).indices[:, :2]
        dense = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, order, True)
        return cls.from_dense(dense.view_as(scores), tile, **options)

    @staticmethod
    def _options(given: dict[str, Any], **defaults: Any) -> dict[str, Any]:
        return defaults | given

    def update(self, *, state: torch.Tensor | None = None, dense: torch.Tensor | None = None) -> None:
        """Changes the mask in place: one memory-bound pass, and on a GPU no word to the host.

        Args:
            state: [TN, TK] of 0 (prune), 1 (keep) and 2 (int8); values are checked on a CPU only.
            dense: bool [N, K]; sets the bits and, by them, which tiles are pruned.  With both, ``state`` says
                which of the tiles that hold weights are int8, and a tile that it prunes stays pruned.

        Raises:
            ShapeError, ConfigError, KernelUnavailable
        """
        t = self.tensors
        if dense is not None:
            _check_dense(dense, t)
        if state is not None:
            _check_state(state, t)
            t.state.copy_(state)
            if dense is not None:
                dense = dense & _expand(t.state != PRUNE, t)
        if dense is not None:
            pack_mask(dense, t)
        else:
            update_lists(t)

    def quantise(self, weight: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Fills the payload of every tile from a weight, so that int8 tiles mean ``scale * payload``.

        Products read an int8 tile's payload, never the weight, so call this again after the weight has
        changed.

        Args:
            weight: [N, K].
            scale: fp32 [TN, TK], > 0 and finite (checked on a CPU only); by default the largest magnitude of
                the tile's kept weights / 127, or 1 where there are none.
        """
        t = self.tensors
        if t.payload is None or t.scale is None:
            raise ConfigError("this mask has no room for int8 tiles; make it with int8=True")
        _check_weight(weight, t)
        values = weight.detach().float()
        if t.bits is not None:
            values = values * self.dense()
        if scale is None:
            largest = _tile_blocks(values.abs(), t.tile).amax(dim=(1, 3)) if values.numel() else t.scale
            scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        else:
            check_scale(scale, t)
        t.scale.copy_(scale)
        t.payload.copy_((values / _expand(t.scale, t)).round().clamp(-127, 127))

    def dense(self) -> torch.Tensor:
        """Returns the bool tensor [N, K] of the kept weights."""
        t = self.tensors
        kept = _expand(t.state != PRUNE, t)
        return kept if t.bits is None else kept & unpack_bits(t.bits, t.shape[1])

    def nonzeros(self) -> int:
        """Counts the kept weights (on a GPU this waits for the device)."""
        return int(self.tensors.stats[2])

    def density(self) -> float:
        """Returns the share of kept weights (on a GPU this waits for the device)."""
        return self.nonzeros() / max(1, self.tensors.shape[0] * self.tensors.shape[1])

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of the weight."""
        return self.tensors.shape

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of a tile."""
        return self.tensors.tile

    @property
    def state(self) -> torch.Tensor:
        """uint8 [TN, TK]: 0 prune, 1 keep, 2 int8; change it with ``update``."""
        return self.tensors.state

    def to(self, device: torch.device | str) -> TileMask:
        """Returns a copy on another device."""
        return TileMask.from_tensors(self.tensors.map(lambda tensor: tensor.to(device, copy=True)))

    def __repr__(self) -> str:
        t = self.tensors
        options = [
            name for name, given in (("unstructured", t.bits), ("int8", t.payload)) if given is not None
        ]
        return f"TileMask(shape={t.shape}, tile={t.tile}, {', '.join([*options, str(t.state.device)])})"


def update_lists(t: TileTensors) -> None:
    """Derives counts, lists and stats from state and bits, in place, on the mask's device."""
    _backend(t, "update_lists").update_lists(t)
    derived = (t.row_count, t.row_tiles, t.col_count, t.col_tiles, t.stats)
    torch.autograd.graph.increment_version(derived)


def pack_mask(dense: torch.Tensor, t: TileTensors) -> None:
    """Sets bits, state, lists and stats from a bool [N, K], in place, on the mask's device."""
    _backend(t, "pack_mask").pack_mask(dense, t)
    derived = (t.state, t.row_count, t.row_tiles, t.col_count, t.col_tiles, t.stats)
    torch.autograd.graph.increment_version(derived if t.bits is None else (*derived, t.bits))


def unpack_bits(bits: torch.Tensor, cols: int) -> torch.Tensor:
    """Turns int32 [N, W] words into bool [N, cols]."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(1)[:, :cols].bool()


def check_scale(scale: torch.Tensor, t: TileTensors) -> None:
    """Refuses scales of another shape, and on a CPU those that are not positive and finite."""
    if scale.shape != t.state.shape:
        raise ShapeError(f"scale must be {list(t.state.shape)}, one a tile, got {list(scale.shape)}")
    if scale.device.type == "cpu" and not bool(((scale > 0) & torch.isfinite(scale)).all()):
        wrong = scale[~((scale > 0) & torch.isfinite(scale))].flatten()[0].item()
        raise ConfigError(f"scale must be positive and finite, got {wrong}")


def _backend(t: TileTensors, function: str) -> ModuleType:
    if t.state.device.type == "cpu":
        return importlib.import_module("rlnas_fast.ops.masked_matmul.cpu")
    from rlnas_fast.ops.masked_matmul.dispatch import gpu_backend

    return gpu_backend(function)


def _expand(tiles: torch.Tensor, t: TileTensors) -> torch.Tensor:
    """One value a tile to one a weight."""
    wide = tiles.repeat_interleave(t.tile[0], 0).repeat_interleave(t.tile[1], 1)
    return wide[: t.shape[0], : t.shape[1]]


def _tile_blocks(values: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """[N, K] to [TN, R, TK, C], edges padded with 0."""
    rows, cols = values.shape
    padded = torch.nn.functional.pad(values, (0, -cols % tile[1], 0, -rows % tile[0]))
    return padded.view(padded.shape[0] // tile[0], tile[0], padded.shape[1] // tile[1], tile[1])


def _tile_sums(values: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    return _tile_blocks(values, tile).sum(dim=(1, 3))


def _two_sizes(name: str, sizes: Sequence[int], at_least: int) -> tuple[int, int]:
    if len(sizes) != 2 or any(int(size) != size or size < at_least for size in sizes):
        raise ShapeError(f"{name} must be two whole numbers >= {at_least}, got {tuple(sizes)}")
    return int(sizes[0]), int(sizes[1])


def _permutation(
    name: str, order: torch.Tensor | None, size: int, device: torch.device | str | None
) -> torch.Tensor | None:
    if order is None:
        return None
    order = torch.as_tensor(order)
    if order.shape != (size,) or order.is_floating_point() or order.dtype == torch.bool:
        raise ShapeError(
            f"{name} must be [{size}] whole numbers, got {order.dtype} of shape {list(order.shape)}"
        )
    if not torch.equal(order.long().sort().values, torch.arange(size, device=order.device)):
        raise ShapeError(f"{name} is not a permutation: it must hold each of 0..{size - 1} once")
    return order.to(device=device, dtype=torch.int32).contiguous()


def _check_weight(weight: torch.Tensor, t: TileTensors) -> None:
    if tuple(weight.shape) != t.shape:
        raise ShapeError(f"weight must be {list(t.shape)} like its mask, got {list(weight.shape)}")
    if weight.device != t.state.device:
        raise ShapeError(f"weight is on {weight.device} but its mask on {t.state.device}; move one of them")


def _check_dense(dense: torch.Tensor, t: TileTensors) -> None:
    if t.bits is None:
        raise ConfigError("this mask has no room for single weights; make it with unstructured=True")
    if tuple(dense.shape) != t.shape:
        raise ShapeError(f"dense must be {list(t.shape)}, got {list(dense.shape)}")
    if dense.dtype != torch.bool:
        raise ConfigError(f"dense must be bool, got {dense.dtype}; compare it with a threshold first")
    if dense.device != t.state.device:
        raise ShapeError(f"dense is on {dense.device} but the mask on {t.state.device}; move one of them")


def _check_state(state: torch.Tensor, t: TileTensors) -> None:
    if state.shape != t.state.shape:
        raise ShapeError(f"state must be {list(t.state.shape)}, one a tile, got {list(state.shape)}")
    if state.is_floating_point():
        raise ConfigError(f"state must hold whole numbers 0, 1 or 2, got {state.dtype}")
    if state.device != t.state.device:
        raise ShapeError(f"state is on {state.device} but the mask on {t.state.device}; move one of them")
    if state.device.type == "cpu" and state.numel():
        low, high = (int(end) for end in state.aminmax())
        top = INT8 if t.payload is not None else KEEP
        if low < PRUNE or high > top:
            wrong = low if low < PRUNE else high
            hint = "; make the mask with int8=True for int8 tiles" if wrong == INT8 else ""
            raise ConfigError(f"state must lie in 0..{top}, got {wrong}{hint}")
