"""Non-local attention on a GPU: numbers on a GPU; without one, the interpreter and the compilers' reports."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import nonlocal_attention_gpu_cases as cases
import pybind11
import pytest
import torch

pytest.importorskip("triton", reason="Triton is optional")

from triton_compile import compile_launch, resource_usage

from rlnas_fast.ops.nonlocal_attention import (
    cuda,
    nonlocal_block,
    reference,
    triton_block,
    triton_dot,
    triton_kernels,
)

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KERNELS = [pytest.param(triton_kernels, id="triton"), pytest.param(cuda, id="cuda")]
# batch, D, E, N, M
SHAPES = [
    (2, 32, 32, 196, 49),
    (3, 5, 7, 9, 11),
    (1, 1, 1, 1, 1),
    (2, 64, 64, 65, 1),
    (1, 128, 128, 300, 300),
    (1, 256, 256, 130, 70),
    (1, 300, 270, 66, 40),
]
LAYOUTS = ["contiguous", "channels_last", "sliced", "misaligned", "expanded"]
# What rounding one result costs, when plain PyTorch happens to be exact.
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
TF32_FLOOR = 2**-7  # a chain of four products whose operands keep 10 bits
# torch says so when the first product of a thread is one of autograd's.
pytestmark = pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning")


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills new memory with NaN, as torch does in deterministic mode."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def within_twice_plain(
    found: cases.Tensors, plain: cases.Tensors, exact: cases.Tensors, dtype: torch.dtype
) -> None:
    """The rule of flash-attention's tests: at most twice the error of plain PyTorch in the same dtype."""
    for index, (ours, theirs, truth) in enumerate(zip(found, plain, exact, strict=True)):
        if not truth.any():  # one key: what is left is the rounding of terms that cancel
            assert ours.abs().max() <= 64 * FLOOR[dtype]
            continue
        error, allowed = cases.distance(ours, truth), 2 * cases.distance(theirs, truth) + FLOOR[dtype]
        assert error <= allowed, f"tensor {index}: error {error:.2e}, allowed {allowed:.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(SHAPES)))
def test_attention_is_as_exact_as_plain_pytorch(kernels: ModuleType, dtype: torch.dtype, number: int) -> None:
    batch, depth, width, queries, keys = SHAPES[number]
    layout = LAYOUTS[number % len(LAYOUTS)]
    theta, phi = (cases.laid_out((batch, depth, n), layout, dtype, "cuda") for n in (queries, keys))
    theta = theta / depth**0.5 if layout == "contiguous" else theta
    g = cases.laid_out((batch, width, keys), layout, dtype, "cuda")
    grad = cases.laid_out((batch, width, queries), layout, dtype, "cuda")
    with poisoned():
        y, lse = kernels.attention_forward(theta, phi, g)
        found = (y, *kernels.attention_backward(grad, theta, phi, g, y, lse))
    inputs = cases.leaves((theta, phi, g), torch.float64)
    exact = cases.gradients(cases.attention(*inputs), inputs, grad.double())
    same = cases.leaves((theta, phi, g), dtype)
    plain = cases.gradients(cases.attention(*same), same, grad)
    within_twice_plain(found, plain, exact, dtype)
    logits = inputs[0].detach().mT @ inputs[1].detach()
    torch.testing.assert_close(lse.double(), torch.logsumexp(logits, -1), atol=1e-4, rtol=1e-5)


