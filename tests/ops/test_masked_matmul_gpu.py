"""Triton and CUDA C++ kernels of masked_matmul: interpreted, compiled without a GPU, and on one."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import masked_matmul_gpu_cases as cases
import pytest
import torch
from triton_compile import assembler_report, compile_launch

from rlnas_fast.ops.masked_matmul import TileMask, cuda, effective_weight, masked_matmul, triton_kernels
from rlnas_fast.ops.masked_matmul.reference import masked_matmul_reference
from rlnas_fast.ops.masked_matmul.tile_mask import TileTensors

HERE = Path(__file__).parent
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def test_interpreted() -> None:
    """In a process of its own, because interpreting is for all kernels or none."""
    paths = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, str(HERE / "masked_matmul_interpreted.py")],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("interpreted")


@pytest.mark.filterwarnings("ignore::UserWarning:triton.*")
@pytest.mark.parametrize(
    ("tile", "transposed", "kind", "bits", "int8"),
    [
        (16, False, "bf16", False, False),
        (32, True, "bf16", True, False),
        (64, False, "bf16", False, False),
        (64, True, "bf16", True, True),
        (128, False, "fp16", True, False),
        (128, True, "bf16", False, False),
        (64, False, "fp32", False, False),
    ],
)
def test_product_compiles_for_sm90(tile: int, transposed: bool, kind: str, bits: bool, int8: bool) -> None:
    precision = "tf32" if tile == 64 else "ieee"
    launch = triton_kernels._product_launch(
        *((4096, 4096), (tile, tile), transposed, 512, 4096, DTYPES[kind], precision),
        *((False, bits, int8, False, False, True), None),
    )
    dtype, index = DTYPES[kind], torch.int32
    words, payload, scale = (
        part if there else None for part, there in ((index, bits), (torch.int8, int8), (torch.float32, int8))
    )
    compiled = compile_launch(
        launch, [dtype, None, dtype, words, payload, scale, index, index, None, None, dtype, dtype]
    )
    assert compiled.stack_bytes == 0
    assert compiled.shared_bytes <= 227 * 1024
    assert compiled.wgmma or tile < 64


@pytest.mark.filterwarnings("ignore::UserWarning:triton.*")
@pytest.mark.parametrize(("tile", "kind"), [(32, "bf16"), (64, "bf16"), (128, "bf16"), (64, "fp32")])
def test_sampled_product_compiles_for_sm90(tile: int, kind: str) -> None:
    launch = triton_kernels._sampled_launch(
        (4096, 4096), (tile, tile), 512, (4096, 4096), DTYPES[kind], "tf32", (), None
    )
    dtype, index = DTYPES[kind], torch.int32
    compiled = compile_launch(launch, [dtype, dtype, torch.uint8, index, index, index, None, None, dtype])
    assert compiled.stack_bytes == 0
    assert compiled.wgmma or tile < 64


@pytest.mark.parametrize(("source", "wgmma"), [("masked_matmul", False), ("masked_matmul_hopper", True)])
def test_cuda_source_compiles_for_sm90a(source: str, wgmma: bool, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    root, ptx = HERE.parents[1], tmp_path / "kernels.ptx"
    common = [nvcc, "-std=c++17", "-O3", f"-I{root / 'csrc'}", str(root / "csrc" / "cuda" / f"{source}.cu")]
    subprocess.run([*common, "-arch=compute_90a", "-ptx", "-o", str(ptx)], check=True, timeout=300)
    report = assembler_report(ptx.read_text())
    spilled = [int(number) for number in re.findall(r"(\d+) bytes spill", report)]
    assert spilled
    assert not any(spilled), report
    assert ("wgmma.mma_async" in ptx.read_text()) == wgmma


CASES = [  # batch, shape, tile, density of tiles, of bits within, int8, permuted
    (1, (64, 64), (16, 16), 0.5, None, False, "nothing"),
    (65, (160, 96), (32, 32), 0.5, None, True, "nothing"),
    (130, (256, 384), (64, 64), 0.5, 0.5, False, "nothing"),
    (33, (200, 136), (64, 64), 0.6, None, True, "both"),
    (257, (300, 640), (128, 128), 0.5, 0.9, False, "both"),
    (17, (100, 50), (24, 8), 0.4, 0.5, True, "nothing"),
    (512, (512, 512), (128, 64), 0.3, None, False, "nothing"),
]


def make(case: tuple, dtype: torch.dtype, device: str = "cuda"):
    batch, (N, K), tile, density, within, int8, permute = case
    grid = (-(-N // tile[0]), -(-K // tile[1]))
    state = (torch.rand(grid) < density).to(torch.uint8)
    state[0] = 0  # a row without weights
    if int8:
        state = torch.where((torch.rand(grid) < 0.5) & (state == 1), 2, state).to(torch.uint8)
    kept = None if within is None else torch.rand(N, K) < within
    mask = cases.tile_tensors(state, kept, (N, K), tile)
    mask = mask if permute == "nothing" else cases.permuted(mask, 1)
    mask = mask._replace(input_permutation=None) if permute == "outputs" else mask
    mask = mask._replace(output_permutation=None) if permute == "inputs" else mask
    x, weight, bias, grad_y = (
        torch.randn(shape).to(dtype) for shape in ((batch, K), (N, K), (N,), (batch, N))
    )
    wanted = cases.reference(x, weight, grad_y, bias, mask, kept)
    plain = plain_products(x, weight, grad_y, bias, mask, kept, device)
    poison(device)
    inputs = [tensor.to(device) for tensor in (x, weight, grad_y, bias)]
    return inputs, cases.to_device(mask, device), kept, wanted, plain


def poison(device: str) -> None:
    """Leaves NaN in the memory that the next allocations reuse."""
    for size in (1 << 14, 1 << 18, 1 << 20, 1 << 22):
        torch.full((size,), torch.nan, device=device)


def plain_products(x, weight, grad_y, bias, mask, kept, device):
    """The same by plain PyTorch in the same dtype: what our error is measured against."""
    effective = cases.effective_weight(weight, mask, kept).to(weight.dtype)
    chosen = cases.live_weights(mask.state, mask.shape, mask.tile)
    chosen = chosen if kept is None else chosen & kept
    gather = torch.arange(mask.shape[1]) if mask.input_permutation is None else mask.input_permutation.long()
    scatter = (
        torch.arange(mask.shape[0]) if mask.output_permutation is None else mask.output_permutation.long()
    )
    y, gx = torch.empty_like(grad_y), torch.empty_like(x)
    left, right = x[:, gather].to(device), grad_y[:, scatter].to(device)
    y[:, scatter] = (left @ effective.to(device).T).cpu()
    gx[:, gather] = (right @ effective.to(device)).cpu()
    return y + bias, gx, torch.where(chosen, (right.T @ left).cpu(), 0.0)


def close(name: str, got: torch.Tensor, wanted: torch.Tensor, plain: torch.Tensor) -> None:
    """Our error is at most twice that of plain PyTorch, plus one rounding of the result."""
    assert got.shape == wanted.shape
    ours, theirs = (got.cpu().double() - wanted).norm(), (plain.double() - wanted).norm()
    rounding = torch.finfo(got.dtype).eps * wanted.norm()
    assert ours <= 2 * theirs + rounding, f"{name}: error {ours:.3g}, plain PyTorch {theirs:.3g}"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_triton(case: tuple, kind: str) -> None:
    (x, weight, grad_y, bias), mask, _, wanted, plain = make(case, DTYPES[kind])
    wide = torch.full((x.shape[0], x.shape[1] + 8), torch.nan, dtype=x.dtype, device="cuda")
    wide[:, : x.shape[1]] = x
    found = (
        triton_kernels.forward(wide[:, : x.shape[1]], weight, mask, bias),
        triton_kernels.grad_input(grad_y, weight, mask),
        triton_kernels.grad_weight(grad_y, x, mask),
    )
    for name, got, want, peer in zip(("y", "gx", "gW"), found, wanted, plain, strict=True):
        close(name, got, want, peer)
    assert bool((found[2].cpu()[wanted[2] == 0] == 0).all())
    torch.testing.assert_close(triton_kernels.grad_weight(grad_y, x, mask), found[2], rtol=0, atol=0)


CUDA_CASES = [
    (1, (64, 64), (16, 16), 0.5, None, False),
    (2, (100, 64), (32, 32), 0.5, 0.5, True),
    (3, (4096, 1024), (64, 64), 0.5, None, False),
    (8, (260, 96), (4, 8), 0.5, 0.5, True),
    (64, (256, 384), (64, 64), 0.5, None, False),
    (130, (256, 384), (64, 64), 0.5, 0.5, False),
    (257, (300, 640), (128, 128), 0.5, 0.9, False),
    (513, (200, 448), (192, 128), 0.5, 0.9, False),
    (512, (512, 1024), (128, 64), 1.0, 0.5, False),
    (1000, (512, 512), (128, 128), 1.0, 0.5, False),
    (9, (1024, 2048), (128, 128), 0.9, None, False),
    (300, (448, 1344), (64, 128), 0.6, None, False),
    (520, (640, 576), (128, 64), 0.6, None, False),
    (65, (160, 128), (32, 32), 0.3, 0.5, False),
    (130, (256, 384), (16, 16), 0.05, None, False),
    (300, (300, 640), (8, 96), 0.5, 0.5, False),
    (513, (512, 1024), (32, 32), 1.0, 0.5, False),
    (257, (256, 512), (64, 32), 0.1, None, False),
]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("permute", ["nothing", "inputs"])
@pytest.mark.parametrize("case", [CUDA_CASES[i] for i in (4, 10, 11, 12)], ids=str)
def test_cuda_grad_input(case: tuple, kind: str, permute: str) -> None:
    (_, weight, grad_y, _), mask, _, wanted, plain = make((*case, permute), DTYPES[kind])
    if torch.cuda.get_device_capability() == (9, 0):
        close("gx", cuda.grad_input(grad_y, weight, mask), wanted[1], plain[1])
    else:
        assert cuda.grad_input_refusal(grad_y, weight, mask) is not None


@pytest.mark.gpu
@pytest.mark.parametrize("permute", ["nothing", "outputs"])
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("case", CUDA_CASES, ids=str)
def test_cuda_forward(case: tuple, kind: str, permute: str) -> None:
    (x, weight, _, bias), mask, _, wanted, plain = make((*case, permute), DTYPES[kind])
    refusal = cuda.forward_refusal(x, weight, mask)
    if refusal is not None:
        assert x.shape[0] > 8
        assert kind == "fp32" or torch.cuda.get_device_capability() != (9, 0), refusal
        return
    close("y", cuda.forward(x, weight, mask, bias), wanted[0], plain[0])


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((64, 64), (16, 16)),
        ((100, 130), (24, 8)),
        ((300, 256), (64, 64)),
        ((257, 1056), (128, 96)),
        ((33, 7), (5, 3)),
    ],
)
def test_mask_to_lists(shape: tuple[int, int], tile: tuple[int, int]) -> None:
    for density in (0.0, 0.02, 0.5, 1.0):
        dense = torch.rand(shape) < density
        grid = (-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
        before = torch.randint(0, 3, grid, dtype=torch.uint8)
        start = cases.to_device(cases.tile_tensors(before, torch.rand(shape) < 0.5, shape, tile), "cuda")
        cuda.pack_mask(dense.cuda(), start)
        padded = torch.zeros(grid[0] * tile[0], grid[1] * tile[1], dtype=torch.bool)
        padded[: shape[0], : shape[1]] = dense
        occupied = padded.view(grid[0], tile[0], grid[1], tile[1]).any(3).any(1)
        after = torch.where(occupied, before.clamp(min=1), 0).to(torch.uint8)
        same_mask(start, cases.tile_tensors(after, dense, shape, tile))
        start.state.copy_(before)
        cuda.update_lists(start)
        same_mask(start, cases.tile_tensors(before, dense, shape, tile))


def same_mask(got: TileTensors, wanted: TileTensors) -> None:
    for name in ("state", "bits", "row_count", "col_count", "stats"):
        torch.testing.assert_close(getattr(got, name).cpu(), getattr(wanted, name), rtol=0, atol=0)
    for counts, lists in (("row_count", "row_tiles"), ("col_count", "col_tiles")):
        used = torch.arange(getattr(wanted, lists).shape[1]) < getattr(wanted, counts).sum(1, keepdim=True)
        torch.testing.assert_close(
            torch.where(used, getattr(got, lists).cpu(), 0),
            torch.where(used, getattr(wanted, lists), 0),
            rtol=0,
            atol=0,
        )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_captured_graph_follows_the_mask(backend: str) -> None:
    shape, tile, batch = (256, 512), (64, 64), 64
    module = {"triton": triton_kernels, "cuda": cuda}[backend]
    if backend == "cuda" and torch.cuda.get_device_capability() != (9, 0):
        batch = 8
    x = torch.randn(batch, shape[1], dtype=torch.bfloat16, device="cuda")
    weight = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    dense = torch.ones(shape, dtype=torch.bool, device="cuda")
    mask = cases.to_device(
        cases.tile_tensors(
            torch.ones(4, 8, dtype=torch.uint8), torch.ones(shape, dtype=torch.bool), shape, tile
        ),
        "cuda",
    )

    def step() -> torch.Tensor:
        cuda.pack_mask(dense, mask)
        return module.forward(x, weight, mask, None)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = step()
    for density in (0.5, 0.0, 0.02, 1.0):
        dense.copy_(torch.rand(shape, device="cuda") < density)
        y.fill_(torch.nan)
        graph.replay()
        wanted = x.double() @ (weight.double() * dense).T
        assert (y.double() - wanted).norm() <= 0.005 * wanted.norm()  # bf16 rounds to 2^-9 of each result


@pytest.mark.gpu
def test_nothing_kept_and_nothing_given() -> None:
    shape, tile = (128, 192), (64, 64)
    mask = cases.to_device(
        cases.tile_tensors(torch.zeros(2, 3, dtype=torch.uint8), None, shape, tile), "cuda"
    )
    weight = torch.full(shape, torch.nan, dtype=torch.bfloat16, device="cuda")
    bias = torch.randn(shape[0], dtype=torch.bfloat16, device="cuda")
    for batch in (0, 1, 70):
        x = torch.randn(batch, shape[1], dtype=torch.bfloat16, device="cuda")
        grad_y = torch.randn(batch, shape[0], dtype=torch.bfloat16, device="cuda")
        modules = [triton_kernels]
        if cuda.forward_refusal(x, weight, mask) is None:
            modules.append(cuda)
        for module in modules:
            assert torch.equal(module.forward(x, weight, mask, bias), bias.expand(batch, -1))
        assert not triton_kernels.grad_input(grad_y, weight, mask).any()
        assert not triton_kernels.grad_weight(grad_y, x, mask).any()


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (96, (256, 512), (64, 64), 0.5, 0.5, False, "nothing")], ids=str)
def test_operator_and_its_gradients(case: tuple) -> None:
    (x, weight, grad_y, bias), mask, _, wanted, plain = make(case, torch.bfloat16)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    y = masked_matmul(*inputs[:2], TileMask.from_tensors(mask), inputs[2])
    grad_x, grad_weight, _ = torch.autograd.grad(y, inputs, grad_y)
    for name, got, want, peer in zip(("y", "gx", "gW"), (y, grad_x, grad_weight), wanted, plain, strict=True):
        close(name, got.detach(), want, peer)
    effective = triton_kernels.effective_weight(weight.detach(), mask)
    assert torch.equal(effective == 0, effective_weight(weight.detach(), mask) == 0)


@pytest.mark.gpu
def test_int8_activations_follow_the_rounded_rows() -> None:
    case = (65, (160, 96), (32, 32), 0.7, None, True, "nothing")
    (x, weight, _, bias), mask, _, _, _ = make(case, torch.float32)
    got = triton_kernels.forward(x, weight, mask, bias, True)
    wanted = masked_matmul_reference(x, weight, mask, bias, int8_activations=True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)  # sums of 96 terms in another order
