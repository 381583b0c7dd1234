"""The whole non-local block on a GPU against every peer: eager and graph-replayed, forward and with backward.

``--check`` compares with what is wanted on an H200; ``--only TEXT`` keeps the cases whose name contains it.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
from harness import Row, _environment, _show, ratio
from nonlocal_attention_gpu_peers import (
    Block,
    Case,
    dot_peers,
    host_microseconds,
    microseconds,
    softmax_peers,
)

from rlnas_fast.ops.nonlocal_attention import nonlocal_block

INPUT_SETS = 4
# In complete runs one of these was the fastest peer of every row.
LEADERS = {
    "sdpa_linear", "sdpa_linear compiled", "flex compiled", "softmax_product compiled", "wide",
    "wide compiled",
}  # fmt: skip
SOFTMAX = [
    Case(64, 64, 14), Case(64, 64, 14, True), Case(32, 256, 28), Case(32, 256, 28, True), Case(8, 512, 56),
    Case(8, 512, 56, True),
]  # fmt: skip
DOT = [Case(64, 64, 14), Case(32, 256, 28), Case(8, 512, 56)]
WANTED = {(64, 64, 14): 1.3, (32, 256, 28): 1.3, (8, 512, 56): 0.97}


def ours(x, theta, phi, g, out, *biases, kind: str, pooled: bool) -> torch.Tensor:
    return nonlocal_block(x, theta, phi, g, out, biases=biases, kind=kind, pool=2 if pooled else None)


def separate(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """A peer's wide weights as the four of the block, each a leaf."""
    x, w, b, wz, bz = (tensor.detach() for tensor in tensors)
    pieces = [*w.flatten(1).chunk(3), wz.flatten(1), *b.chunk(3), bz]
    return [x.requires_grad_(), *(piece.clone().requires_grad_() for piece in pieces)]


def contenders(
    peers: dict[str, Block], kind: str, case: Case, backward: bool
) -> dict[str, list[Callable[[], object]]]:
    """Closures of every contender, one for each set of inputs."""
    calls: dict[str, list[Callable[[], object]]] = {}
    mine = functools.partial(ours, kind=kind)
    for _ in range(INPUT_SETS):
        tensors = case.tensors()
        nchw = [tensors[0].detach().contiguous().requires_grad_(), *tensors[1:]]
        grad = torch.randn_like(tensors[0])
        for name, peer in {"ours": mine, **peers}.items():
            inputs = separate(tensors) if name == "ours" else nchw if name.startswith("textbook") else tensors
            run = (
                functools.partial(gradients, peer, inputs, grad, case)
                if backward
                else functools.partial(inference, peer, [tensor.detach() for tensor in inputs], case)
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
            print(
                f"  {name} cannot run: {str(error).splitlines()[0] if str(error) else error!r}"[:200],
                flush=True,
            )
    return kept


def measure(only: str, compiled: bool, leaders: bool, keep: Callable[[list[Row]], None]) -> list[Row]:
    """Measures every row; ``keep`` gets the rows so far, so that an interrupted run leaves some."""
    rows: list[Row] = []

    def chosen(peers: dict[str, Block]) -> dict[str, Block]:
        return {name: peer for name, peer in peers.items() if not leaders or name in LEADERS}

    for case in SOFTMAX:
        for backward in (False, True):
            what = "forward+backward" if backward else "forward"
            if only not in f"softmax {case} {what}":
                continue
            peers = chosen(softmax_peers(compiled=compiled))
            calls = usable(contenders(peers, "embedded_gaussian", case, backward))
            rows += compare(
                f"softmax {case} {what}", calls, WANTED.get((case.batch, case.channels, case.side))
            )
            torch._dynamo.reset()
            keep(rows)
    for case in DOT:
        for backward in (False, True):
            what = "forward+backward" if backward else "forward"
            if only in f"dot {case} {what}":
                calls = usable(
                    contenders(chosen(dot_peers(compiled=compiled)), "dot_product", case, backward)
                )
                rows += compare(f"dot {case} {what}", calls, 3.0)
                torch._dynamo.reset()
                keep(rows)
    if only in "host overhead":
        tensors = [tensor.detach() for tensor in separate(Case(64, 64, 14).tensors())]
        call = functools.partial(ours, *tensors, kind="embedded_gaussian", pooled=False)
        with torch.no_grad():
            call()
            rows.append(
                Row("host overhead of one call", host_microseconds(call), 15.0, unit="us", at_most=True)
            )
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
    for name, (call, *_) in contenders(peers, "embedded_gaussian", case, True).items():
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
    parser.add_argument("--leaders", action="store_true", help="only the peers that have ever been fastest")
    parser.add_argument("--warm", action="store_true", help="first compile everything in parallel processes")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.warm:
        names = [f"softmax {c} {w}" for c in SOFTMAX for w in ("forward", "forward+backward")]
        names += [f"dot {c} {w}" for c in DOT for w in ("forward", "forward+backward")]
        names = [name for name in names if options.only in name]
        run = [sys.executable, __file__, *(["--leaders"] if options.leaders else []), "--only"]
        environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        processes = [
            subprocess.Popen([*run, name], stdout=subprocess.DEVNULL, env=environment) for name in names
        ]
        for process in processes:
            process.wait()

    def keep(rows: list[Row]) -> None:
        if options.json:
            figures = [dataclasses.asdict(row) for row in rows]
            record = {**_environment(), "triton": triton.__version__, "rows": figures}
            options.json.write_text(json.dumps(record, indent=1) + "\n")

    rows = measure(options.only, not options.quick, options.leaders, keep)
    keep(rows)
    if options.profile:
        for case in SOFTMAX[:4]:
            profile(case)
    _show(__doc__ or "", rows)
    sys.exit(1 if options.check and not all(row.holds() for row in rows) else 0)


if __name__ == "__main__":
    main()
