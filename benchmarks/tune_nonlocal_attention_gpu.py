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

from rlnas_fast.ops.nonlocal_attention import cuda, library_core, triton_block, triton_dot, triton_kernels
from rlnas_fast.ops.nonlocal_attention.triton_block import Gemm
from rlnas_fast.ops.nonlocal_attention.triton_kernels import Tiles

WORKERS = 14
Candidate = tuple[str, str, Callable[[], object]]

# batch, d, queries, keys -> forward, query pass, key pass
ATTENTION = {
    (64, 32, 196, 196): ([Tiles(64, 64, 4, 3)], [Tiles(64, 64, 4, 3)], [Tiles(64, 32, 4, 2)]),
    (32, 128, 784, 784): (
        [Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 2), Tiles(128, 32, 4, 2)],
        [Tiles(64, 64, 4, 2), Tiles(128, 64, 8, 1), Tiles(64, 64, 8, 2), Tiles(128, 128, 8, 1)],
        [Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 1), Tiles(128, 32, 4, 2), Tiles(64, 128, 8, 1)],
    ),
    (8, 256, 3136, 784): (
        [Tiles(128, 64, 8, 2), Tiles(128, 64, 8, 3), Tiles(64, 32, 4, 3)],
        [Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 1), Tiles(128, 32, 8, 1), Tiles(64, 64, 4, 1)],
        [Tiles(64, 32, 8, 2), Tiles(128, 32, 8, 1), Tiles(128, 16, 8, 2), Tiles(64, 64, 8, 1)],
    ),
}  # fmt: skip
# Stages of the block: every candidate of ``triton_block.gemm_tiles``, for 128 columns and for 32 to 64.
WIDE = [
    Gemm(128, 128, 64, 8, 3), Gemm(128, 128, 32, 8, 3), Gemm(128, 128, 64, 8, 2), Gemm(64, 128, 32, 4, 3),
    Gemm(64, 128, 64, 4, 3), Gemm(64, 128, 64, 8, 3), Gemm(128, 128, 32, 4, 3), Gemm(64, 128, 32, 4, 4),
    Gemm(128, 64, 64, 4, 3), Gemm(128, 128, 128, 8, 2),
]  # fmt: skip
NARROW = [
    Gemm(64, 32, 32, 4, 3), Gemm(64, 32, 64, 4, 2), Gemm(128, 32, 32, 4, 3), Gemm(64, 64, 32, 4, 3),
    Gemm(64, 64, 64, 4, 3), Gemm(64, 64, 64, 4, 2),
]  # fmt: skip
# Tiles of the attention with its epilogue, and the channels of W_z y made at a time
FUSED = [
    (Tiles(64, 64, 4, 2), 64), (Tiles(64, 64, 4, 2), 32), (Tiles(64, 64, 4, 2), 128),
    (Tiles(128, 64, 4, 2), 64), (Tiles(128, 64, 4, 2), 32), (Tiles(128, 64, 8, 2), 64),
    (Tiles(128, 32, 4, 2), 64), (Tiles(64, 32, 4, 3), 64),
]  # fmt: skip
SMALL = [
    Tiles(64, 64, 4, 2),
    Tiles(64, 64, 4, 1),
    Tiles(64, 32, 4, 2),
    Tiles(128, 64, 8, 2),
    Tiles(64, 128, 4, 1),
]
BLOCKS = [
    Case(64, 64, 14),
    Case(64, 64, 14, True),
    Case(32, 256, 28),
    Case(32, 256, 28, True),
    Case(8, 512, 56, True),
]


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
            yield (
                f"{shape} forward",
                f"SDPA {backend.name}",
                functools.partial(core, backend, query, key, value),
            )
            leaves = [each.detach().requires_grad_() for each in (query, key, value)]
            run = functools.partial(core_gradient, backend, leaves, gradient)
            yield f"{shape} forward+backward", f"SDPA {backend.name}", run
        yield (
            f"{shape} forward+backward",
            "ours",
            functools.partial(both, triton_kernels, theta, phi, g, grad),
        )
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
            yield (
                f"{shape} exact forward+backward",
                name,
                functools.partial(both, kernels, theta, phi, g, grad),
            )
        yield f"{shape} TF32 forward", "softmax(q k^T) v", functools.partial(with_tf32, plain)
        for tiles in (None, Tiles(64, 64, 4, 2), Tiles(128, 32, 8, 2), Tiles(64, 32, 4, 2)):
            run = functools.partial(triton_kernels.attention_forward, theta, phi, g, tiles=tiles)
            yield f"{shape} TF32 forward", str(tiles and tuple(tiles)), functools.partial(with_tf32, run)
        run = functools.partial(both, triton_kernels, theta, phi, g, grad)
        yield f"{shape} TF32 forward+backward", "Triton", functools.partial(with_tf32, run)


