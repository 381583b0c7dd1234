"""The whole non-local block on a GPU against every peer: eager and graph-replayed, forward and with backward.

``--check`` compares with what is wanted on an H200; ``--only TEXT`` keeps the cases whose name contains it.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from harness import Row, _environment, _show, ratio
from nonlocal_attention_gpu_peers import Block, Case, dot_peers, host_microseconds, microseconds, softmax_peers

from rlnas_fast.ops.nonlocal_attention import triton_block

INPUT_SETS = 4
SOFTMAX = [
    Case(64, 64, 14), Case(64, 64, 14, True), Case(32, 256, 28), Case(32, 256, 28, True), Case(8, 512, 56),
    Case(8, 512, 56, True),
]  # fmt: skip
DOT = [Case(64, 64, 14), Case(32, 256, 28), Case(8, 512, 56)]
WANTED = {(64, 64, 14): 1.3, (32, 256, 28): 1.3, (8, 512, 56): 0.97}


def ours(x, w, b, wz, bz, *, pooled: bool, save: bool = False):
    (wt, wp, wg), (bt, bp, bg) = w.flatten(1).chunk(3), b.chunk(3)
    weights = triton_block.Projections(wt, wp, wg, wz.flatten(1), bt, bp, bg, bz)
    pool = (2, 2) if pooled else None
    return weights, triton_block.block_forward(x, weights, pool=pool, residual=True, save=save)


def ours_both(x, w, b, wz, bz, grad, *, pooled: bool):
    weights, (_, saved) = ours(x, w, b, wz, bz, pooled=pooled, save=True)
    pool = (2, 2) if pooled else None
    return triton_block.block_backward(grad, x, weights, saved, pool=pool, residual=True)


def gram(x, w, b, wz, bz, *, pooled: bool):
    rows = x.movedim(1, -1).flatten(1, 2)
    (wt, wp, wg), (bt, bp, bg) = w.flatten(1).chunk(3), b.chunk(3)
    n = rows.shape[1]
    total = rows.sum(1)
    product = rows.mT @ rows
    left = wp @ product @ wg.mT + bp[:, None] * (total @ wg.mT)[:, None] + (total @ wp.mT)[:, :, None] * bg
    left = (left / n + bp[:, None] * bg) @ wz.flatten(1).mT
    matrix = wt.mT @ left
    return torch.baddbmm(rows, rows, matrix).add_((bt @ left)[:, None] + bz).unflatten(1, x.shape[2:]).movedim(-1, 1)


def contenders(peers: dict[str, Block], mine: Block, case: Case, backward: bool) -> dict[str, list[Callable[[], object]]]:
    """Closures of every contender, one for each set of inputs."""
    calls: dict[str, list[Callable[[], object]]] = {}
    for _ in range(INPUT_SETS):
        tensors = case.tensors()
        nchw = [tensors[0].detach().contiguous().requires_grad_(), *tensors[1:]]
        grad = torch.randn_like(tensors[0])
        flat = [tensor.detach() for tensor in tensors]
        if backward:
            calls.setdefault("ours", []).append(functools.partial(mine, *flat, grad, pooled=case.pooled))
        else:
            calls.setdefault("ours", []).append(functools.partial(mine, *flat, pooled=case.pooled))
        for name, peer in peers.items():
            inputs = nchw if name.startswith("textbook") else tensors
            run = functools.partial(gradients, peer, inputs, grad, case) if backward else functools.partial(
                inference, peer, [tensor.detach() for tensor in inputs], case
            )
            calls.setdefault(name, []).append(run)
    return calls


def gradients(peer: Block, inputs: Sequence[torch.Tensor], grad: torch.Tensor, case: Case) -> object:
    return torch.autograd.grad(peer(*inputs, pooled=case.pooled), inputs, grad)


def inference(peer: Block, inputs: Sequence[torch.Tensor], case: Case) -> object:
    with torch.no_grad():
        return peer(*inputs, pooled=case.pooled)


def usable(calls: dict[str, list[Callable[[], object]]]) -> dict[str, list[Callable[[], object]]]:
    """Leaves out, and names, a contender that cannot run here."""
    kept = {}
    for name, closures in calls.items():
        try:
            closures[0]()
            torch.cuda.synchronize()
            kept[name] = closures
        except Exception as error:
            print(f"  {name} cannot run: {str(error).splitlines()[0] if str(error) else error!r}"[:200], flush=True)
    return kept


def measure(only: str, compiled: bool) -> list[Row]:
    rows: list[Row] = []
    for case in SOFTMAX:
        for backward in (False, True):
            what = "forward+backward" if backward else "forward"
            if only not in f"softmax {case} {what}":
                continue
            peers = softmax_peers(compiled=compiled)
            calls = usable(contenders(peers, ours_both if backward else ours, case, backward))
            rows += compare(f"softmax {case} {what}", calls, WANTED.get((case.batch, case.channels, case.side)))
            torch._dynamo.reset()
    for case in DOT:
        if only in f"dot {case} forward":
            calls = usable(contenders(dot_peers(compiled=compiled), gram, case, False))
            rows += compare(f"dot {case} forward", calls, 3.0)
            torch._dynamo.reset()
    case = Case(64, 64, 14)
    tensors = [tensor.detach() for tensor in case.tensors()]
    if only in "host overhead":
        call = functools.partial(ours, *tensors, pooled=False)
        call()
        rows.append(Row("host overhead of one call", host_microseconds(call), 15.0, unit="us", at_most=True))
    return rows


def compare(name: str, calls: dict[str, list[Callable[[], object]]], must: float | None) -> list[Row]:
    rows = []
    for replayed in (False, True):
        times = microseconds(calls, replayed=replayed)
        figure, detail = ratio({key: [t / 1e6 for t in value] for key, value in times.items()}, "ours")
        rows.append(Row(f"{name}, {'replayed' if replayed else 'eager'}", figure, must, detail=detail))
        print(rows[-1].name, f"{figure:.2f}", detail, flush=True)
    return rows


def profile(case: Case) -> None:
    """Prints the time of each kernel, ours and the SDPA peer's."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    peers = {"sdpa": softmax_peers(compiled=False)["sdpa"]}
    for name, (call, *_) in contenders(peers, ours_both, case, True).items():
        call()
        torch.cuda.synchronize()
        with record(activities=[ProfilerActivity.CUDA]) as trace:
            for _ in range(10):
                call()
            torch.cuda.synchronize()
        print(f"--- {case} {name}: kernels of forward+backward, us")
        for event in sorted(trace.key_averages(), key=lambda e: -e.self_device_time_total)[:14]:
            print(f"  {event.self_device_time_total / 10:8.2f} x{event.count / 10:.1f}  {event.key[:110]}")


def main() -> None:
    warnings.filterwarnings("ignore")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--quick", action="store_true", help="leave out compiled peers")
    parser.add_argument("--only", default="")
    parser.add_argument("--warm", action="store_true", help="first compile everything in parallel processes")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.warm:
        names = [f"softmax {c} {w}" for c in SOFTMAX for w in ("forward", "forward+backward")]
        names = [n for n in [*names, *(f"dot {c} forward" for c in DOT)] if options.only in n]
        run = [sys.executable, __file__, "--only"]
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        processes = [subprocess.Popen([*run, name], stdout=subprocess.DEVNULL, env=environment) for name in names]
        for process in processes:
            process.wait()
    rows = measure(options.only, not options.quick)
    if options.profile:
        for case in SOFTMAX[:4]:
            profile(case)
    _show(__doc__ or "", rows)
    if options.json:
        import dataclasses

        import triton

        record = {**_environment(), "triton": triton.__version__, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(1 if options.check and not all(row.holds() for row in rows) else 0)


if __name__ == "__main__":
    main()
