"""Who the fused block is compared with on a GPU, and how both are timed.

A peer is a function of (x, wide weight [3d, C, 1, 1], its bias, output weight [C, d, 1, 1], its bias) and
gets x in the layout that suits it.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

Block = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One shape of the grid; d is half the channels."""

    batch: int
    channels: int
    side: int
    pooled: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def inner(self) -> int:
        return self.channels // 2

    def __str__(self) -> str:
        keys = "pooled" if self.pooled else "full"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"({self.batch},{self.channels},{self.side}) {keys} {dtype}"

    def tensors(self) -> list[torch.Tensor]:
        """Makes x in channels_last, and the weights, all recording gradients."""
        make = functools.partial(torch.randn, device="cuda")
        c, d = self.channels, self.inner
        x = make(self.batch, c, self.side, self.side).contiguous(memory_format=torch.channels_last)
        weights = make(3 * d, c, 1, 1) / c**0.5, make(3 * d), make(c, d, 1, 1) / d**0.5, make(c)
        return [tensor.to(self.dtype).requires_grad_() for tensor in (x, *weights)]


def _pool(rows: torch.Tensor, x: torch.Tensor, pooled: bool) -> torch.Tensor:
    """[B, N, c] to [B, M, c]; max pooling in channels_last, without a transpose."""
    if not pooled:
        return rows
    image = rows.unflatten(1, x.shape[2:]).movedim(-1, 1)
    return F.max_pool2d(image, 2).movedim(1, -1).flatten(1, 2)


def _finish(y: torch.Tensor, x: torch.Tensor, wz: torch.Tensor, bz: torch.Tensor) -> torch.Tensor:
    return F.linear(y, wz.flatten(1), bz).unflatten(1, x.shape[2:]).movedim(-1, 1) + x


def textbook(x, w, b, wz, bz, *, pooled: bool) -> torch.Tensor:
    """Three convolutions, a softmax over N x M, NCHW as it comes."""
    (wt, wp, wg), (bt, bp, bg) = w.chunk(3), b.chunk(3)
    theta, phi, g = F.conv2d(x, wt, bt), F.conv2d(x, wp, bp), F.conv2d(x, wg, bg)
    if pooled:
        phi, g = F.max_pool2d(phi, 2), F.max_pool2d(g, 2)
    weights = torch.softmax(theta.flatten(2).transpose(1, 2) @ phi.flatten(2), -1)
    y = (weights @ g.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(theta.shape)
    return F.conv2d(y, wz, bz) + x


def sdpa(x, w, b, wz, bz, *, pooled: bool, convolve: bool = True) -> torch.Tensor:
    """channels_last, one wide projection, SDPA on stride-1 slices, no transposes."""
    rows = x.movedim(1, -1).flatten(1, 2)
    wide = F.conv2d(x, w, b).movedim(1, -1).flatten(1, 2) if convolve else F.linear(rows, w.flatten(1), b)
    d = wz.shape[1]
    query, rest = wide[..., :d], _pool(wide[..., d:], x, pooled)
    key, value = rest[..., :d], rest[..., d:]
    y = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=1.0)[:, 0]
    if not convolve:
        return _finish(y, x, wz, bz)
    return F.conv2d(y.unflatten(1, x.shape[2:]).movedim(-1, 1), wz, bz) + x


def softmax_product(x, w, b, wz, bz, *, pooled: bool) -> torch.Tensor:
    """The same with softmax(q k^T) v."""
    wide = F.linear(x.movedim(1, -1).flatten(1, 2), w.flatten(1), b)
    d = wz.shape[1]
    query, rest = wide[..., :d], _pool(wide[..., d:], x, pooled)
    y = torch.softmax(query @ rest[..., :d].mT, -1) @ rest[..., d:]
    return _finish(y, x, wz, bz)


def flex(x, w, b, wz, bz, *, pooled: bool) -> torch.Tensor:
    """The same with FlexAttention; only meant to be compiled."""
    wide = F.linear(x.movedim(1, -1).flatten(1, 2), w.flatten(1), b)
    d = wz.shape[1]
    query, rest = wide[..., :d], _pool(wide[..., d:], x, pooled)
    y = flex_attention(query[:, None], rest[:, None, :, :d], rest[:, None, :, d:], scale=1.0)[:, 0]
    return _finish(y, x, wz, bz)