def block_candidates() -> Iterator[Candidate]:
    original = triton_block.gemm_tiles, triton_block.attention_tiles
    for case in BLOCKS:
        x, w, b, wz, bz = (tensor.detach() for tensor in case.tensors())
        weights = triton_block.Projections(
            *(part.flatten(1) for part in w.chunk(3)), wz.flatten(1), *b.chunk(3), bz
        )
        pool = (2, 2) if case.pooled else None
        flat = x.movedim(1, -1).flatten(0, 2)
        yield f"{case} project", "cuBLAS", functools.partial(F.linear, flat, w.flatten(1), b)
        saved = triton_block.block_forward(x, weights, pool=pool, residual=True, save=True)[1]
        yield f"{case} forward", "as chosen", functools.partial(forward, x, weights, pool, False)
        yield f"{case} forward+backward", "as chosen", functools.partial(everything, x, weights, pool)
        for tiles in WIDE if case.channels > 64 else NARROW:
            triton_block.gemm_tiles = lambda *_, tiles=tiles: tiles
            forget()
            for stage, run in stages(x, weights, saved, pool).items():
                if stage != "attend":
                    yield f"{case} {stage}", str(tuple(tiles)), run
        triton_block.gemm_tiles = original[0]
        for tiles in FUSED if case.channels < 512 else []:
            triton_block.attention_tiles = lambda *_, tiles=tiles: tiles
            forget()
            yield f"{case} attend", str((*tiles[0], tiles[1])), stages(x, weights, saved, pool)["attend"]
        triton_block.attention_tiles = original[1]
        for tiles in SMALL if case.channels <= 64 else []:
            triton_block.SMALL = tiles
            forget()
            plan = triton_block._forward_plan(*triton_block._signature(x, weights, pool), True, False)
            run = functools.partial(on_stream, plan.small, (x, *weights, torch.empty_like(x)))
            yield f"{case} forward", f"one launch {tuple(tiles)}", run
        forget()


def forget() -> None:
    triton_block._forward_plan.cache_clear()
    triton_block._backward_plan.cache_clear()


def forward(x, weights, pool, save: bool):
    return triton_block.block_forward(x, weights, pool=pool, residual=True, save=save)


def everything(x, weights, pool) -> None:
    z, saved = forward(x, weights, pool, True)
    triton_block.block_backward(z, x, weights, saved, pool=pool, residual=True)


def library_candidates() -> Iterator[Candidate]:
    """Wide heads and many keys: where the libraries' products set the pace."""
    for batch, depth, queries, keys in ((8, 256, 3136, 3136), (8, 256, 3136, 784), (32, 128, 784, 784)):
        query, grad = (rows(batch, depth, queries, torch.bfloat16).mT for _ in range(2))
        key, value = (rows(batch, depth, keys, torch.bfloat16).mT for _ in range(2))
        shape = f"B{batch} d{depth} N{queries} M{keys} bf16"
        mean, lse = library_core.attention_forward(query, key, value)
        yield (
            f"{shape} core forward",
            "library_core",
            functools.partial(library_core.attention_forward, query, key, value),
        )
        run = functools.partial(library_core.attention_backward, grad, query, key, value, mean, lse)
        yield f"{shape} core backward", "library_core", run
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):
            leaves = [each[:, None].detach().requires_grad_() for each in (query, key, value)]
            yield (
                f"{shape} core forward+backward",
                backend.name,
                functools.partial(core_gradient, backend, leaves, grad[:, None]),
            )
        transposed = [each.mT for each in (grad, query, key, value, mean)]
        yield (
            f"{shape} core backward",
            "Triton",
            functools.partial(triton_kernels.attention_backward, *transposed, lse),
        )
    for case in (Case(64, 64, 14), Case(32, 256, 28), Case(32, 256, 28, True), Case(8, 512, 56)):
        x, w, b, wz, bz = (tensor.detach() for tensor in case.tensors())
        weights = triton_block.Projections(
            *(p.flatten(1) for p in w.chunk(3)), wz.flatten(1), *b.chunk(3), bz
        )
        pool = (2, 2) if case.pooled else None
        run = functools.partial(triton_dot.block_forward, x, weights, pool=pool, residual=True)
        yield f"dot {case}", "Triton", run
        plan = triton_dot._plan(*triton_block._signature(x, weights, pool), True)
        partial, folded = torch.empty(plan.partial, device="cuda"), x.new_empty(plan.folded)
        z = torch.empty_like(x)
        for name, launch, tensors in (
            ("moments", plan.moments, (x, weights.phi, weights.g, weights.phi_bias, weights.g_bias, partial)),
            ("fold", plan.fold, (partial, weights.out, folded)),
            ("apply", plan.apply, (x, weights.theta, weights.theta_bias, folded, weights.out_bias, z)),
        ):
            yield f"dot {case}", name, functools.partial(on_stream, launch, tensors)
        if case.channels == 512:
            yield f"{case} forward", "library", functools.partial(forward, x, weights, None, False)
            yield f"{case} forward+backward", "library", functools.partial(everything, x, weights, None)


def stages(
    x: torch.Tensor,
    weights: triton_block.Projections,
    saved: triton_block.Saved,
    pool: tuple[int, int] | None,
) -> dict[str, Callable[[], object]]:
    """Each launch of the block alone, on tensors of the right shapes."""
    z = torch.empty_like(x)
    signature = triton_block._signature(x, weights, pool)
    plan = triton_block._forward_plan(*signature, True, True)
    back = triton_block._backward_plan(*signature, z.stride(), True, True)
    choices = saved.key_choice, saved.value_choice
    gradients = saved.query, saved.key, saved.value
    partial = torch.empty(back.splits, sum(back.pieces), device="cuda")
    calls = {
        "project": (plan.project, (x, *weights[:3], *weights[4:7], *gradients, *choices)),
        "attend": (plan.attend, (*gradients, weights.out, weights.out_bias, x, z, saved.mean, saved.lse)),
        "back": (back.back, (z, weights.out, torch.empty_like(saved.mean))),
        "spread": (back.spread, (z, *gradients, *choices, *weights[:3], torch.empty_like(x))),
        "contribute": (back.contribute, (x, z, *gradients, *choices, saved.mean, partial)),
        "reduce": (back.reduce, (partial, x.new_empty(partial.shape[1]))),
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
    for section in (library_candidates, attention_candidates, single_candidates, block_candidates):
        try:
            yield from section()
        except Exception as error:
            print(f"{section.__name__}: {error!r}"[:300], flush=True)


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
