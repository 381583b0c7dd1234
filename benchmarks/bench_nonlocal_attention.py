"""The non-local block on a CPU against every honest peer: ratio = fastest peer / ours, whole block.

``python benchmarks/bench_nonlocal_attention.py --check`` prints the table, part by part (``--part``), and on
stderr what it has timed; under pytest each case is a pytest-benchmark.  Peers get what is best for them:
channels_last inputs, one projection of width 3C', slices of stride 1; the textbook module gets the usual
layout.  Ours takes the channels_last input and separate weights.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import Row, geometric_mean, interleaved, main, ratio

from rlnas_fast.ops import nonlocal_block
from rlnas_fast.ops.nonlocal_attention import KINDS
from rlnas_fast.ops.nonlocal_attention.concatenation import sorted_attention

SHAPES = [(64, 32, 7), (64, 64, 8), (16, 64, 14), (16, 128, 14), (4, 256, 28), (2, 512, 28)]
THREADS = 2
INPUTS = 3  # rotated, so that no run finds its own input in the nearest cache
Peer = Callable[..., torch.Tensor]


class Case(NamedTuple):
    """One shape of the grid: [batch, channels, side, side]."""

    kind: str
    shape: tuple[int, int, int]
    pool: int
    dtype: torch.dtype
    backward: bool

    def __str__(self) -> str:
        kind = {"embedded_gaussian": "softmax"}.get(self.kind, self.kind)
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        pooled = f" pool {self.pool}" if self.pool > 1 else ""
        return f"{kind} {dtype} {self.shape}{pooled} {'fwd+bwd' if self.backward else 'fwd'}"


class Weights(NamedTuple):
    """theta, phi, g [C', C], W_z [C, C'] and, for concatenation, the pair's [2C']."""

    theta: torch.Tensor
    phi: torch.Tensor
    g: torch.Tensor
    out: torch.Tensor
    pair: torch.Tensor


def made_weights(channels: int, dtype: torch.dtype) -> Weights:
    inner = channels // 2
    sizes = [(inner, channels)] * 3 + [(channels, inner)]
    matrices = [(torch.randn(size) / size[1] ** 0.5).to(dtype) for size in sizes]
    return Weights(*matrices, (torch.randn(2 * inner) / inner**0.5).to(dtype))


def pooled(features: torch.Tensor, pool: int) -> torch.Tensor:
    """[B, C, H, W] in channels_last to rows [B, M, C]."""
    return (F.max_pool2d(features, pool) if pool > 1 else features).permute(0, 2, 3, 1).flatten(1, 2)


def split(x: torch.Tensor, wide: torch.Tensor, pool: int) -> tuple[torch.Tensor, ...]:
    """One 1x1 convolution of width 3C'; queries, keys and values as rows."""
    batch, channels, height, width = x.shape
    rows = F.linear(x.permute(0, 2, 3, 1).reshape(batch, height * width, channels), wide)
    inner = wide.shape[0] // 3
    queries, keys, values = rows.split(inner, -1)
    if pool > 1:
        image = rows.reshape(batch, height, width, -1).permute(0, 3, 1, 2)
        keys, values = (pooled(image[:, i * inner : (i + 1) * inner], pool) for i in (1, 2))
    return queries, keys, values


