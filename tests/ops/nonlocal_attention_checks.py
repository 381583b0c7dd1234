"""What the tests of non-local attention share: operands, layouts, and the comparison with float64."""

from __future__ import annotations

import functools

import torch

from rlnas_fast.ops import nonlocal_block
from rlnas_fast.ops.nonlocal_attention import reference

LAYOUTS = ["channels first", "channels last", "sliced", "expanded", "misaligned"]
BLOCKS = [  # shape of x, inner, value, pool
    ((2, 32, 7, 7), 16, 16, 1),
    ((3, 20, 9, 6), 10, 12, 2),
    ((1, 24, 13, 14), 12, 12, (3, 2)),
    ((2, 3, 17), 2, 5, 2),
    ((1, 1, 5), 1, 1, 1),
    ((2, 10, 3, 4, 5), 5, 7, (1, 2, 2)),
    ((5, 40, 2, 2), 40, 33, 1),
]


def laid_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values behind other strides; what lies around them is NaN."""
    if layout == "channels last":
        return tensor.transpose(1, -1).contiguous().transpose(1, -1)
    if layout == "sliced":
        wide = torch.full([size * 2 + 1 for size in tensor.shape], torch.nan, dtype=tensor.dtype)
        view = wide[tuple(slice(1, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    if layout == "misaligned":
        flat = torch.full((tensor.numel() + 1,), torch.nan, dtype=tensor.dtype)
        return flat[1:].view(tensor.shape).copy_(tensor)
    return tensor


def poison() -> None:
    """Fills the allocator's free memory with NaN, so that reading what was never written shows."""
    kept = [torch.full((size,), torch.nan) for size in (64, 1024, 16_384, 262_144)]
    del kept


def operands(
    size: tuple[int, ...], kind: str, dtype: torch.dtype, layout: str = "channels first"
) -> list[torch.Tensor]:
    batch, depth, width, queries, keys = size
    depth = 1 if kind == "concatenation" else depth
    shapes = [(batch, depth, queries), (batch, depth, keys), (batch, width, keys)]
    return [laid_out(torch.randn(shape).to(dtype), layout) for shape in shapes]


def block_operands(
    case: tuple, dtype: torch.dtype, bias: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    shape, inner, value, _ = case
    channels = shape[1]
    sizes = [(inner, channels), (inner, channels), (value, channels), (channels, value)]
    weights = [torch.randn(size).div(size[1] ** 0.5).to(dtype) for size in sizes]
    biases = [torch.randn(size[0]).to(dtype) for size in sizes] if bias else []
    return torch.randn(shape).to(dtype), weights + biases


def with_gradients(function, inputs: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """The result and the gradient of every input."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    poison()
    result = function(*leaves)
    poison()
    gradients = torch.autograd.grad(result, leaves, grad.to(result.dtype))
    return [result.detach(), *gradients]


def assert_as_exact_as_torch(
    ours: list[torch.Tensor], plain: list[torch.Tensor], exact: list[torch.Tensor]
) -> None:
    """Our error against float64 is at most twice that of plain PyTorch in the same dtype.

    That is flash-attention's rule.  The floor, 6 roundings of the largest value in the norm of the whole, is
    for results of a few elements that plain PyTorch happens to get almost exactly, such as a bias's gradient.
    """
    scale = max(tensor.abs().max().item() for tensor in exact if tensor.numel())
    for index, (mine, theirs, truth) in enumerate(zip(ours, plain, exact, strict=True)):
        assert mine.shape == truth.shape
        assert mine.dtype == theirs.dtype
        error, allowed = ((each.double() - truth).norm().item() for each in (mine, theirs))
        floor = 6 * torch.finfo(mine.dtype).eps * scale
        assert error <= 2 * allowed + floor, f"result {index}: error {error:.2e}, plain PyTorch {allowed:.2e}"


def check_block(
    x: torch.Tensor, weights: list[torch.Tensor], pool, kind: str = "embedded_gaussian", **options
) -> None:
    if kind == "gaussian":
        return check_gaussian_block(x, weights, pool, **options)
    pair = torch.randn(2 * weights[0].shape[0]).to(x.dtype) if kind == "concatenation" else None

    def ours(x, theta, phi, g, out, *biases):
        biases = biases or (None,) * 4
        return nonlocal_block(
            x, theta, phi, g, out, biases=biases, pair=pair, kind=kind, pool=pool, **options
        )

    def plain(x, theta, phi, g, out, *biases):
        windows = (pool,) * (x.dim() - 2) if isinstance(pool, int) else pool
        return reference.nonlocal_block(
            x, theta, phi, g, out, biases=biases or (None,) * 4, kind=kind, pool=windows,
            pair=None if pair is None else pair.to(x.dtype), residual=options.get("residual", True),
        )  # fmt: skip

    grad = torch.randn(x.shape)
    inputs = [x, *weights]
    exact = with_gradients(plain, [t.double() for t in inputs], grad.double())
    results = [with_gradients(ours, inputs, grad), with_gradients(plain, inputs, grad), exact]
    if kind == "embedded_gaussian" and len(weights) == 8:  # softmax ignores phi's bias: its gradient is noise
        assert results[0][7].norm() < 1e-2 * (1 + results[0][6].norm())
        results = [each[:7] + each[8:] for each in results]
    assert_as_exact_as_torch(*results)


def check_gaussian_block(x: torch.Tensor, weights: list[torch.Tensor], pool, **options) -> None:
    """Of the weights those of g and W_z; x is halved so that no position has all the weight."""
    windows = (pool,) * (x.dim() - 2) if isinstance(pool, int) else pool

    def block(function, x, g, out, g_bias=None, out_bias=None):
        biases, pool = (None, None, g_bias, out_bias), windows
        return function(x, None, None, g, out, biases=biases, kind="gaussian", pool=pool, **options)

    inputs, grad = [x * 0.5, *weights[2:4], *weights[6:]], torch.randn(x.shape)
    plain = functools.partial(block, reference.nonlocal_block)
    exact = with_gradients(plain, [t.double() for t in inputs], grad.double())
    ours = with_gradients(functools.partial(block, nonlocal_block), inputs, grad)
    assert_as_exact_as_torch(ours, with_gradients(plain, inputs, grad), exact)
