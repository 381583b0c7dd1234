"""What each CPU kernel costs on this machine: measured once, kept on disk, and asked at every choice.

The time of a kernel is taken to be linear in a few counts (weights packed, multiply-adds, elements of x, y
and a dense gradient) whose coefficients are fitted to timings of some fifteen seconds in all.  They are
measured at the first choice and stored in ``$XDG_CACHE_HOME/rlnas_fast`` (``~/.cache`` by default) under the
CPU's name, its instruction set, the number of threads, the dtype, the version of PyTorch and the build of the
kernels.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from rlnas_fast.ops import native
from rlnas_fast.ops.masked_matmul.tile_mask import TileMask, TileTensors

__all__ = ["Product", "estimates", "fastest", "measure"]

Product = Literal["forward", "forward_packed", "grad_input", "grad_weight"]

_VERSION = 5  # of the features below
_LANES = {"plain": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16}
_KERNELS: dict[Product, tuple[str, ...]] = {
    "forward": ("dense", "tiles", "rows", "direct"),
    "forward_packed": ("dense", "tiles", "rows", "direct"),
    "grad_input": ("dense", "tiles", "rows"),
    "grad_weight": ("dense", "tiles", "rows"),
}
_DIRECT_ROWS = 8
# Square weights that are timed, with their batches: one that fits the caches and one that does not.
# In 16 bits the large batches are left out: a CPU without hardware for them is very slow.
_SIZES: tuple[tuple[int, tuple[int, ...]], ...] = ((512, (1, 8, 64, 256)), (2048, (1, 64, 256)))
_LARGEST_16_BIT_BATCH = 8


def estimates(product: Product, batch: int, mask: TileTensors, dtype: torch.dtype) -> dict[str, float]:
    """Returns the seconds that each applicable kernel is expected to take.

    Args:
        product: which of the products; ``forward_packed`` leaves out bringing the weight into the kernel's
            form.
        batch: rows of x.
        mask: the mask, on the CPU.
        dtype: of x and the weight.
    """
    coefficients = _coefficients(native.cpu().isa(), torch.get_num_threads(), str(dtype))
    size = _size(mask)
    seconds = {}
    for kernel in _KERNELS[product]:
        if (kernel == "direct" and batch > _DIRECT_ROWS) or (kernel == "rows" and max(size.shape) > 1 << 16):
            continue
        features = _features(product, kernel, batch, size)
        known = coefficients[f"{product} {_variant(product, kernel, size)}"]
        seconds[kernel] = sum(c * f for c, f in zip(known, features, strict=True))
    return seconds


def fastest(product: Product, batch: int, mask: TileTensors, dtype: torch.dtype) -> str:
    """Names the kernel that is expected to take least; remembered, since small products take microseconds."""
    key = (product, batch, _size(mask), dtype, native.cpu().isa(), torch.get_num_threads())
    known = _decisions.get(key)
    if known is None:
        seconds = estimates(product, batch, mask, dtype)
        known = min(seconds, key=seconds.__getitem__)
        if len(_decisions) >= _MOST_DECISIONS:
            _decisions.clear()
        _decisions[key] = known
    return known


class _Size(NamedTuple):
    """What the time of a product depends on, beside the batch."""

    shape: tuple[int, int]
    tile: tuple[int, int]
    stats: tuple[int, ...]


def _size(mask: TileTensors) -> _Size:
    return _Size(mask.shape, mask.tile, tuple(mask.stats.tolist()))


_MOST_DECISIONS = 4096
_decisions: dict[tuple[object, ...], str] = {}


def measure(isa: str, threads: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """Times every kernel on this machine and fits its coefficients; some fifteen seconds.

    Args:
        isa: the instruction set in use; part of the key only.
        threads: the number of threads in use; part of the key only.
        dtype: of x and the weight.

    Returns:
        Coefficients by product and kernel, in the order of the features.
    """
    samples: dict[str, list[tuple[list[float], float]]] = {}
    with torch.no_grad():
        for size, batches in _SIZES:
            if dtype != torch.float32:
                batches = tuple(batch for batch in batches if batch <= _LARGEST_16_BIT_BATCH)
            for key, sample in _samples(size, batches, dtype):
                samples.setdefault(key, []).append(sample)
    return {key: _fit(points) for key, points in samples.items()}


def _samples(
    size: int, batches: tuple[int, ...], dtype: torch.dtype
) -> Iterator[tuple[str, tuple[list[float], float]]]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(size, size, generator=generator).to(dtype)
    inputs = [torch.randn(batch, size, generator=generator).to(dtype) for batch in batches]
    scores = torch.rand(size, size, generator=generator)
    kinds = ((32, 1.0, True), (32, 0.3, True), (32, 0.1, True), (32, 0.5, False), (32, 0.1, False))
    for tile, density, whole in (*kinds, (16, 0.5, True), (16, 0.1, True)):
        mask = TileMask.from_scores(scores, density, (tile, tile), whole_tiles=whole).tensors
        for x, (product, kernels) in itertools.product(inputs, _KERNELS.items()):
            timed = [
                kernel
                for kernel in kernels
                if not (kernel == "direct" and x.shape[0] > _DIRECT_ROWS)
                and not (tile == 16 and kernel == "dense")
            ]
            times = _seconds([_call(product, kernel, x, weight, mask) for kernel in timed])
            for kernel, seconds in zip(timed, times, strict=True):
                features = _features(product, kernel, x.shape[0], _size(mask))
                yield f"{product} {_variant(product, kernel, _size(mask))}", (features, seconds)


def _call(
    product: Product, kernel: str, x: torch.Tensor, weight: torch.Tensor, mask: TileTensors
) -> Callable[[], object]:
    from rlnas_fast.ops.masked_matmul import cpu as kernels

    if product == "forward":
        return lambda: kernels.forward(x, weight, mask, None, kernel=kernel)
    if product == "grad_input":
        return lambda: kernels.grad_input(x, weight, mask, kernel)
    if product == "grad_weight":
        return lambda: kernels.grad_weight(x, x, mask, kernel)
    packed = kernels.pack(weight, mask, kernel)
    return lambda: kernels.forward_packed(x, packed, None)


def _seconds(calls: list[Callable[[], object]]) -> list[float]:
    """The least of a few runs of each, for noise only adds; in turn, so that other load meets all of them."""
    best, start = [math.inf] * len(calls), time.perf_counter()
    for turn in range(6):
        for i, call in enumerate(calls):
            begin = time.perf_counter()
            call()
            if turn:  # the first run pays for fresh memory
                best[i] = min(best[i], time.perf_counter() - begin)
        if turn >= 2 and time.perf_counter() - start > 0.005 * len(calls):
            break
    return best


def _variant(product: Product, kernel: str, mask: _Size) -> str:
    if kernel != "tiles":
        return kernel
    return f"tiles{_width(mask.tile[0] if product.startswith('forward') else mask.tile[1])}"


def _width(tile_out: int) -> int:
    return 16 if tile_out <= 16 else 32


def _features(product: Product, kernel: str, batch: int, mask: _Size) -> list[float]:
    rows, cols = mask.shape
    keep, int8, nonzeros, incomplete = mask.stats
    live = keep + int8
    moved = batch * (rows + cols)
    if kernel == "dense":
        masked = 0 if product == "forward_packed" or (nonzeros == rows * cols and not int8) else rows * cols
        return [1, masked, rows * cols, batch * rows * cols, moved]
    tile_rows, tile_cols = mask.tile
    out, inner = (tile_rows, tile_cols) if product.startswith("forward") else (tile_cols, tile_rows)
    width, filled = _width(out), [rows * cols] if product == "grad_weight" else []
    stored = live * inner * width * -(-out // width)
    if kernel == "tiles":
        return [1, stored, stored if incomplete else 0, batch * stored, moved, *filled]
    if kernel == "direct":
        return [1, live * tile_rows * tile_cols, nonzeros, batch * nonzeros, moved]
    lanes = _LANES[native.cpu().isa()]
    padded = batch if batch <= _DIRECT_ROWS else -(-batch // lanes) * lanes
    few = nonzeros if batch <= _DIRECT_ROWS else 0
    return [
        1,
        rows if product == "forward_packed" else live * tile_rows * -(-tile_cols // 32),
        nonzeros,
        batch * few,
        (padded * nonzeros - batch * few),
        moved,
        *filled,
    ]


def _fit(points: list[tuple[list[float], float]]) -> list[float]:
    """Least squares of the relative error; a count that would be worth less than nothing is left out."""
    features = torch.tensor([f for f, _ in points], dtype=torch.float64)
    seconds = torch.tensor([s for _, s in points], dtype=torch.float64)
    weighted = features / seconds[:, None]
    scale = weighted.abs().amax(0).clamp_min(1e-300)
    used = [i for i in range(features.shape[1]) if bool((features[:, i] != 0).any())]
    while used:
        part = (weighted / scale)[:, used]
        solution = torch.linalg.lstsq(part, torch.ones_like(seconds), driver="gelsd").solution
        if float(solution.min()) >= 0:
            break
        used.pop(int(solution.argmin()))
    coefficients = [0.0] * features.shape[1]
    for i, value in zip(used, solution.tolist() if used else [], strict=True):
        coefficients[i] = value / float(scale[i])
    return coefficients


@functools.cache
def _coefficients(isa: str, threads: int, dtype: str) -> dict[str, list[float]]:
    path = _cache_path(isa, threads, dtype)
    try:
        stored: dict[str, list[float]] = json.loads(path.read_text())
        return stored
    except (OSError, ValueError):
        pass
    fresh = measure(isa, threads, getattr(torch, dtype.removeprefix("torch.")))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(fresh, indent=1))
        partial.replace(path)
    except OSError:  # a read-only home: measure again in the next process
        pass
    return fresh


def _cache_path(isa: str, threads: int, dtype: str) -> Path:
    build = hashlib.sha256(Path(str(native.cpu().__file__)).read_bytes()).hexdigest()
    key = "|".join((_cpu_name(), isa, str(threads), dtype, torch.__version__, build, str(_VERSION)))
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "rlnas_fast" / f"masked-matmul-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
