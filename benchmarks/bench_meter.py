"""Whether a measured cost can be trusted: the same networks twice, in separate processes, in shuffled order.

Latency of 40 ``macro-cnn`` networks, as a search measures it: on a CPU the call, on a GPU the replayed graph.
On a GPU also the eager latency, which is the host's time to launch and has no bound here, and energy in
windows of 5 s.  Then a latency table of the space, made in a third process from other networks: how far off
its estimates are for these 40.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np

NETWORKS = 40
QUICK_NETWORKS = 12
QUANTITIES = ("latency_s", "eager_latency_s", "energy_j")
BATCH = 8


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
        if name == "latency_s":
            said = sum(cost["caveats"] for cost in (*first, *second))
            detail += f"; {said:.0f} of {2 * count} measurements came with a caveat"
        figures = (
            (f"{device} {name}: median difference", statistics.median(differences), median_must),
            (f"{device} {name}: 90th percentile", float(np.percentile(differences, 90)), tail_must),
        )
        rows += [
            harness.Row(label, figure, must=must, unit="%", at_most=True, detail=detail)
            for label, figure, must in figures
        ]
    return [
        *rows,
        _profile_row(
            device, [(a["latency_s"] + b["latency_s"]) / 2 for a, b in zip(first, second, strict=True)]
        ),
    ]


def _profile_row(device: str, measured_s: list[float]) -> harness.Row:
    """How many of the networks a table that was not fitted on them estimates well."""
    near = 15 if device == "cpu" else 10
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            __file__,
            "--profile-pass",
            device,
            f"{folder}/table.json",
            str(len(measured_s)),
        ]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    off = [
        100 * abs(estimate / took - 1) for estimate, took in zip(found["estimates"], measured_s, strict=True)
    ]
    return harness.Row(
        f"{device} profile: networks estimated within {near} %",
        100 * statistics.fmean(share <= near for share in off),
        must=90.0,
        unit="%",
        detail=f"off by {statistics.median(off):.1f} % (median), {max(off):.1f} % (most); "
        f"the table says {100 * found['error']:.1f} %",
    )


def _profile_pass(device: str, file: str, count: int) -> dict[str, Any]:
    """A table made, saved, read again, and what it says of the networks that the other passes measure."""
    import torch

    from rlnas_fast.costs import quick_meter
    from rlnas_fast.hardware import meter_for
    from rlnas_fast.hardware.identity import device_identity
    from rlnas_fast.hardware.latency_table import Conditions, LatencyTable, make_table

    if device == "cpu":
        torch.set_num_threads(1)
    spec, space, architectures = _drawn(count)
    conditions = Conditions("macro-cnn", device_identity(device), BATCH)
    meters = meter_for(device), quick_meter(device)
    make_table(space, spec, conditions, *meters, seed=1, device=device).save(Path(file))
    table = LatencyTable.load(Path(file)).of(space, spec)
    estimates = [table.estimate(architecture.choices)["latency_s"] for architecture in architectures]
    return {"estimates": estimates, "error": table.error}


def _musts(device: str, name: str) -> tuple[float | None, float | None]:
    if device == "cpu":
        return 5.0, 10.0
    if name == "energy_j":
        return 3.0, None
    return (1.0, 3.0) if name == "latency_s" else (None, None)


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
        cost = meter_for(device).measure(calls[index])
        costs[index] |= {"latency_s": cost.latency_s, "caveats": float(bool(cost.caveats))}
        if device != "cpu":
            costs[index]["eager_latency_s"] = CudaEventMeter(device).measure(calls[index]).latency_s
            if index < count // 6:  # energy takes its time: one network in six
                cost = CudaEventMeter(device, graph=True, energy_seconds=5.0).measure(calls[index])
                costs[index]["energy_j"] = cost.energy_j
                print(f"network {index}: {'; '.join(cost.caveats) or 'no caveats'}", file=sys.stderr)
    return costs


def _networks(device: str, count: int) -> list[Callable[[], Any]]:
    import torch

    from rlnas_fast.hardware.latency_table import built

    spec, space, architectures = _drawn(count)
    torch.manual_seed(0)

    def forward(module: torch.nn.Module, x: torch.Tensor) -> Callable[[], Any]:
        def call() -> None:
            with torch.inference_mode():
                module(x)

        return call

    calls = []
    for architecture in architectures:
        module = built(space, architecture, spec).to(device)
        calls.append(forward(module, torch.randn(BATCH, *spec.input_shape, device=device)))
    return calls


def _drawn(count: int) -> tuple[Any, Any, list[Any]]:
    from rlnas_fast.search import TaskSpec, sample_uniform
    from rlnas_fast.spaces.macro_cnn import MacroCNN

    spec = TaskSpec((3, 32, 32), 10)
    space = MacroCNN(spec)
    rng = np.random.default_rng(0)
    return spec, space, [sample_uniform(space, rng) for _ in range(count)]


if __name__ == "__main__":
    if "--measure-pass" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--measure-pass", nargs=3)
        device, count, order = parser.parse_args().measure_pass
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        print(json.dumps(_measure_pass(device, int(count), int(order))))
    elif "--profile-pass" in sys.argv:
        parser = argparse.ArgumentParser()
        parser.add_argument("--profile-pass", nargs=3)
        device, file, count = parser.parse_args().profile_pass
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        print(json.dumps(_profile_pass(device, file, int(count))))
    else:
        harness.main(__doc__ or "", measure, processes=1)
