"""Masked products on a GPU against every peer, bf16, weight 4096 x 4096, eager and graph-replayed.

Every contender gets its mask already in its own form, except where a row says that the mask changes.
``--tune`` times kernel variants instead; ``--only TEXT`` keeps the sections whose name contains it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from harness import Row, _environment, _show, ratio
from nonlocal_attention_gpu_peers import microseconds

from rlnas_fast.ops.masked_matmul import TileMask, cuda, masked_matmul, triton_kernels
from rlnas_fast.ops.masked_matmul.triton_kernels import Blocks

N = K = 4096
WARM_PROCESSES = 12
INPUT_SETS = 4  # 128 MiB of weights: more than the 60 MB of L2
DTYPE = torch.bfloat16
Call = Callable[[], object]
Contenders = dict[str, list[Call]]


@dataclasses.dataclass
class Problem:
    """One set of inputs."""

    x: torch.Tensor
    grad_y: torch.Tensor
    weight: torch.Tensor
    mask: TileMask
    dense: torch.Tensor
    applied: torch.Tensor


def problems(batch: int, zeros: float, tile: int, structured: bool) -> list[Problem]:
    made = []
    for _ in range(INPUT_SETS):
        if structured:
            tiles = torch.rand(N // tile, K // tile, device="cuda") >= zeros
            mask = TileMask((N, K), (tile, tile), device="cuda")
            mask.update(state=tiles.to(torch.uint8))
            dense = tiles.repeat_interleave(tile, 0).repeat_interleave(tile, 1)
        else:
            dense = torch.rand(N, K, device="cuda") >= zeros
            mask = TileMask((N, K), (tile, tile), unstructured=True, device="cuda")
            mask.update(dense=dense)
        x, grad_y = (torch.randn(batch, size, device="cuda", dtype=DTYPE) for size in (K, N))
        weight = torch.randn(N, K, device="cuda", dtype=DTYPE) / 64
        made.append(Problem(x, grad_y, weight, mask, dense, weight * dense))
    return made


def each(inputs: list[Problem], function: Callable[[Problem], object]) -> list[Call]:
    return [functools.partial(function, problem) for problem in inputs]


def usable(calls: Contenders, replayed: bool) -> Contenders:
    """Leaves out, and names, a contender that cannot run, or cannot be captured, here."""
    kept = {}
    for name, closures in calls.items():
        try:
            closures[0]()
            torch.cuda.synchronize()
            if replayed:
                with torch.cuda.graph(torch.cuda.CUDAGraph()):
                    closures[0]()
            kept[name] = closures
        except Exception as error:
            text = str(error).strip().splitlines() or [repr(error)]
            print(f"  {name} cannot run: {text[0]}"[:200], flush=True)
    return kept


def timed(title: str, calls: Contenders, replayed: bool = True, rounds: int = 15) -> dict[str, list[float]]:
    times = microseconds(usable(calls, replayed), replayed=replayed, rounds=rounds)
    ordered = sorted(times.items(), key=lambda item: statistics.median(item[1]))
    shown = ", ".join(f"{name} {statistics.median(values):.1f}" for name, values in ordered)
    print(f"{title} [{'graph' if replayed else 'eager'}] us: {shown}", flush=True)
    return times


def tile_variants(blocks: Iterable[tuple[int, ...]]) -> dict[str, Callable[[Problem], object]]:
    variants: dict[str, Callable[[Problem], object]] = {}
    for block in blocks:
        variants["t" + "/".join(map(str, block))] = lambda p, b=block: triton_kernels.forward(
            p.x, p.weight, p.mask.tensors, None, blocks=Blocks(*b)
        )
    return variants


def ours_cuda(p: Problem) -> object:
    return cuda.forward(p.x, p.weight, p.mask.tensors, None)


def ours_triton(p: Problem) -> object:
    return triton_kernels.forward(p.x, p.weight, p.mask.tensors, None)


def ours(p: Problem) -> object:
    return masked_matmul(p.x, p.weight, p.mask)


def dense_product(p: Problem) -> object:
    return F.linear(p.x, p.applied)


def eager_mask(p: Problem) -> object:
    return F.linear(p.x, p.weight * p.dense)


@functools.cache
def compiled_mask() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    return torch.compile(lambda x, weight, dense: F.linear(x, weight * dense), dynamic=False)


def bsr_settings(tile: int) -> list[dict[str, int]]:
    """What bsr_dense_addmm is tuned over: the parameters of its own tuner, 40 or 30 settings."""
    return [
        {"SPLIT_N": split, "GROUP_SIZE_ROW": group, "num_stages": stages, "num_warps": warps}
        for split in ((2, 4, 8, 16) if tile <= 64 else (1, 2, 4))
        for stages in (1, 2, 3, 4, 5)
        for warps, group in ((4, 1), (8, 1))
    ]


def bsr_calls(inputs: list[Problem], tile: int, part: slice = slice(None)) -> list[Call]:
    """bsr_dense_addmm with the fastest of its settings (replayed), on operands already in its form."""
    from torch.sparse._triton_ops import bsr_dense_addmm

    converted = [
        (p.x.new_zeros(N, p.x.shape[0]), p.applied.to_sparse_bsr((tile, tile)), p.x.t()) for p in inputs
    ]
    settings = bsr_settings(tile)[part]
    calls = {
        str(index): [functools.partial(bsr_dense_addmm, *o, beta=0, alpha=1, meta=setting) for o in converted]
        for index, setting in enumerate(settings)
    }
    times = microseconds(usable(calls, True), replayed=True, rounds=3)
    best = min(times, key=lambda name: statistics.median(times[name]))
    print(f"  bsr_dense_addmm, tiles {tile}: {settings[int(best)]}", flush=True)
    return calls[best]


def warm_bsr(part: int, parts: int) -> None:
    """Compiles a share of bsr_dense_addmm's settings into Triton's cache."""
    for tile in (64, 128):
        bsr_calls(problems(512, 0.9, tile, True), tile, slice(part, None, parts))


def dense_peers(inputs: list[Problem]) -> Contenders:
    return {
        "dense": each(inputs, dense_product),
        "W*M": each(inputs, eager_mask),
    }


def compare(rows: list[Row], name: str, calls: Contenders, musts: dict[str, float | None]) -> None:
    """Adds a row a peer, eager and replayed: how many times faster than it we are."""
    for replayed in (False, True):
        times = timed(name, calls, replayed)
        for peer, must in musts.items():
            if peer in times and "ours" in times:
                seconds = {key: [t / 1e6 for t in values] for key, values in times.items()}
                figure, detail = ratio(seconds, "ours", [peer])
                how = "replayed" if replayed else "eager"
                rows.append(Row(f"{name}, against {peer}, {how}", figure, must, detail=detail))


def break_even(rows: list[Row], tile: int, batch: int) -> None:
    """The zero fraction, in percent, from which we are as fast as the dense product."""
    for replayed in (False, True):
        points = []
        for zeros in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
            inputs = problems(batch, zeros, tile, True)
            calls = {"ours": each(inputs, ours), "dense": each(inputs, dense_product)}
            times = timed(f"tiles {tile}, {zeros:.0%} zeros, B={batch}", calls, replayed, 9)
            figure = statistics.median(d / o for d, o in zip(times["dense"], times["ours"], strict=True))
            points.append((100 * zeros, figure))
        how = "replayed" if replayed else "eager"
        rows.append(
            Row(f"tiles {tile}, break-even, B={batch}, {how}", crossing(points), 50.0, unit="%", at_most=True,
                detail=", ".join(f"{zeros:.0f} %: {figure:.2f}" for zeros, figure in points))
        )  # fmt: skip


def crossing(points: list[tuple[float, float]]) -> float:
    """Where the ratio reaches 1 for good, between two measured points."""
    place = 0.0
    for (before, low), (after, high) in itertools.pairwise(points):
        if low < 1:
            place = before + (after - before) * (1 - low) / (high - low) if high >= 1 else float("inf")
    return place


def section_break_even(rows: list[Row]) -> None:
    for tile in (64, 128):
        break_even(rows, tile, 512)


def section_tiles(rows: list[Row], tile: int, batch: int = 512) -> None:
    inputs = problems(batch, 0.9, tile, True)
    calls = {"ours": each(inputs, ours), **dense_peers(inputs), "bsr": bsr_calls(inputs, tile)}
    compare(rows, f"tiles {tile}, 90 % zeros, B={batch}", calls, {"bsr": 1.3, "dense": None})


def section_small_tiles(rows: list[Row]) -> None:
    for tile in (16, 32):
        for zeros in (0.5, 0.9):
            inputs = problems(512, zeros, tile, True)
            calls = {"ours": each(inputs, ours), "triton": each(inputs, ours_triton), **dense_peers(inputs)}
            name = f"tiles {tile}, {zeros:.0%} zeros, B=512"
            compare(rows, name, calls, {"dense": None, "triton": None})


def section_unstructured(rows: list[Row]) -> None:
    for tile, batch, fast, eager in ((128, 512, 1.0, 1.5), (32, 512, None, None), (128, 4096, None, None)):
        inputs = problems(batch, 0.5, tile, False)
        calls = {"ours": each(inputs, ours), **dense_peers(inputs)}
        for cluster in CLUSTERS:
            name = "ours, cluster " + "x".join(map(str, cluster))
            calls[name] = each(
                inputs, lambda p, c=cluster: cuda.forward(p.x, p.weight, p.mask.tensors, None, cluster=c)
            )
        name = f"unstructured, 50 % zeros, tiles {tile}, B={batch}"
        compare(rows, name, calls, {"dense": fast, "W*M": eager})


def section_clusters(rows: list[Row]) -> None:
    """Only printed: which clusters to choose."""
    del rows
    for tile in (64, 128):
        for zeros in (0.5, 0.9):
            inputs = problems(512, zeros, tile, True)
            calls: Contenders = {"dense": each(inputs, dense_product)}
            for cluster in [(1, 1), (2, 1), (4, 1)]:
                name = "x".join(map(str, cluster))
                calls[f"forward {name}"] = each(
                    inputs, lambda p, c=cluster: cuda.forward(p.x, p.weight, p.mask.tensors, None, cluster=c)
                )
                calls[f"gx {name}"] = each(
                    inputs,
                    lambda p, c=cluster: cuda.grad_input(p.grad_y, p.weight, p.mask.tensors, cluster=c),
                )
            timed(f"tiles {tile}, {zeros:.0%} zeros, B=512", calls)


def section_compiled(rows: list[Row]) -> None:
    inputs = problems(512, 0.5, 128, False)
    calls = {
        "ours": each(inputs, ours),
        "compiled W*M": each(inputs, lambda p: compiled_mask()(p.x, p.weight, p.dense)),
    }
    compare(rows, "unstructured, 50 % zeros, B=512", calls, {"compiled W*M": None})


def section_few_rows(rows: list[Row]) -> None:
    for batch in (1, 8):
        for structured, tile in ((True, 64), (False, 64)):
            inputs = problems(batch, 0.9, tile, structured)
            calls = {"ours": each(inputs, ours), **dense_peers(inputs)}
            kind = f"tiles {tile}" if structured else "unstructured"
            compare(rows, f"{kind}, 90 % zeros, B={batch}", calls, {"dense": None, "W*M": None})


def section_gradients(rows: list[Row]) -> None:
    for tile in (64, 128):
        inputs = problems(512, 0.9, tile, True)
        calls: Contenders = {
            "ours": each(inputs, lambda p: (
                cuda.grad_input(p.grad_y, p.weight, p.mask.tensors),
                triton_kernels.grad_weight(p.grad_y, p.x, p.mask.tensors))),
            "gx": each(inputs, lambda p: cuda.grad_input(p.grad_y, p.weight, p.mask.tensors)),
            "gx dense": each(inputs, lambda p: p.grad_y @ p.applied),
            "gW": each(inputs, lambda p: triton_kernels.grad_weight(p.grad_y, p.x, p.mask.tensors)),
            "dense": each(inputs, lambda p: (p.grad_y @ p.applied, p.grad_y.t() @ p.x)),
            "W*M": each(inputs, lambda p: (p.grad_y @ (p.weight * p.dense), (p.grad_y.t() @ p.x) * p.dense)),
        }  # fmt: skip
        compare(rows, f"both gradients, tiles {tile}, 90 % zeros, B=512", calls, {"dense": None, "W*M": None})


def section_update(rows: list[Row]) -> None:
    for tile in (16, 64, 128):
        inputs = problems(8, 0.9, tile, False)
        calls = {
            "pack": each(inputs, lambda p: cuda.pack_mask(p.dense, p.mask.tensors)),
            "lists": each(inputs, lambda p: cuda.update_lists(p.mask.tensors)),
            "read": each(inputs, lambda p: p.dense.any()),
        }
        for replayed in (False, True):
            times = timed(f"mask update, tiles {tile}", calls, replayed)
            how = "replayed" if replayed else "eager"
            name = f"mask update, {N} x {K}, tiles {tile}, {how}"
            rows.append(Row(name, statistics.median(times["pack"]), 20.0, unit="us", at_most=True))


def section_two_of_four(rows: list[Row]) -> None:
    from torch.sparse import to_sparse_semi_structured

    for batch in (512, 4096):
        inputs = problems(batch, 0.0, 128, False)
        for p in inputs:
            p.mask = TileMask.two_of_four(p.weight.abs().float(), (128, 128))
            p.dense = p.mask.dense()
            p.applied = p.weight * p.dense
        halves = [(to_sparse_semi_structured(p.applied), p) for p in inputs]
        calls: Contenders = {
            "ours": each(inputs, ours),
            "dense": each(inputs, dense_product),
            "2:4": [functools.partial(lambda h, p: F.linear(p.x, h), h, p) for h, p in halves],
            "2:4 with conversion": each(
                inputs, lambda p: F.linear(p.x, to_sparse_semi_structured(p.applied))
            ),
        }
        compare(rows, f"2:4, B={batch}", calls, {"dense": None, "2:4": None})


def section_host(rows: list[Row]) -> None:
    inputs = problems(1, 0.9, 64, True)
    p = inputs[0]
    for name, call in (("op", lambda: ours(p)), ("cuda", lambda: ours_cuda(p)),
                       ("triton", lambda: triton_kernels.forward(p.x, p.weight, p.mask.tensors, None)),
                       ("update", lambda: cuda.update_lists(p.mask.tensors)),
                       ("F.linear", lambda: dense_product(p))):  # fmt: skip
        for _ in range(20):
            call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(200):
            call()
        spent = (time.perf_counter() - started) / 200 * 1e6
        torch.cuda.synchronize()
        rows.append(Row(f"host, one call of {name}", spent, unit="us", at_most=True))


TUNED = {
    16: [(64, 16, 64, 4, 5), (128, 16, 64, 4, 5), (128, 16, 128, 4, 4), (256, 16, 64, 4, 5)],
    32: [(64, 32, 64, 4, 5), (128, 32, 64, 4, 5), (128, 32, 128, 4, 4), (256, 32, 64, 8, 5)],
    64: [
        *((64, 64, 64, 4, 5), (128, 64, 64, 4, 3), (128, 64, 64, 4, 5), (128, 64, 64, 4, 7)),
        *((256, 64, 64, 4, 5), (256, 64, 64, 8, 5), (128, 64, 32, 4, 7), (32, 64, 64, 4, 7)),
    ],
    128: [
        *((64, 128, 64, 4, 7), (128, 128, 64, 8, 5), (128, 128, 64, 8, 7), (256, 128, 64, 8, 5)),
        *((128, 64, 64, 4, 7), (64, 64, 128, 4, 5), (128, 128, 128, 8, 4), (64, 64, 64, 4, 7)),
    ],
}
CLUSTERS = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)]
TUNED_SAMPLED = {
    16: [(64, 16, 64, 4, 3), (64, 16, 128, 4, 4), (128, 16, 64, 4, 4)],
    32: [(64, 32, 64, 4, 3), (64, 32, 128, 4, 4), (128, 32, 64, 4, 4)],
    64: [(64, 64, 64, 4, 3), (64, 64, 64, 4, 5), (128, 64, 64, 4, 3), (32, 64, 64, 4, 5)],
    128: [(64, 128, 128, 8, 3), (64, 128, 128, 8, 4), (64, 64, 128, 4, 4), (64, 64, 64, 4, 4)],
}


def tune(rows: list[Row], tile: int) -> None:
    del rows
    for batch, zeros, structured in (
        (512, 0.9, True),
        (512, 0.5, True),
        (512, 0.5, False),
        (4096, 0.5, True),
        (64, 0.9, True),
    ):
        if not structured and tile < 64:
            continue
        inputs = problems(batch, zeros, tile, structured)
        calls: Contenders = {"dense": each(inputs, dense_product)}
        for name, variant in tile_variants(TUNED[tile]).items():
            calls[name] = each(inputs, variant)
        for cluster in CLUSTERS if tile >= 64 else []:
            calls["cuda" + "x".join(map(str, cluster))] = each(
                inputs, lambda p, c=cluster: cuda.forward(p.x, p.weight, p.mask.tensors, None, cluster=c)
            )
        kind = f"tiles {tile}" if structured else f"bits in tiles {tile}"
        timed(f"{kind}, {zeros:.0%} zeros, B={batch}", calls, rounds=7)


def tune_gradients(rows: list[Row], tile: int) -> None:
    del rows
    inputs = problems(512, 0.9, tile, True)
    calls: Contenders = {"dense gx": each(inputs, lambda p: p.grad_y @ p.applied),
                         "dense gW": each(inputs, lambda p: p.grad_y.t() @ p.x)}  # fmt: skip
    for block in TUNED[tile]:
        name = "/".join(map(str, block))
        calls[f"gx {name}"] = each(inputs, lambda p, b=block: triton_kernels.grad_input(
            p.grad_y, p.weight, p.mask.tensors, blocks=Blocks(*b)))  # fmt: skip
    for cluster in [(1, 1), (2, 1), (4, 1)] if tile >= 64 else []:
        calls["gx cuda" + "x".join(map(str, cluster))] = each(
            inputs, lambda p, c=cluster: cuda.grad_input(p.grad_y, p.weight, p.mask.tensors, cluster=c)
        )
    for block in TUNED_SAMPLED[tile]:
        name = "/".join(map(str, block))
        calls[f"gW {name}"] = each(inputs, lambda p, b=block: triton_kernels.grad_weight(
            p.grad_y, p.x, p.mask.tensors, blocks=Blocks(*b)))  # fmt: skip
    timed(f"gradients, tiles {tile}, 90% zeros, B=512", calls, rounds=7)


SECTIONS: dict[str, Callable[[list[Row]], None]] = {
    "break-even": section_break_even,
    "clusters": section_clusters,
    "unstructured": section_unstructured,
    "tiles 64": functools.partial(section_tiles, tile=64),
    "tiles 128": functools.partial(section_tiles, tile=128),
    "update": section_update,
    "gradients": section_gradients,
    "few rows": section_few_rows,
    "small tiles": section_small_tiles,
    "host": section_host,
    "two of four": section_two_of_four,
    "compiled": section_compiled,
}
TUNING: dict[str, Callable[[list[Row]], None]] = {
    **{f"tune {tile}": functools.partial(tune, tile=tile) for tile in (64, 128, 32, 16)},
    **{f"tune gradients {tile}": functools.partial(tune_gradients, tile=tile) for tile in (64, 128, 32, 16)},
}


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if a must does not hold")
    parser.add_argument("--tune", action="store_true", help="time kernel variants")
    parser.add_argument("--only", default="")
    parser.add_argument("--warm", action="store_true", help="first compile the slowest peer in 12 processes")
    parser.add_argument("--warm-part", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sections = TUNING if options.tune else SECTIONS
    chosen = {name: section for name, section in sections.items() if options.only in name}
    if options.warm_part is not None:
        warm_bsr(options.warm_part, WARM_PROCESSES)
        return
    if options.warm:
        started = time.perf_counter()
        command = [sys.executable, __file__, "--warm-part"]
        parts = [
            subprocess.Popen([*command, str(part)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for part in range(WARM_PROCESSES)
        ]
        for process in parts:
            process.wait()
        print(f"-- warm: {time.perf_counter() - started:.0f} s", flush=True)
    rows: list[Row] = []
    for name, section in chosen.items():
        started = time.perf_counter()
        try:
            section(rows)
        except Exception as error:  # one section must not cost the others: device time is short
            print(f"section {name} failed: {error!r}"[:300], flush=True)
            rows.append(Row(f"section {name}", float("nan"), 0.0, detail=repr(error)[:200]))
        print(f"-- {name}: {time.perf_counter() - started:.0f} s", flush=True)
        if options.json:
            record = {
                **_environment(),
                "triton": triton.__version__,
                "rows": [dataclasses.asdict(row) for row in rows],
            }
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    _show(__doc__ or "", rows)
    sys.exit(1 if options.check and not all(row.holds() for row in rows) else 0)


if __name__ == "__main__":
    main()
