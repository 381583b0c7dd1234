"""Runs in a process of its own with TRITON_INTERPRET=1: the Triton kernels on small shapes, on the CPU.

bfloat16 is left out: the interpreter multiplies its bit patterns.
"""

from __future__ import annotations

import nonlocal_attention_gpu_cases as cases
import torch

from rlnas_fast.ops.nonlocal_attention import reference, triton_block, triton_dot, triton_kernels

# Sums of a few hundred terms: float32 stays under 3e-5; float16 rounds operands and results at 2^-11.
TOLERANCE = {torch.float32: 3e-5, torch.float16: 4e-3}


def compare(what: str, found: cases.Tensors, wanted: cases.Tensors, dtype: torch.dtype) -> None:
    for index, (got, want) in enumerate(zip(found, wanted, strict=True)):
        error = float((got.double() - want).norm() / want.norm().clamp_min(1.0))
        if not error <= TOLERANCE[dtype]:
            raise AssertionError(f"{what}, tensor {index}: relative error {error:.2e}")


def check_attention() -> None:
    for number, (batch, depth, width, queries, keys, dtype, layout) in enumerate(
        [
            (2, 5, 7, 9, 11, torch.float32, "contiguous"),
            (1, 16, 16, 70, 33, torch.float32, "channels_last"),
            (1, 100, 90, 20, 40, torch.float32, "sliced"),
            (2, 1, 1, 1, 1, torch.float32, "misaligned"),
            (3, 24, 40, 49, 12, torch.float16, "expanded"),
        ]
    ):
        torch.manual_seed(number)
        theta, phi = (cases.laid_out((batch, depth, n), layout, dtype, "cpu") / 4 for n in (queries, keys))
        g = cases.laid_out((batch, width, keys), layout, dtype, "cpu")
        grad = torch.randn(batch, width, queries).to(dtype)
        y, lse = triton_kernels.attention_forward(theta, phi, g)
        found = (y, *triton_kernels.attention_backward(grad, theta, phi, g, y, lse))
        inputs = cases.leaves((theta, phi, g), torch.float64)
        wanted = cases.gradients(cases.attention(*inputs), inputs, grad.double())
        compare(f"attention {number}", found, wanted, dtype)
        logits = inputs[0].detach().mT @ inputs[1].detach()
        compare(f"log-sum-exp {number}", (lse,), (torch.logsumexp(logits, -1),), torch.float32)


def check_block() -> None:
    for number, (shape, depth, width, pool, bias, residual, layout) in enumerate(
        [
            ((2, 6, 5, 7), 3, 4, None, True, True, "contiguous"),
            ((2, 20, 5, 6), 10, 10, (2, 2), True, True, "channels_last"),
            ((1, 17, 3, 4, 5), 9, 5, (1, 2, 2), False, True, "contiguous"),
            ((2, 8, 11), 4, 4, (2,), True, False, "misaligned"),
            ((2, 16, 7, 5), 8, 8, None, True, False, "sliced"),
        ]
    ):
        torch.manual_seed(number)
        x = cases.laid_out(shape, layout, torch.float32, "cpu")
        weights = cases.projections(shape[1], depth, width, bias, torch.float32, "cpu")
        grad = torch.randn(shape)
        z, saved = triton_block.block_forward(x, weights, pool=pool, residual=residual, save=True)
        gx, gweights = triton_block.block_backward(grad, x, weights, saved, pool=pool, residual=residual)
        names = ["z", "x", *(f for f, w in zip(weights._fields, weights, strict=True) if w is not None)]
        inputs = cases.leaves((x, *(weight for weight in weights if weight is not None)), torch.float64)
        kept = iter(inputs[1:])
        exact = triton_block.Projections(*(None if w is None else next(kept) for w in weights))
        wanted = cases.gradients(cases.block(inputs[0], exact, pool, residual), inputs, grad.double())
        found = (z, gx, *(gradient for gradient in gweights if gradient is not None))
        if bias:  # phi's bias shifts all logits of a row alike: its gradient is 0
            index = names.index("phi_bias")
            compare(
                f"block {number}, bias of phi", found[index : index + 1], (torch.zeros(depth),), torch.float16
            )
            found, wanted = (each[:index] + each[index + 1 :] for each in (found, wanted))
        compare(f"block {number}", found, wanted, torch.float32)


def check_inference() -> None:
    """The block in one launch, which real shapes reach in 16 bits only, and the dot product in three."""
    triton_block.use_small = lambda *_: True
    for number, (shape, pool, layout) in enumerate(
        [
            ((2, 6, 5, 7), None, "contiguous"),
            ((2, 20, 9, 10), (2, 2), "channels_last"),
            ((1, 17, 3, 4, 5), (1, 2, 2), "sliced"),
        ]
    ):
        torch.manual_seed(number)
        x = cases.laid_out(shape, layout, torch.float32, "cpu")
        weights = cases.projections(shape[1], 9, 5, number != 2, torch.float32, "cpu")
        operands = [None if each is None else each.double() for each in (x, *weights)]
        found = (
            triton_block.block_forward(x, weights, pool=pool, residual=True, save=False)[0],
            triton_dot.block_forward(x, weights, pool=pool, residual=True),
        )
        wanted = tuple(
            reference.nonlocal_block(*operands[:5], biases=tuple(operands[5:]), kind=kind, pool=pool)
            for kind in ("embedded_gaussian", "dot_product")
        )
        compare(f"inference {number}", found, wanted, torch.float32)


if __name__ == "__main__":
    check_attention()  # float32 as exact products: the libraries' path
    torch.backends.cuda.matmul.fp32_precision = "tf32"  # the kernels; the interpreter multiplies exactly
    check_attention()
    check_block()
    check_inference()
    print("interpreted")