BLOCKS = [
    ((2, 64, 14, 14), 32, None, "channels_last"),
    ((2, 64, 14, 14), 32, (2, 2), "channels_last"),
    ((2, 40, 7, 9), 20, (2, 2), "contiguous"),
    ((1, 256, 28, 28), 128, (2, 2), "contiguous"),
    ((2, 24, 3, 6, 5), 12, (1, 2, 2), "channels_last"),
    ((2, 16, 33), 8, (2,), "misaligned"),
    ((2, 8, 7, 5), 4, None, "sliced"),
    ((1, 1, 1, 1), 1, None, "contiguous"),
    ((1, 512, 12, 12), 256, None, "channels_last"),
    ((2, 320, 34, 34), 160, None, "channels_last"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_is_as_exact_as_plain_pytorch(
    dtype: torch.dtype, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, inner, pool, layout = BLOCKS[number]
    residual, bias = number % 2 == 0, number % 3 != 2
    x = cases.laid_out(shape, layout, dtype, "cuda")
    weights = cases.projections(shape[1], inner, inner, bias, dtype, "cuda")
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)  # float32 is fused in TF32 only
    assert triton_block.supports(x, weights)
    grad = cases.laid_out(shape, layout, dtype, "cuda")
    with poisoned():
        z, saved = triton_block.block_forward(x, weights, pool=pool, residual=residual, save=True)
        alone, _ = triton_block.block_forward(x, weights, pool=pool, residual=residual, save=False)
        gx, gweights = triton_block.block_backward(grad, x, weights, saved, pool=pool, residual=residual)
    found = (z, gx, *(gradient for gradient in gweights if gradient is not None))

    def reference(precision: torch.dtype) -> cases.Tensors:
        inputs = cases.leaves((x, *(w for w in weights if w is not None)), precision)
        kept = iter(inputs[1:])
        copies = triton_block.Projections(*(None if w is None else next(kept) for w in weights))
        output = cases.block(inputs[0], copies, pool, residual)
        return cases.gradients(output, inputs, grad.to(precision))

    exact, plain = reference(torch.float64), reference(dtype)
    floor = TF32_FLOOR if dtype is torch.float32 else FLOOR[dtype]
    names = [
        "z",
        "x",
        *(f for f, w in zip(triton_block.Projections._fields, weights, strict=True) if w is not None),
    ]
    # phi's bias shifts all logits of a row alike: its gradient is 0, and relative error means nothing.
    for name, ours, theirs, truth in zip(names, found, plain, exact, strict=True):
        if name != "phi_bias" and truth.any():
            error, allowed = cases.distance(ours, truth), 2 * cases.distance(theirs, truth) + floor
            assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"
    assert cases.distance(alone, exact[0]) <= 2 * cases.distance(plain[0], exact[0]) + floor


LIBRARY = ((2, 256, 24, 24), 128, None, "channels_last")  # wide heads, many keys: SDPA's core


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["embedded_gaussian", "dot_product"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", range(len(BLOCKS) + 1))
def test_whatever_the_block_chooses_is_as_exact_as_plain_pytorch(
    dtype: torch.dtype, number: int, kind: str
) -> None:
    shape, inner, pool, layout = [*BLOCKS, LIBRARY][number]
    x = cases.laid_out(shape, layout, dtype, "cuda")
    weights = cases.projections(shape[1], inner, inner, number % 3 != 2, dtype, "cuda")
    grad = cases.laid_out(shape, layout, dtype, "cuda")

    def run(block: Callable[..., torch.Tensor], precision: torch.dtype) -> cases.Tensors:
        inputs = cases.leaves((x, *(w for w in weights if w is not None)), precision)
        kept = iter(inputs[1:])
        theta, phi, g, out, *biases = (None if w is None else next(kept) for w in weights)
        z = block(inputs[0], theta, phi, g, out, biases=tuple(biases), kind=kind, pool=pool)
        return cases.gradients(z, inputs, grad.to(precision))

    found = run(nonlocal_block, dtype)
    plain, exact = run(reference.nonlocal_block, dtype), run(reference.nonlocal_block, torch.float64)
    if (
        kind == "embedded_gaussian" and weights.phi_bias is not None
    ):  # its gradient is 0, and what is left noise
        found, plain, exact = (each[:7] + each[8:] for each in (found, plain, exact))
    within_twice_plain(found, plain, exact, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["embedded_gaussian", "dot_product"])
@pytest.mark.parametrize("shape", [(4, 64, 14, 14), LIBRARY[0]], ids=str)
def test_captured_block_replays_on_new_inputs(shape: tuple[int, ...], kind: str) -> None:
    x = cases.laid_out(shape, "channels_last", torch.bfloat16, "cuda").requires_grad_()
    weights = cases.projections(shape[1], shape[1] // 2, shape[1] // 2, True, torch.bfloat16, "cuda")
    leaves = [x, *(weight.requires_grad_() for weight in weights)]
    grad = torch.randn_like(x)

    def step() -> cases.Tensors:
        z = nonlocal_block(x, *weights[:4], biases=tuple(weights[4:]), kind=kind)
        return (z.detach(), *torch.autograd.grad(z, leaves, grad))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        replayed = step()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    for index, (mine, wanted) in enumerate(zip(replayed, step(), strict=True)):
        if index != 7 or kind == "dot_product":  # phi's bias has no effect on a softmax
            assert cases.distance(mine, wanted.double()) < 1e-2  # SDPA's backward adds up in any order


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_dot_product_block_is_as_exact_as_plain_pytorch(dtype: torch.dtype, number: int) -> None:
    shape, inner, pool, layout = BLOCKS[number]
    x = cases.laid_out(shape, layout, dtype, "cuda")
    weights = cases.projections(shape[1], inner, inner, number % 2 == 0, dtype, "cuda")
    with poisoned():
        z = triton_dot.block_forward(x, weights, pool=pool, residual=number % 3 == 0)

    def plain(precision: torch.dtype) -> torch.Tensor:
        operands = [None if each is None else each.to(precision) for each in (x, *weights)]
        return reference.nonlocal_block(
            *operands[:5], biases=tuple(operands[5:]), kind="dot_product", pool=pool, residual=number % 3 == 0
        )

    within_twice_plain((z,), (plain(dtype),), (plain(torch.float64),), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", KERNELS)
def test_empty_sizes(kernels: ModuleType) -> None:
    for batch, queries in ((0, 5), (2, 0)):
        theta, phi = torch.ones(batch, 4, queries, device="cuda"), torch.ones(batch, 4, 3, device="cuda")
        y, lse = kernels.attention_forward(theta, phi, phi)
        assert y.shape == theta.shape
        assert lse.shape == (batch, queries)
        gtheta, gphi, _ = kernels.attention_backward(y, theta, phi, phi, y, lse)
        assert gtheta.shape == theta.shape
        assert not gphi.any()


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", KERNELS)
def test_logits_beyond_float16(kernels: ModuleType) -> None:
    theta, phi = (80 * torch.randn(2, 64, 70, device="cuda").half() for _ in range(2))
    g = torch.randn(2, 32, 70, device="cuda").half()
    y, lse = kernels.attention_forward(theta, phi, g)
    wanted = cases.attention(theta.double(), phi.double(), g.double())
    assert lse.abs().max() > 65504
    assert cases.distance(y, wanted) < 2e-3  # the weights are rounded to 2^-11


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_special_values_propagate_as_in_pytorch(kernels: ModuleType, value: float) -> None:
    for which in range(3):
        inputs = [torch.randn(1, 16, 80, device="cuda") for _ in range(3)]
        inputs[which][0, 3, 70] = value
        y, _ = kernels.attention_forward(*inputs)
        wanted = cases.attention(*inputs)
        assert torch.equal(y.isnan(), wanted.isnan())
        assert torch.equal(y.isinf(), wanted.isinf())


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", KERNELS)
def test_runs_are_bitwise_equal(kernels: ModuleType) -> None:
    theta, phi, g, grad = (torch.randn(4, 64, 500, device="cuda").bfloat16() for _ in range(4))

    def run() -> cases.Tensors:
        y, lse = kernels.attention_forward(theta, phi, g)
        return (y, lse, *kernels.attention_backward(grad, theta, phi, g, y, lse))

    first = run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", KERNELS)
def test_captured_graph_replays_on_new_inputs(kernels: ModuleType) -> None:
    theta, phi, g = (torch.randn(2, 32, 100, device="cuda").half() for _ in range(3))
    y, lse = kernels.attention_forward(theta, phi, g)
    kernels.attention_backward(y, theta, phi, g, y, lse)  # compiles, which a capture does not allow
    torch.cuda.synchronize()
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=side):
        y, lse = kernels.attention_forward(theta, phi, g)
        gradients = kernels.attention_backward(y, theta, phi, g, y, lse)
    theta.normal_()
    graph.replay()
    wanted, wanted_lse = kernels.attention_forward(theta, phi, g)
    assert torch.equal(y, wanted)
    for ours, again in zip(
        gradients, kernels.attention_backward(wanted, theta, phi, g, wanted, wanted_lse), strict=True
    ):
        assert torch.equal(ours, again)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", KERNELS)
def test_memory_grows_linearly(kernels: ModuleType) -> None:
    def extra_bytes(positions: int) -> int:
        theta, phi, g = (torch.randn(1, 32, positions, device="cuda").bfloat16() for _ in range(3))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y, lse = kernels.attention_forward(theta, phi, g)
        kernels.attention_backward(y, theta, phi, g, y, lse)
        return torch.cuda.max_memory_allocated() - before

    extra_bytes(196)
    assert extra_bytes(12544) <= 64 * 1.1 * extra_bytes(196)


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", KERNELS)
def test_more_than_two_to_the_31_elements(kernels: ModuleType) -> None:
    batch, depth, positions = 33000, 1024, 64  # over 2^31 elements of theta
    theta = torch.zeros(batch, depth, positions, device="cuda", dtype=torch.bfloat16)
    theta[-1] = torch.randn(depth, positions, device="cuda") / 32
    phi = torch.randn(1, depth, 20, device="cuda").bfloat16().expand(batch, -1, -1)
    g = torch.randn(1, 16, 20, device="cuda").bfloat16().expand(batch, -1, -1)
    y, _ = kernels.attention_forward(theta, phi, g)
    wanted = cases.attention(*(tensor[-1:].double() for tensor in (theta, phi, g)))
    assert cases.distance(y[-1:], wanted) < 1e-2  # bfloat16 keeps 8 bits


@pytest.mark.gpu
def test_tf32_follows_torch() -> None:
    theta, phi, g = (torch.randn(1, 64, 300, device="cuda") for _ in range(3))
    wanted = cases.attention(theta.double(), phi.double(), g.double())
    before = torch.backends.cuda.matmul.allow_tf32
    errors = {}
    try:
        for allowed in (False, True):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            errors[allowed] = cases.distance(triton_kernels.attention_forward(theta, phi, g)[0], wanted)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert errors[False] < 1e-5
    assert errors[False] * 10 < errors[True] < 1e-2


def test_kernels_pass_the_interpreter() -> None:
    script = Path(__file__).with_name("nonlocal_attention_interpreted.py")
    paths = os.pathsep.join([os.fspath(ROOT), os.fspath(script.parent), os.environ.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, os.fspath(script)],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "interpreted" in run.stdout


def layouts(batch: int, inner: int, queries: int, keys: int) -> list[triton_kernels._Layout]:
    shapes = [(batch, inner, queries), (batch, inner, keys), (batch, inner, keys)]
    return [triton_kernels._Layout(shape, (shape[1] * shape[2], 1, shape[1]), True) for shape in shapes]


@pytest.mark.parametrize("inner", [32, 128, 256])
@pytest.mark.parametrize("which", ["forward", "queries", "keys"])
def test_hopper_build_uses_wgmma_and_spills_nothing(which: str, inner: int) -> None:
    theta, phi, g = layouts(8, inner, 784, 784)
    half, single = torch.bfloat16, torch.float32
    launches: dict[str, tuple[Callable[[], object], list[torch.dtype]]] = {
        "forward": (
            functools.partial(triton_kernels._forward_launch, theta, phi, g, theta, half, "tf32", None),
            [*[half] * 4, single],
        ),
        "queries": (
            functools.partial(
                triton_kernels._query_launch, theta, phi, g, theta, theta, theta, half, "tf32", None
            ),
            [*[half] * 5, single, single, half],
        ),
        "keys": (
            functools.partial(triton_kernels._key_launch, theta, phi, g, theta, phi, g, half, "tf32", None),
            [*[half] * 4, single, single, half, half],
        ),
    }
    make, dtypes = launches[which]
    built = compile_launch(make(), dtypes)
    assert built.stack_bytes == 0
    assert built.wgmma


@pytest.mark.parametrize("pool", [None, (2, 2)], ids=["full", "pooled"])
def test_hopper_build_of_the_block(pool: tuple[int, int] | None) -> None:
    half, single = torch.bfloat16, torch.float32
    shape, strides = (32, 256, 28, 28), (256 * 784, 1, 28 * 256, 256)
    signature = (shape, strides, half, "tf32", 128, 128, pool, True, True, True, 0)
    forward = triton_block._forward_plan(*signature, True, True)
    backward = triton_block._backward_plan(*signature, strides, True, True)
    launches = forward.project, forward.attend, backward.back, backward.spread, backward.contribute
    choices = [torch.uint8 if pool else None] * 2
    tensors = [
        [*[half] * 10, *choices],
        [*[half] * 8, single],
        [half] * 3,
        [*[half] * 4, *choices, *[half] * 4],
        [*[half] * 5, *choices, half, single],
    ]
    for launch, dtypes in zip(launches, tensors, strict=True):
        built = compile_launch(launch, dtypes)
        assert built.stack_bytes == 0
        assert built.wgmma


@pytest.mark.parametrize("pool", [None, (2, 2)], ids=["full", "pooled"])
def test_hopper_build_of_the_inference_paths(pool: tuple[int, int] | None) -> None:
    half, single = torch.bfloat16, torch.float32

    def signature(batch: int, channels: int, side: int) -> tuple[object, ...]:
        strides = (channels * side**2, 1, channels * side, channels)
        shape, inner = (batch, channels, side, side), channels // 2
        return (shape, strides, half, "tf32", inner, inner, pool, True, True, True, 0, True)

    dot = triton_dot._plan(*signature(32, 256, 28))
    launches = [
        (triton_block._forward_plan(*signature(64, 64, 14), False).small, [half] * 10),
        (triton_block._forward_plan(*signature(32, 256, 28), False).finish, [half] * 5),
        (dot.moments, [*[half] * 5, single]),
        (dot.fold, [single, half, half]),
        (dot.apply, [half] * 6),
    ]
    for launch, dtypes in launches:
        built = compile_launch(launch, dtypes)
        assert built.stack_bytes == 0
        assert built.wgmma


def test_cuda_kernels_spill_nothing(tmp_path: Path) -> None:
    """As they were built; where they were not, for sm_90a or at all, as nvcc builds them now."""
    module = find_spec("rlnas_fast._cuda")
    usage = resource_usage(str(module.origin), "-arch", "sm_90a") if module else ""
    if "nonlocal_attention_cu" not in usage:
        nvcc = shutil.which("nvcc")
        if nvcc is None:
            pytest.skip("no nvcc on this machine, and no build for sm_90a")
        source, cubin = ROOT / "csrc/cuda/nonlocal_attention.cu", tmp_path / "out.cubin"
        includes = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]
        options = ["-std=c++17", "-O3", "-cubin", "-arch=sm_90a", *includes]
        subprocess.run([nvcc, *options, str(source), "-o", str(cubin)], check=True)
        usage = resource_usage(str(cubin))
    stacks = re.findall(r"Function \S*nonlocal_attention_cu\S*:\s+REG:\d+ STACK:(\d+)", usage)
    assert len(stacks) == 21  # three dtypes: three forward widths, two widths of each backward pass
    assert set(stacks) == {"0"}
