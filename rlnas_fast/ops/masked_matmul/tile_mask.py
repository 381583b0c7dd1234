"""Which weights of a matrix take part in a product, in the form that kernels read.

Layout, shared by every backend.  With N output features, K input features, tiles of R x C, TN = ceil(N / R),
TK = ceil(K / C) and W = ceil(K / 32), all tensors contiguous and on one device:

====================  =================  ======================================================================
field                 dtype and shape    meaning
====================  =================  ======================================================================
``state``             uint8 [TN, TK]     0 prune, 1 keep, 2 int8; the source of truth for tiles
``bits``              int32 [N, W]|None  bit ``k % 32`` of word ``[n, k // 32]`` is set where weight (n, k) is kept
                                         inside a live tile; bits past K are 0; bits of pruned tiles are ignored.
                                         ``None``: live tiles are complete
``row_count``         int32 [TN, 2]      number of keep and of int8 tiles in tile row i
``row_tiles``         int32 [TN, TK]     column-tile indices of row i: its keep tiles, ascending, then its int8
                                         tiles, ascending; the rest of the row is undefined
``col_count``         int32 [TK, 2]      the same by tile column j: for the gradient to x
``col_tiles``         int32 [TK, TN]     row-tile indices of column j, keep tiles then int8 tiles, ascending
``stats``             int64 [4]          keep tiles, int8 tiles, kept weights, live tiles that are not complete
``payload``           int8 [N, K]|None   integers of the int8 tiles, in the weight's own layout; elsewhere undefined
``scale``             fp32 [TN, TK]|None an int8 tile's weight is ``scale * payload``; > 0 and finite
``input_permutation`` int32 [K]|None     column k of the weight multiplies ``x[..., input_permutation[k]]``
``output_permutation``int32 [N]|None     row n of the weight makes ``y[..., output_permutation[n]]``
====================  =================  ======================================================================

A weight (n, k) is kept when ``state[n // R, k // C] != 0`` and its bit, if there are bits, is set; edge tiles are
ragged (smaller), never padded.  ``update_lists`` derives counts, lists and stats from ``state`` and ``bits`` in place,
on the device, without telling the host: the tensors never move, so a captured CUDA graph sees the new mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

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