def joined(y: torch.Tensor, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return F.linear(y, out).reshape(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) + x


def sdpa_peer(x: torch.Tensor, wide: torch.Tensor, out: torch.Tensor, pool: int) -> torch.Tensor:
    queries, keys, values = (each.unsqueeze(1) for each in split(x, wide, pool))
    return joined(F.scaled_dot_product_attention(queries, keys, values, scale=1.0).squeeze(1), out, x)


def convolution_sdpa_peer(x: torch.Tensor, wide: torch.Tensor, out: torch.Tensor, pool: int) -> torch.Tensor:
    inner = wide.shape[0] // 3
    image = F.conv2d(x, wide[:, :, None, None])
    queries, keys, values = (
        pooled(image[:, i * inner : (i + 1) * inner], 1 if i == 0 else pool).unsqueeze(1) for i in range(3)
    )
    y = F.scaled_dot_product_attention(queries, keys, values, scale=1.0).squeeze(1)
    return (
        F.conv2d(
            y.reshape(*x.permute(0, 2, 3, 1).shape[:3], inner).permute(0, 3, 1, 2), out[:, :, None, None]
        )
        + x
    )


def softmax_peer(x: torch.Tensor, wide: torch.Tensor, out: torch.Tensor, pool: int) -> torch.Tensor:
    queries, keys, values = split(x, wide, pool)
    return joined(torch.softmax(queries @ keys.mT, -1) @ values, out, x)


def direct_dot_peer(x: torch.Tensor, wide: torch.Tensor, out: torch.Tensor, pool: int) -> torch.Tensor:
    queries, keys, values = split(x, wide, pool)
    return joined((queries @ keys.mT / keys.shape[1]) @ values, out, x)


def reassociated_peer(x: torch.Tensor, wide: torch.Tensor, out: torch.Tensor, pool: int) -> torch.Tensor:
    queries, keys, values = split(x, wide, pool)
    return joined(queries @ (keys.mT @ values / keys.shape[1]), out, x)


def gram_peer(x: torch.Tensor, wide: torch.Tensor, out: torch.Tensor, pool: int) -> torch.Tensor:
    """Computes z = x + W_z W_g (x x^T / N) W_phi^T W_theta x."""
    theta, phi, g = wide.chunk(3)
    flat = x.permute(0, 2, 3, 1).flatten(1, 2)
    gram = flat.mT @ flat / flat.shape[1]
    mixed = (out @ g) @ gram @ (phi.mT @ theta)
    return (flat + flat @ mixed.mT).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


def textbook(x: torch.Tensor, theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, out: torch.Tensor,
             pair: torch.Tensor, pool: int, kind: str) -> torch.Tensor:  # fmt: skip
    """The module as it is usually written: [B, C, H, W], one convolution each, an N x M matrix."""

    def convolved(weight: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, weight[:, :, None, None])

    def keys_of(features: torch.Tensor) -> torch.Tensor:
        return (F.max_pool2d(features, pool) if pool > 1 else features).flatten(2)

    values = keys_of(convolved(g))
    if kind == "gaussian":
        queries, keys = x.flatten(2), keys_of(x)
    else:
        queries, keys = convolved(theta).flatten(2), keys_of(convolved(phi))
    if kind == "concatenation":
        first = queries.unsqueeze(3).expand(-1, -1, -1, keys.shape[2])
        second = keys.unsqueeze(2).expand(-1, -1, queries.shape[2], -1)
        f = (
            torch.relu(F.conv2d(torch.cat([first, second], 1), pair[None, :, None, None])).squeeze(1)
            / keys.shape[2]
        )
    else:
        logits = queries.mT @ keys
        f = logits / keys.shape[2] if kind == "dot_product" else torch.softmax(logits, -1)
    y = (f @ values.mT).mT.reshape(x.shape[0], -1, *x.shape[2:])
    return F.conv2d(y, out[:, :, None, None]) + x


def gaussian_split(x: torch.Tensor, wide: torch.Tensor, pool: int) -> tuple[torch.Tensor, ...]:
    """Rows of x are queries and keys; only g projects."""
    image = x.permute(0, 2, 3, 1)
    values = F.linear(image, wide.chunk(3)[2])
    return image.flatten(1, 2), pooled(x, pool), pooled(values.permute(0, 3, 1, 2), pool)


def gaussian_softmax_peer(x: torch.Tensor, wide: torch.Tensor, out: torch.Tensor, pool: int) -> torch.Tensor:
    queries, keys, values = gaussian_split(x, wide, pool)
    return joined(torch.softmax(queries @ keys.mT, -1) @ values, out, x)


def gaussian_sdpa_peer(x: torch.Tensor, wide: torch.Tensor, out: torch.Tensor, pool: int) -> torch.Tensor:
    """Values padded to the width of x, without which SDPA takes its slow path."""
    queries, keys, values = gaussian_split(x, wide, pool)
    values = F.pad(values, (0, queries.shape[2] - values.shape[2]))
    heads = (each.unsqueeze(1) for each in (queries, keys, values))
    return joined(F.scaled_dot_product_attention(*heads, scale=1.0).squeeze(1)[..., : out.shape[1]], out, x)


def gaussian_reordered_peer(
    x: torch.Tensor, wide: torch.Tensor, out: torch.Tensor, pool: int
) -> torch.Tensor:
    """Means of x itself, projected afterwards: one head width; without pooling alone."""
    rows = x.permute(0, 2, 3, 1).flatten(1, 2).unsqueeze(1)
    mean = F.scaled_dot_product_attention(rows, rows, rows, scale=1.0).squeeze(1)
    return joined(F.linear(mean, wide.chunk(3)[2]), out, x)


def sorted_peer(x: torch.Tensor, wide: torch.Tensor, out: torch.Tensor, pair: torch.Tensor) -> torch.Tensor:
    """sort, cumsum, searchsorted; the pair's weights multiplied into theta and phi."""
    theta, phi, g = wide.chunk(3)
    first, second = pair.chunk(2)
    flat = x.permute(0, 2, 3, 1).flatten(1, 2)
    rows = F.linear(flat, torch.cat([(first @ theta)[None], (second @ phi)[None], g]))
    return joined(sorted_attention(rows[..., 0], rows[..., 1], rows[..., 2:].mT).mT, out, x)


def broadcast_peer(
    x: torch.Tensor, wide: torch.Tensor, out: torch.Tensor, pair: torch.Tensor
) -> torch.Tensor:
    """ReLU(a_i + b_j) as one N x N matrix: cheaper than any textbook module."""
    theta, phi, g = wide.chunk(3)
    first, second = pair.chunk(2)
    flat = x.permute(0, 2, 3, 1).flatten(1, 2)
    rows = F.linear(flat, torch.cat([(first @ theta)[None], (second @ phi)[None], g]))
    f = torch.relu(rows[..., 0].unsqueeze(2) + rows[..., 1].unsqueeze(1)) / rows.shape[1]
    return joined(f @ rows[..., 2:], out, x)


def peers_of(case: Case, compiled: bool) -> dict[str, Peer]:
    """Name to function of (x, wide, out, pair) or, for the textbook, of every weight."""
    pool = case.pool
    if case.kind == "concatenation":
        return {"sorted": sorted_peer, "broadcast": broadcast_peer}

    def of(function: Peer) -> Peer:
        return lambda x, wide, out, pair: function(x, wide, out, pool)

    if case.kind == "dot_product":
        full = {"gram": of(gram_peer)} if pool == 1 else {}
        return full | {"reassociated": of(reassociated_peer), "direct": of(direct_dot_peer)}
    if case.kind == "gaussian":
        found = {"sdpa": of(gaussian_sdpa_peer), "softmax": of(gaussian_softmax_peer)}
        return found | ({"reordered sdpa": of(gaussian_reordered_peer)} if pool == 1 else {})
    found = {"sdpa": of(sdpa_peer), "conv+sdpa": of(convolution_sdpa_peer), "softmax": of(softmax_peer)}
    if compiled:
        torch._dynamo.reset()
        found |= {f"compiled {name}": torch.compile(found[name]) for name in ("sdpa", "softmax")}
    return found


def runs_of(case: Case, compiled: bool = False) -> dict[str, Callable[[], object]]:
    """Ours and every peer as calls without arguments, each on its own rotating inputs."""
    batch, channels, side = case.shape
    weights = made_weights(channels, case.dtype)
    wide = torch.cat(weights[:3])
    usual = [torch.randn(batch, channels, side, side).to(case.dtype) for _ in range(INPUTS)]
    last = [x.contiguous(memory_format=torch.channels_last) for x in usual]
    pair = weights.pair if case.kind == "concatenation" else None

    def ours(x: torch.Tensor, theta: torch.Tensor, phi: torch.Tensor, g: torch.Tensor, out: torch.Tensor,
             pair: torch.Tensor) -> torch.Tensor:  # fmt: skip
        given = pair if case.kind == "concatenation" else None
        if case.kind == "gaussian":
            return nonlocal_block(x, None, None, g, out, kind=case.kind, pool=case.pool)
        return nonlocal_block(x, theta, phi, g, out, pair=given, kind=case.kind, pool=case.pool)

    def book(*tensors: torch.Tensor) -> torch.Tensor:
        return textbook(*tensors, case.pool, case.kind)

    runs = {"ours": run_of(ours, last, weights, case.backward)}
    for name, peer in peers_of(case, compiled).items():
        runs[name] = run_of(peer, last, (wide, weights.out, weights.pair), case.backward)
    if pair is None or channels * side**4 * batch <= 2**28:  # 2C' x N x N is 1 GiB there
        runs["textbook"] = run_of(book, usual, weights, case.backward)
    if compiled:  # now, for their compilation is no part of a round, nor of the time that a case has
        for name, run in runs.items():
            if name.startswith("compiled"):
                run()
    return runs


def run_of(
    function: Peer, inputs: list[torch.Tensor], weights: tuple[torch.Tensor, ...], backward: bool
) -> Callable[[], object]:
    turn = itertools.cycle(
        [x.clone(memory_format=torch.preserve_format).requires_grad_(backward) for x in inputs]
    )
    parameters = [weight.clone().requires_grad_(backward) for weight in weights]
    grads = [torch.randn_like(x) for x in inputs]
    gradient = itertools.cycle(grads)

    def forward() -> object:
        with torch.no_grad():
            return function(next(turn), *parameters)

    def both() -> object:
        x = next(turn)
        for leaf in (x, *parameters):
            leaf.grad = None
        return function(x, *parameters).backward(next(gradient))

    return both if backward else forward


Timed = Callable[[Case], dict[str, list[float]]]
GRID = "grid: "  # marks the rows of single cases, which ``condense`` makes one of


def measured(part: Callable[[Timed, bool], list[Row]]) -> Callable[[bool], list[Row]]:
    """The rows of a part, and one of each of its cases; says on stderr what has been timed."""

    def measure(quick: bool) -> list[Row]:
        torch.set_num_threads(THREADS)
        torch.manual_seed(0)
        cases: list[Row] = []

        def timed(case: Case) -> dict[str, list[float]]:
            runs = runs_of(case, not quick and named(case))
            times = interleaved(runs, repeats=60, warmup=2, seconds=0.4 if quick else 0.8, ours="ours")
            figure, detail = ratio(times, "ours")
            cases.append(Row(f"{GRID}{case}", figure, LEAST, detail=detail))
            print(f"{case}: {figure:.2f} ({detail})", file=sys.stderr, flush=True)
            gc.collect()
            return times

        return part(timed, quick) + cases

    return measure


def condense(rows: list[Row]) -> list[Row]:
    """Makes the rows of the single cases one: the slowest, and all that are slower than ``LEAST``."""
    cases = [row for row in rows if row.name.startswith(GRID)]
    shown = [row for row in rows if not row.name.startswith(GRID)]
    slowest = min(cases, key=lambda row: row.measured)
    slow = [f"{row.name.removeprefix(GRID)} {row.measured:.2f}" for row in cases if not row.holds()]
    detail = f"{slowest.name.removeprefix(GRID)}: {slowest.detail}; "
    detail += f"slower than {LEAST}: {', '.join(slow) or 'none'}"
    return [*shown, Row(f"slowest of these {len(cases)} cases", slowest.measured, LEAST, detail=detail)]


def named(case: Case) -> bool:
    """Says whether the shape has a bound of its own; against the compiled peers too."""
    return (
        case.kind == "embedded_gaussian"
        and case.pool == 1
        and (case.dtype == torch.float32 or case.shape == (16, 128, 14))
    )


LEAST = 0.95  # no shape may be slower
MUST = {  # forward must, aim; forward + backward must, aim
    (64, 32, 7): (2.0, 2.4, 2.0, 2.8),
    (64, 64, 8): (1.3, 1.7, 1.5, 2.0),
    (16, 64, 14): (1.3, 1.7, 1.5, 2.0),
    (16, 128, 14): (1.3, 1.5, 1.3, 1.7),
    (4, 256, 28): (0.95, 1.2, 0.95, 1.3),
    (2, 512, 28): (0.95, 1.2, 0.95, 1.3),
}


def softmax_rows(timed: Timed, quick: bool) -> list[Row]:
    rows = []
    for dtype, pool, shape, backward in itertools.product(
        (torch.float32, torch.bfloat16), (1, 2), SHAPES, (False, True)
    ):
        case = Case("embedded_gaussian", shape, pool, dtype, backward)
        if quick and not named(case):
            continue
        figure, detail = ratio(timed(case), "ours")
        bounds = MUST[shape] if dtype == torch.float32 else (1.5, 2.0, 1.5, 2.0)
        must, aim = bounds[2 * backward : 2 * backward + 2] if named(case) else (LEAST, None)
        rows.append(Row(str(case), figure, must, aim, detail=detail))
    return rows


def dot_product_rows(timed: Timed, quick: bool) -> list[Row]:
    rows = []
    for backward in (False, True):
        algebra, others, details = [], [], []
        for shape in SHAPES[1:4] if quick else SHAPES:
            times = timed(Case("dot_product", shape, 1, torch.float32, backward))
            algebra.append(ratio(times, "ours", ["gram", "reassociated"])[0])
            figure, detail = ratio(times, "ours", ["direct", "textbook"])
            others.append(figure)
            details.append(f"{shape}: {algebra[-1]:.2f}, {figure:.2f} ({detail})")
        must = (1.3, 2.5) if backward else (1.2, 2.0)
        label = "fwd+bwd" if backward else "fwd"
        rows.append(Row(f"dot product {label} / same algebra in PyTorch", geometric_mean(algebra), *must,
                        detail="; ".join(details)))  # fmt: skip
        rows.append(Row(f"dot product {label} / fastest textbook", geometric_mean(others), 2.0, 4.0))
    return rows


def concatenation_rows(timed: Timed, quick: bool) -> list[Row]:
    rows = []
    for backward in (False, True):
        algebra, books, broadcast, details = [], [], [], []
        for shape in SHAPES[2:4] if quick else SHAPES[2:]:
            times = timed(Case("concatenation", shape, 1, torch.float32, backward))
            figure, detail = ratio(times, "ours", ["sorted"])
            algebra.append(figure)
            broadcast.append(ratio(times, "ours", ["broadcast"])[0])
            if "textbook" in times:
                books.append(ratio(times, "ours", ["textbook"])[0])
            details.append(f"{shape}: {figure:.2f} ({detail})")
        label = "fwd+bwd" if backward else "fwd"
        rows.append(Row(f"concatenation {label} / same algebra in PyTorch", geometric_mean(algebra), 1.3, 3.0,
                        detail="; ".join(details)))  # fmt: skip
        rows.append(Row(f"concatenation {label} / fastest textbook", geometric_mean(books), 10, 50))
        rows.append(Row(f"concatenation {label} / ReLU(a + b) as an N x N matrix", geometric_mean(broadcast)))
    return rows


def other_rows(timed: Timed, quick: bool) -> list[Row]:
    """Times the rest of the grid of the other kinds, against the fastest of all peers."""
    for kind, dtype, pool, shape, backward in itertools.product(
        ("gaussian", "dot_product", "concatenation"),
        (torch.float32, torch.bfloat16),
        (1, 2),
        SHAPES[1:2] if quick else SHAPES,
        (False, True),
    ):
        if pool > 1 and kind == "concatenation":
            continue  # the sorted peer is written for full keys
        if (kind, dtype, pool) == ("dot_product", torch.float32, 1):
            continue  # measured with the rows of the dot product
        if (kind, dtype) == ("concatenation", torch.float32) and shape in SHAPES[2:] and not quick:
            continue  # likewise
        timed(Case(kind, shape, pool, dtype, backward))
    return []


PARTS = {
    "softmax": measured(softmax_rows),
    "dot-product": measured(dot_product_rows),
    "concatenation": measured(concatenation_rows),
    "others": measured(other_rows),
}


def memory_rows(quick: bool) -> list[Row]:
    return [memory_row(kind) for kind in KINDS]


SIDES = (14, 56, 112)


def memory_row(kind: str) -> Row:
    """Extra bytes a position, forward and backward: from 3136 to 12544 over from 196 to 3136, 1 if linear.

    Differences, so that what does not depend on N cancels; an N x N matrix gives over 4.
    """
    with multiprocessing.get_context("spawn").Pool(len(SIDES), maxtasksperchild=1) as fresh:
        extra = fresh.starmap(extra_bytes, [(kind, side) for side in SIDES], chunksize=1)
    few, many, most = (side**2 for side in SIDES)
    early, late = (extra[1] - extra[0]) / (many - few), (extra[2] - extra[1]) / (most - many)
    detail = f"{late:.0f} bytes a position of 64 channels; at N = 196, 3136, 12544: "
    detail += ", ".join(f"{bytes_ / 1e6:.2f}" for bytes_ in extra) + " MB"
    return Row(f"memory {kind}: growth from N = 196 to 12544", late / early, 1.5, at_most=True, detail=detail)


def extra_bytes(kind: str, side: int) -> float:
    """In a process of its own: what an earlier run has freed would be used again unseen."""
    torch.set_num_threads(THREADS)
    weights = [weight.requires_grad_() for weight in made_weights(64, torch.float32)]

    def step(x: torch.Tensor) -> None:
        theta, phi = (None, None) if kind == "gaussian" else weights[:2]
        pair = weights[4] if kind == "concatenation" else None
        nonlocal_block(x, theta, phi, weights[2], weights[3], pair=pair, kind=kind).sum().backward()

    step(torch.randn(1, 64, 4, 4, requires_grad=True))  # loads libraries and starts threads
    x = torch.randn(1, 64, side, side, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = resident("VmRSS")
    step(x)
    return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


@pytest.mark.parametrize("provider", ["ours", "sdpa", "softmax", "textbook"])
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_softmax_block(benchmark, shape: tuple[int, int, int], backward: bool, provider: str) -> None:
    torch.set_num_threads(THREADS)
    benchmark(runs_of(Case("embedded_gaussian", shape, 1, torch.float32, backward))[provider])


if __name__ == "__main__":
    main(__doc__ or "", PARTS, once=memory_rows, condense=condense)
