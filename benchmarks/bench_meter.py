"""Whether a measured cost can be trusted: the same networks twice, in separate processes, in shuffled order.

On a CPU: latency of 40 ``macro-cnn`` networks with the meter's default settings.  On a GPU also the latency
of the replayed graph, and energy in windows of 5 s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import harness
import numpy as np

NETWORKS = 40
QUICK_NETWORKS = 12
QUANTITIES = ("latency_s", "graph_latency_s", "energy_j")


def measure(quick: bool) -> list[harness.Row]:
    """Median and 90th percentile of the relative differences between two processes."""
    import torch

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    count = QUICK_NETWORKS if quick else NETWORKS
    first, second = (_in_a_process(device, count, order) for order in (1, 2))
    rows = []
    for name in QUANTITIES:
        pairs = [(first[i].get(name), second[i].get(name)) for i in range(count)]
        known = [(a, b) for a, b in pairs if a is not None and b is not None]
        if not known:
            continue
        differences = [abs(a / b - 1) * 100 for a, b in known]
        median_must, tail_must = _musts(device, name)
        detail = f"{len(known)} networks, {min(a for a, _ in known):.3g} to {max(a for a, _ in known):.3g}"
        figures = (
            (f"{device} {name}: median difference", statistics.median(differences), median_must),
            (f"{device} {name}: 90th percentile", float(np.percentile(differences, 90)), tail_must),
        )
        rows += [
            harness.Row(label, figure, must=must, unit="%", at_most=True, detail=detail)
            for label, figure, must in figures
        ]
    return rows


def _musts(device: str, name: str) -> tuple[float | None, float | None]:
    if device == "cpu":
        return 5.0, 10.0
    if name == "latency_s":  # of networks this small it is the host's time to launch them
        return None, None
    return (3.0, 9.0) if name == "energy_j" else (1.0, 3.0)


def _in_a_process(device: str, count: int, order: int) -> list[dict[str, float]]:
    command = [sys.executable, __file__, "--measure-pass", device, str(count), str(order)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured: list[dict[str, float]] = json.loads(output.splitlines()[-1])
    return measured


def _measure_pass(device: str, count: int, order: int) -> list[dict[str, float | None]]:
    """Costs of the same networks, measured in an order of this process's own."""
    import torch

    from rlnas_fast.hardware import meter_for
    from rlnas_fast.hardware.cuda_events import CudaEventMeter

    if device == "cpu":
        torch.set_num_threads(1)
    calls = _networks(device, count)
    sequence = list(range(count))
    random.Random(order).shuffle(sequence)
    costs: list[dict[str, float | None]] = [{} for _ in range(count)]
    for index in sequence:
        costs[index]["latency_s"] = meter_for(device).measure(calls[index]).latency_s
        if device != "cpu":
            seconds = 5.0 if index < count // 6 else None  # energy takes its time: one network in six
            cost = CudaEventMeter(device, graph=True, energy_seconds=seconds).measure(calls[index])
            costs[index] |= {"graph_latency_s": cost.latency_s, "energy_j": cost.energy_j}
            if seconds:
                print(f"network {index}: {'; '.join(cost.caveats) or 'no caveats'}", file=sys.stderr)
    return costs


def _networks(device: str, count: int) -> list[Callable[[], Any]]:
    import torch

    from rlnas_fast.search import TaskSpec, sample_uniform
    from rlnas_fast.spaces.macro_cnn import MacroCNN

    spec = TaskSpec((3, 32, 32), 10)
    space = MacroCNN(spec)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)

    def forward(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
        def call() -> None:
            with torch.inference_mode():
                module(x)

        return call

    calls = []
    for _ in range(count):
        module = space.build(sample_uniform(space, rng), spec).eval().to(device)
        calls.append(forward(module, torch.randn(8, *spec.input_shape, device=device)))
    return calls


if __name__ == "__main__":
    if "--measure-pass" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--measure-pass", nargs=3)
        device, count, order = parser.parse_args().measure_pass
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        print(json.dumps(_measure_pass(device, int(count), int(order))))
    else:
        harness.main(__doc__ or "", measure, processes=1)
