"""The specification: non-local attention and the non-local block as the paper writes them.

Source: Wang et al., Non-local Neural Networks (2018), eq. 1-6 and section 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

__all__ = ["nonlocal_attention", "nonlocal_block", "pool_keys"]


def nonlocal_attention(
    theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, kind: str = "embedded_gaussian"
) -> torch.Tensor:
    """Computes y_i = (1/C) sum_j f(theta_i, phi_j) g_j with the whole N x M matrix in memory.

    Args:
        theta: [B, D, N] queries; D is 1 for ``concatenation``, whose f is ReLU(theta_i + phi_j).
        phi: [B, D, M] keys.
        g: [B, E, M] values.
        kind: gaussian | embedded_gaussian | dot_product | concatenation.

    Returns:
        [B, E, N].
    """
    if kind in ("gaussian", "embedded_gaussian"):
        weights = torch.softmax(theta.mT @ phi, dim=-1)
    elif kind == "dot_product":
        weights = theta.mT @ phi / phi.shape[-1]
    else:
        weights = torch.relu(theta.mT + phi) / phi.shape[-1]
    return g @ weights.mT


def pool_keys(features: torch.Tensor, pool: tuple[int, ...] | None) -> torch.Tensor:
    """Takes the maximum over windows of [B, D, *space] and flattens space: [B, D, M]."""
    if pool is not None and any(size > 1 for size in pool):
        max_pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[features.dim() - 2]
        features = max_pool(features, pool)
    return features.flatten(2)


def nonlocal_block(
    x: torch.Tensor,
    theta: torch.Tensor | None,
    phi: torch.Tensor | None,
    g: torch.Tensor,
    out: torch.Tensor,
    *,
    biases: tuple[torch.Tensor | None, ...] = (None, None, None, None),
    pair: torch.Tensor | None = None,
    kind: str = "embedded_gaussian",
    pool: tuple[int, ...] | None = None,
    residual: bool = True,
) -> torch.Tensor:
    """Computes z = W y + x for x [B, C, *space]; weights theta, phi [D, C], g [E, C], out [C, E].

    ``gaussian`` has no theta and phi: x itself is compared.  ``concatenation`` weighs the pair
    [theta_i, phi_j] with ``pair`` [2D].
    """

    def project(weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        if weight is None:
            return x
        flat = weight @ x.flatten(2)
        if bias is not None:
            flat = flat + bias[:, None]
        return flat.unflatten(2, x.shape[2:])

    queries = project(theta, biases[0]).flatten(2)
    keys = pool_keys(project(phi, biases[1]), pool)
    values = pool_keys(project(g, biases[2]), pool)
    if pair is not None:
        first, second = pair.unflatten(0, (2, 1, -1))
        queries, keys = first @ queries, second @ keys
    z = out @ nonlocal_attention(queries, keys, values, kind)
    if biases[3] is not None:
        z = z + biases[3][:, None]
    z = z.unflatten(2, x.shape[2:])
    return z + x if residual else z
