"""Natural steps against dense linear algebra."""

from __future__ import annotations

import math

import torch
from torch.distributions import Categorical, kl_divergence

from rlnas_fast.rl.trust_region import conjugate_gradient, line_search, mean_divergence, natural_step


def positive_definite(size: int, seed: int) -> torch.Tensor:
    root = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return root @ root.T + torch.eye(size, dtype=torch.float64)


def test_conjugate_gradient_solves_as_a_dense_solver_does() -> None:
    matrix = positive_definite(7, 0)
    target = torch.arange(7, dtype=torch.float64)
    found = conjugate_gradient(lambda v: matrix @ v, target, iterations=20, tolerance=1e-24)
    # residual below 1e-12, smallest eigenvalue above 1
    torch.testing.assert_close(found, torch.linalg.solve(matrix, target), atol=1e-11, rtol=0.0)


def test_one_iteration_is_the_exact_step_along_the_gradient() -> None:
    matrix = torch.diag(torch.tensor([1.0, 4.0]))
    found = conjugate_gradient(lambda v: matrix @ v, torch.tensor([1.0, 1.0]), iterations=1)
    torch.testing.assert_close(found, torch.full((2,), 2 / 5))


def test_the_step_has_the_wanted_divergence_and_the_direction_of_the_natural_gradient() -> None:
    matrix, gradient = positive_definite(5, 1), torch.randn(5, dtype=torch.float64)
    step = natural_step(gradient, lambda v: matrix @ v, divergence=0.03, iterations=50)
    torch.testing.assert_close(0.5 * step @ matrix @ step, torch.tensor(0.03, dtype=torch.float64))
    direction = torch.linalg.solve(matrix, gradient)
    torch.testing.assert_close(step / step.norm(), direction / direction.norm())
    nothing = natural_step(torch.zeros(5), lambda v: v, divergence=0.03, iterations=5)
    assert not nothing.any()


def test_line_search_by_hand() -> None:
    def evaluate(step: torch.Tensor) -> tuple[float, float]:
        (x,) = step.tolist()
        return x * (1.5 - x), x**2  # gains below 1.5, moves by x squared

    step = torch.tensor([4.0])
    assert line_search(evaluate, step, divergence=0.3).item() == 0.5  # 4, 2 lose; 1 moves too far
    assert line_search(evaluate, step, divergence=10.0).item() == 1.0
    assert line_search(evaluate, -step, divergence=10.0).item() == 0.0
    assert line_search(evaluate, step, divergence=1e-9, halvings=3).item() == 0.0


def test_divergence_is_that_of_torch_distributions_over_what_was_decided() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 3, 4, 5, generator=generator).log_softmax(dim=-1)
    present = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    expected = kl_divergence(Categorical(logits=old), Categorical(logits=new))[present.bool()].mean()
    torch.testing.assert_close(mean_divergence(old, new, present), expected)


def test_divergence_by_hand_with_an_invalid_choice() -> None:
    lowest = torch.finfo(torch.float32).min
    old = torch.tensor([[[math.log(0.5), math.log(0.5), lowest]]])
    new = torch.tensor([[[math.log(0.25), math.log(0.75), lowest]]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    torch.testing.assert_close(mean_divergence(old, new, torch.ones(1, 1)), torch.tensor(expected))
