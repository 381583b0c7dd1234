"""How the tiles of the Triton kernels were chosen: every candidate on the shapes that count.

``python benchmarks/tune_nonlocal_attention_gpu.py --json FILE`` compiles in parallel first, then times alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import triton.testing
from nonlocal_attention_gpu_peers import Case
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlnas_fast.ops.nonlocal_attention import cuda, triton_block, triton_kernels
from rlnas_fast.ops.nonlocal_attention.triton_kernels import Tiles

WORKERS = 14
Candidate = tuple[str, str, Callable[[], object]]

# batch, d, queries, keys -> forward, query pass, key pass
ATTENTION = {
    (64, 32, 196, 196): (
        [Tiles(64, 64, 4, 3), Tiles(64, 128, 4, 2), Tiles(128, 64, 4, 2), Tiles(64, 32, 4, 3), Tiles(128, 64, 8, 2)],
        [Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 128, 4, 2), Tiles(128, 64, 8, 2)],
        [Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(128, 64, 8, 2)],
    ),
    (32, 128, 784, 784): (
        [
            Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 3),
            Tiles(128, 128, 8, 2), Tiles(128, 64, 4, 2), Tiles(64, 128, 4, 2),
        ],
        [Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 1), Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(128, 32, 4, 2)],
        [Tiles(64, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 2)],
    ),
    (32, 128, 784, 196): (
        [Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 3), Tiles(128, 64, 8, 2)],
        [Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 2), Tiles(64, 32, 4, 2)],
        [Tiles(64, 64, 8, 2), Tiles(64, 32, 4, 2), Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 2)],
    ),
    (8, 256, 3136, 784): (
        [Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2), Tiles(64, 64, 8, 2)],
        [Tiles(64, 32, 8, 2), Tiles(64, 64, 8, 2), Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 1)],
        [Tiles(64, 16, 8, 2), Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 1)],
    ),
}  # fmt: skip
# rows, columns (of the sum), warps, stages of the projections and of their gradients
GEMM = [
    Tiles(64, 64, 4, 3), Tiles(64, 32, 4, 3), Tiles(128, 64, 8, 3), Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 2),
    Tiles(128, 32, 4, 3), Tiles(64, 64, 8, 3),
]  # fmt: skip
BLOCKS = [Case(64, 64, 14), Case(64, 64, 14, True), Case(32, 256, 28), Case(32, 256, 28, True)]


def rows(batch: int, channels: int, positions: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(batch, positions, channels, device="cuda").to(dtype).transpose(1, 2)


def attention_candidates() -> Iterator[Candidate]:
    for (batch, depth, queries, keys), choices in ATTENTION.items():
        theta, grad = (rows(batch, depth, queries, torch.bfloat16) for _ in range(2))
        phi, g = (rows(batch, depth, keys, torch.bfloat16) for _ in range(2))
        y, lse = triton_kernels.attention_forward(theta, phi, g)
        shape = f"B{batch} d{depth} N{queries} M{keys} bf16"
        for tiles in choices[0]:
            run = functools.partial(triton_kernels.attention_forward, theta, phi, g, tiles=tiles)
            yield f"{shape} forward", str(tuple(tiles)), run
        delta, gtheta, gphi, gg = torch.zeros_like(lse), *(torch.empty_like(each) for each in (theta, phi, g))
        layout = triton_kernels._layout
        common = tuple(layout(each) for each in (theta, phi, g, grad))
        for tiles in choices[1]:
            launch = triton_kernels._query_launch(
                *common, layout(y), layout(gtheta), torch.bfloat16, "tf32", tiles
            )
            tensors = (theta, phi, g, grad, y, lse, delta, gtheta)
            yield f"{shape} query pass", str(tuple(tiles)), functools.partial(on_stream, launch, tensors)
        for tiles in choices[2]:
            launch = triton_kernels._key_launch(
                *common, layout(gphi), layout(gg), torch.bfloat16, "tf32", tiles
            )
            tensors = (theta, phi, g, grad, lse, delta, gphi, gg)
            yield f"{shape} key pass", str(tuple(tiles)), functools.partial(on_stream, launch, tensors)
        query, key, value, gradient = (each.transpose(1, 2)[:, None] for each in (theta, phi, g, grad))
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            yield f"{shape} forward", f"SDPA {backend.name}", functools.partial(core, backend, query, key, value)
            leaves = [each.detach().requires_grad_() for each in (query, key, value)]
            run = functools.partial(core_gradient, backend, leaves, gradient)
            yield f"{shape} forward+backward", f"SDPA {backend.name}", run
        yield f"{shape} forward+backward", "ours", functools.partial(both, triton_kernels, theta, phi, g, grad)
        if depth <= 128:
            yield f"{shape} forward", "CUDA C++", functools.partial(cuda.attention_forward, theta, phi, g)


def single_candidates() -> Iterator[Candidate]:
    """float32, exact and TF32."""
    for batch, depth, positions in ((64, 32, 196), (4, 128, 784)):
        theta, phi, g, grad = (rows(batch, depth, positions, torch.float32) for _ in range(4))
        shape = f"B{batch} d{depth} N{positions} M{positions} fp32"
        plain = functools.partial(textbook, theta, phi, g)
        yield f"{shape} exact forward", "softmax(q k^T) v", plain
        for name, kernels in (("Triton", triton_kernels), ("CUDA C++", cuda)):
            yield f"{shape} exact forward", name, functools.partial(kernels.attention_forward, theta, phi, g)
            yield f"{shape} exact forward+backward", name, functools.partial(both, kernels, theta, phi, g, grad)
        yield f"{shape} TF32 forward", "softmax(q k^T) v", functools.partial(with_tf32, plain)
        for tiles in (None, Tiles(64, 64, 4, 2), Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2)):
            run = functools.partial(triton_kernels.attention_forward, theta, phi, g, tiles=tiles)
            yield f"{shape} TF32 forward", str(tiles and tuple(tiles)), functools.partial(with_tf32, run)
        run = functools.partial(both, triton_kernels, theta, phi, g, grad)
        yield f"{shape} TF32 forward+backward", "Triton", functools.partial(with_tf32, run)


def block_candidates() -> Iterator[Candidate]:
    chosen = triton_block._gemm_tiles
    for case in BLOCKS:
        x, w, b, wz, bz = (tensor.detach() for tensor in case.tensors())
        weights = triton_block.Projections(
            *(part.flatten(1) for part in w.chunk(3)), wz.flatten(1), *b.chunk(3), bz
        )
        pool = (2, 2) if case.pooled else None
        flat = x.movedim(1, -1).flatten(0, 2)
        yield f"{case} projection", "cuBLAS", functools.partial(F.linear, flat, w.flatten(1), b)
        saved = triton_block.block_forward(x, weights, pool=pool, residual=True, save=True)[1]
        for tiles in GEMM:
            triton_block._gemm_tiles = lambda *_, tiles=tiles: tiles
            for cached in (triton_block._forward_launches, triton_block._backward_launches):
                cached.cache_clear()
            for stage, run in stages(x, weights, saved, pool).items():
                yield f"{case} {stage}", str(tuple(tiles)), run
        triton_block._gemm_tiles = chosen
    for cached in (triton_block._forward_launches, triton_block._backward_launches):
        cached.cache_clear()


def stages(
    x: torch.Tensor,
    weights: triton_block.Projections,
    saved: triton_block.Saved,
    pool: tuple[int, int] | None,
) -> dict[str, Callable[[], object]]:
    """Each launch of the block alone, on tensors of the right shapes."""
    z = torch.empty_like(x)
    geometry, strides = triton_block._geometry(x, pool), triton_block._strides(x)
    sizes = (x.shape[0], x.shape[1], weights.theta.shape[0], weights.g.shape[0], x.dtype, "tf32")
    project, attend = triton_block._forward_launches(geometry, strides, *sizes, True, True, True, True, ())
    back, spread, contribute, splits = triton_block._backward_launches(
        geometry, geometry, strides, *sizes, True, ()
    )
    choices = saved.key_choice, saved.value_choice
    gradients = saved.query, saved.key, saved.value
    total = 2 * (weights.theta.numel() + weights.g.numel()) + sum(bias.numel() for bias in weights[4:])
    partial = torch.empty(splits, total, device="cuda")
    calls = {
        "projection": (project, (x, *weights[:3], *weights[4:7], *gradients, *choices)),
        "attention": (attend, (*gradients, weights.out, weights.out_bias, x, z, saved.mean, saved.lse)),
        "gradient of W_z y": (back, (z, weights.out, torch.empty_like(saved.mean))),
        "gradient of x": (spread, (z, *gradients, *choices, *weights[:3], torch.empty_like(x))),
        "gradient of weights": (contribute, (x, z, *gradients, *choices, saved.mean, partial)),
    }
    return {name: functools.partial(on_stream, launch, tensors) for name, (launch, tensors) in calls.items()}


def on_stream(launch: Callable[..., None], tensors: tuple[torch.Tensor | None, ...]) -> None:
    launch(torch.cuda.current_stream().cuda_stream, *tensors)


def both(kernels, theta, phi, g, grad) -> None:
    y, lse = kernels.attention_forward(theta, phi, g)
    kernels.attention_backward(grad, theta, phi, g, y, lse)


def textbook(theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return torch.softmax(theta.mT @ phi, -1) @ g.mT


def core(backend: SDPBackend, *tensors: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*tensors, scale=1.0)


def core_gradient(backend: SDPBackend, leaves: list[torch.Tensor], grad: torch.Tensor) -> None:
    torch.autograd.grad(core(backend, *leaves), leaves, grad)


def with_tf32(run: Callable[[], object]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        run()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def candidates() -> Iterator[Candidate]:
    yield from attention_candidates()
    yield from single_candidates()
    yield from block_candidates()


def warm(worker: int) -> None:
    """Compiles this worker's share into Triton's cache on disk."""
    for index, (group, name, run) in enumerate(candidates()):
        if index % WORKERS == worker:
            try:
                run()
            except Exception as error:
                print(f"{group} {name}: {error!r}"[:200], flush=True)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.warm is not None:
        return warm(options.warm)
    command = [sys.executable, __file__, "--warm"]
    compilers = [subprocess.Popen([*command, str(worker)]) for worker in range(WORKERS)]
    for process in compilers:
        process.wait()
    figures: dict[str, dict[str, float]] = {}
    for group, name, run in candidates():
        try:
            time_us = 1e3 * triton.testing.do_bench_cudagraph(run, rep=15, return_mode="median")
        except Exception as error:
            print(f"{group} {name}: {error!r}"[:200], flush=True)
            continue
        figures.setdefault(group, {})[name] = round(time_us, 2)
    for group, times in figures.items():
        ordered = sorted(times.items(), key=lambda item: item[1])
        print(f"{group}: " + ", ".join(f"{name} {time_us:.1f}" for name, time_us in ordered), flush=True)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