def dot_textbook(x, w, b, wz, bz, *, pooled: bool) -> torch.Tensor:
    """The dot-product kind as the paper's module computes it."""
    (wt, wp, wg), (bt, bp, bg) = w.chunk(3), b.chunk(3)
    theta, phi, g = F.conv2d(x, wt, bt), F.conv2d(x, wp, bp), F.conv2d(x, wg, bg)
    if pooled:
        phi, g = F.max_pool2d(phi, 2), F.max_pool2d(g, 2)
    weights = theta.flatten(2).transpose(1, 2) @ phi.flatten(2) / phi[0, 0].numel()
    y = (weights @ g.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(theta.shape)
    return F.conv2d(y, wz, bz) + x


def dot_wide(x, w, b, wz, bz, *, pooled: bool) -> torch.Tensor:
    """The dot-product kind in channels_last with one wide projection, N x M formed."""
    wide = F.linear(x.movedim(1, -1).flatten(1, 2), w.flatten(1), b)
    d = wz.shape[1]
    query, rest = wide[..., :d], _pool(wide[..., d:], x, pooled)
    y = (query @ rest[..., :d].mT / rest.shape[1]) @ rest[..., d:]
    return _finish(y, x, wz, bz)


def softmax_peers(*, compiled: bool = True) -> dict[str, Block]:
    """Every peer of the softmax kinds by name."""
    linear = functools.partial(sdpa, convolve=False)
    peers: dict[str, Block] = {
        "textbook": textbook, "sdpa": sdpa, "sdpa_linear": linear, "softmax_product": softmax_product,
    }  # fmt: skip
    if compiled:
        for name, function in {**peers, "flex": flex}.items():
            if name != "sdpa":
                peers[f"{name} compiled"] = torch.compile(function, dynamic=False)
    return peers


def dot_peers(*, compiled: bool = True) -> dict[str, Block]:
    """Every peer of the dot-product kind by name."""
    peers: dict[str, Block] = {"textbook": dot_textbook, "wide": dot_wide}
    if compiled:
        peers |= {f"{name} compiled": torch.compile(each, dynamic=False) for name, each in peers.items()}
    return peers


def microseconds(
    calls: dict[str, Sequence[Callable[[], object]]], *, replayed: bool, rounds: int = 15
) -> dict[str, list[float]]:
    """Times each name's calls (the same work on different inputs), interleaved; microseconds of one call.

    Args:
        calls: several closures a name, one a set of inputs, so that no run finds its data in a register.
        replayed: capture all calls of a name in one CUDA graph and time its replay; otherwise launch them.
        rounds: how often every name is timed.
    """
    runs: dict[str, Callable[[], object]] = {}
    for name, closures in calls.items():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                for closure in closures:
                    closure()
        torch.cuda.synchronize()
        if replayed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for closure in closures:
                    closure()
            runs[name] = graph.replay
        else:
            runs[name] = functools.partial(_each, closures)
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    repeats = 4
    for round_ in range(-2, rounds):
        for name, run in runs.items():
            torch.cuda.synchronize()
            started = time.perf_counter()
            begin.record()
            for _ in range(repeats):
                run()
            end.record()
            torch.cuda.synchronize()
            wall = time.perf_counter() - started
            spent = begin.elapsed_time(end) * 1e3 if replayed else wall * 1e6
            if round_ >= 0:
                times[name].append(spent / (repeats * len(calls[name])))
    return times


def _each(closures: Sequence[Callable[[], object]]) -> None:
    for closure in closures:
        closure()


def host_microseconds(call: Callable[[], object], repeats: int = 300) -> float:
    """Time for a call to return, the GPU's work not awaited; median of groups that fit the launch queue."""
    figures = []
    for _ in range(repeats // 20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            call()
        figures.append((time.perf_counter() - begin) * 1e6 / 20)
    return statistics.median(figures)
