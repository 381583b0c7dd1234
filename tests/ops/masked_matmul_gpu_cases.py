"""Masks and references for the GPU kernels of masked_matmul, made with plain torch and nothing of ours."""

from __future__ import annotations

import torch

from rlnas_fast.ops.masked_matmul.tile_mask import TileTensors


def tile_tensors(
    state: torch.Tensor,
    kept: torch.Tensor | None,
    shape: tuple[int, int],
    tile: tuple[int, int],
    seed: int = 0,
) -> TileTensors:
    """Lays out a mask, slowly: ``state`` uint8 [TN, TK]; ``kept`` bool [N, K] or None for complete tiles."""
    TN, TK = state.shape
    generator = torch.Generator().manual_seed(seed)
    payload = scale = None
    if bool((state == 2).any()):
        payload = torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)
        scale = torch.rand(TN, TK, generator=generator) * 0.01 + 0.001
    undefined = 1 << 30
    row_count, row_tiles = (
        torch.zeros(TN, 2, dtype=torch.int32),
        torch.full((TN, TK), undefined, dtype=torch.int32),
    )
    col_count, col_tiles = (
        torch.zeros(TK, 2, dtype=torch.int32),
        torch.full((TK, TN), undefined, dtype=torch.int32),
    )
    for count, tiles, lines in ((row_count, row_tiles, state), (col_count, col_tiles, state.T)):
        for index, line in enumerate(lines):
            found = [torch.nonzero(line == kind).flatten() for kind in (1, 2)]
            count[index] = torch.tensor([len(found[0]), len(found[1])], dtype=torch.int32)
            both = torch.cat(found).to(torch.int32)
            tiles[index, : len(both)] = both
    live = live_weights(state, shape, tile)
    stats = torch.tensor(
        [
            int((state == 1).sum()),
            int((state == 2).sum()),
            int((live if kept is None else live & kept).sum()),
            0 if kept is None else incomplete_tiles(state, kept, tile),
        ]
    )
    return TileTensors(
        shape, tile, state, None if kept is None else pack_bits(kept),
        row_count, row_tiles, col_count, col_tiles, stats, payload, scale, None, None,
    )  # fmt: skip


def live_weights(state: torch.Tensor, shape: tuple[int, int], tile: tuple[int, int]) -> torch.Tensor:
    grown = state.repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
    return grown[: shape[0], : shape[1]] != 0


def incomplete_tiles(state: torch.Tensor, kept: torch.Tensor, tile: tuple[int, int]) -> int:
    blocks = [
        kept[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]]
        for i, j in torch.nonzero(state).tolist()
    ]
    return sum(not bool(block.all()) for block in blocks)


def pack_bits(kept: torch.Tensor) -> torch.Tensor:
    N, K = kept.shape
    words = -(-K // 32)
    padded = torch.zeros(N, words * 32, dtype=torch.int64)
    padded[:, :K] = kept
    packed = (padded.view(N, words, 32) << torch.arange(32)).sum(2)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def effective_weight(weight: torch.Tensor, mask: TileTensors, kept: torch.Tensor | None) -> torch.Tensor:
    """W o M in float64, int8 tiles dequantised."""
    shape, tile = mask.shape, mask.tile
    result = weight.double()
    if mask.payload is not None:
        assert mask.scale is not None
        grown = mask.scale.double().repeat_interleave(tile[0], 0).repeat_interleave(tile[1], 1)
        quantised = live_weights((mask.state == 2).to(torch.uint8), shape, tile)
        result = torch.where(quantised, mask.payload.double() * grown[: shape[0], : shape[1]], result)
    chosen = live_weights(mask.state, shape, tile)
    return torch.where(chosen if kept is None else chosen & kept, result, 0.0)


def to_device(mask: TileTensors, device: str) -> TileTensors:
    return TileTensors(*(value.to(device) if isinstance(value, torch.Tensor) else value for value in mask))


def permuted(mask: TileTensors, seed: int) -> TileTensors:
    generator = torch.Generator().manual_seed(seed)
    N, K = mask.shape
    return mask._replace(
        input_permutation=torch.randperm(K, generator=generator).to(torch.int32),
        output_permutation=torch.randperm(N, generator=generator).to(torch.int32),
    )


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    grad_y: torch.Tensor,
    bias: torch.Tensor | None,
    mask: TileTensors,
    kept: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, gx and gW in float64 by dense products."""
    effective = effective_weight(weight, mask, kept)
    chosen = live_weights(mask.state, mask.shape, mask.tile)
    chosen = chosen if kept is None else chosen & kept
    x, grad_y = x.double(), grad_y.double()
    gather = torch.arange(mask.shape[1]) if mask.input_permutation is None else mask.input_permutation.long()
    scatter = (
        torch.arange(mask.shape[0]) if mask.output_permutation is None else mask.output_permutation.long()
    )
    y, gx = torch.empty_like(grad_y), torch.empty_like(x)
    y[:, scatter] = x[:, gather] @ effective.T
    if bias is not None:
        y += bias.double()
    gx[:, gather] = grad_y[:, scatter] @ effective
    return y, gx, torch.where(chosen, grad_y[:, scatter].T @ x[:, gather], 0.0)
