"""Runs in a process of its own with TRITON_INTERPRET=1: the Triton kernels on small shapes, on the CPU."""

from __future__ import annotations

import masked_matmul_gpu_cases as cases
import torch

from rlnas_fast.ops.masked_matmul import triton_kernels


def main() -> None:
    for number, (batch, shape, tile, density, int8, with_bits, permute) in enumerate(
        [
            (5, (64, 96), (32, 32), 0.5, False, False, False),
            (33, (40, 72), (16, 16), 0.5, True, True, False),
            (16, (128, 128), (64, 64), 0.7, False, True, True),
            (3, (70, 130), (64, 64), 0.6, True, False, True),
            (17, (100, 50), (24, 8), 0.4, True, True, True),
            (2, (130, 257), (128, 128), 0.0, False, True, False),
        ]
    ):
        check(number, batch, shape, tile, density, int8, with_bits, permute)
    print("interpreted")


def check(
    seed: int,
    batch: int,
    shape: tuple[int, int],
    tile: tuple[int, int],
    density: float,
    int8: bool,
    with_bits: bool,
    permute: bool,
) -> None:
    torch.manual_seed(seed)
    N, K = shape
    grid = (-(-N // tile[0]), -(-K // tile[1]))
    state = (torch.rand(grid) < density).to(torch.uint8)
    if int8:
        state = torch.where((torch.rand(grid) < 0.5) & (state == 1), 2, state).to(torch.uint8)
    kept = torch.rand(shape) < 0.5 if with_bits else None
    mask = cases.tile_tensors(state, kept, shape, tile)
    mask = cases.permuted(mask, seed) if permute else mask
    x, weight, bias, grad_y = torch.randn(batch, K), torch.randn(shape), torch.randn(N), torch.randn(batch, N)
    wanted = cases.reference(x, weight, grad_y, bias, mask, kept)
    wide = torch.full((batch, K + 3), torch.nan)
    wide[:, :K] = x
    found = (
        triton_kernels.forward(wide[:, :K], weight, mask, bias),
        triton_kernels.grad_input(grad_y, weight, mask),
        triton_kernels.grad_weight(grad_y, wide[:, :K], mask),
    )
    for name, got, want in zip(("y", "gx", "gW"), found, wanted, strict=True):
        # float32 sums of at most 257 terms of size about 1
        torch.testing.assert_close(
            got.double(), want, atol=2e-4, rtol=2e-4, msg=lambda m, n=name: f"{seed} {n}: {m}"
        )
    assert bool((found[2][wanted[2] == 0] == 0).all())
    effective = triton_kernels.effective_weight(weight, mask).double()
    torch.testing.assert_close(effective, cases.effective_weight(weight, mask, kept), atol=1e-6, rtol=1e-6)


if __name__ == "__main__":
    main()
