"""Steps that are as large as the change of the policy allows.  n parameters, flattened into one vector."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], target: Tensor, *, iterations: int, tolerance: float = 1e-10
) -> Tensor:
    """Solves A x = target for a symmetric positive definite A that is known by its products alone.

    Source: Hestenes and Stiefel, Methods of Conjugate Gradients for Solving Linear Systems (1952).

    Args:
        product: v [n] -> A v [n].
        target: float [n].
        iterations: at most so many; n of them solve exactly, but for rounding.
        tolerance: ends once the squared residual is below this.
    Returns:
        Float [n].
    """
    solution = torch.zeros_like(target)
    residual, direction = target.clone(), target.clone()
    square = residual @ residual
    for _ in range(iterations):
        if square < tolerance:
            break
        along = product(direction)
        step = square / (direction @ along)
        solution = solution + step * direction
        residual = residual - step * along
        square, before = residual @ residual, square
        direction = residual + square / before * direction
    return solution


def natural_step(
    gradient: Tensor,
    product: Callable[[Tensor], Tensor],
    *,
    divergence: float,
    iterations: int,
) -> Tensor:
    """The step along the natural gradient whose divergence is, to second order, ``divergence``.

    sqrt(2 divergence / s^T F s) s with s = F^-1 gradient; 0 where the gradient is.

    Source: Schulman et al., Trust Region Policy Optimization (2015), appendix C.

    Args:
        gradient: float [n], of what is to grow.
        product: v [n] -> F v [n], F the Hessian of the divergence at no step.
        divergence: in nats.
        iterations: of ``conjugate_gradient``.
    Returns:
        Float [n].
    """
    direction = conjugate_gradient(product, gradient, iterations=iterations)
    curvature = direction @ product(direction)
    if not curvature > 0:
        return torch.zeros_like(gradient)
    return (2 * divergence / curvature).sqrt() * direction


def line_search(
    evaluate: Callable[[Tensor], tuple[float, float]], step: Tensor, *, divergence: float, halvings: int = 10
) -> Tensor:
    """The first of step, step / 2, step / 4, ... that gains something and stays within the divergence.

    Args:
        evaluate: step [n] -> (gain, divergence) there.
        divergence: largest that is allowed, in nats.
        halvings: how many are tried.
    Returns:
        Float [n]; 0 where none will do.
    """
    for halving in range(halvings + 1):
        shorter = step * 0.5**halving
        gain, moved = evaluate(shorter)
        if gain > 0 and moved <= divergence:
            return shorter
    return torch.zeros_like(step)


def mean_divergence(old: Tensor, new: Tensor, present: Tensor) -> Tensor:
    """KL(old || new) in nats, mean over the decisions that were made.

    Args:
        old, new: float [B, T, C], log-probabilities; where a choice is invalid, both the lowest number.
        present: float [B, T].
    Returns:
        Scalar.
    """
    each = (old.exp() * (old - new)).sum(dim=2)
    return (each * present).sum() / present.sum()
