"""What a network costs on this machine, for a terminal or as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..components import network_of
from ..compose import resolve_device
from ..errors import ConfigError
from ..hardware.measure import Latency, ModuleCost, measure_module
from ..networks import NETWORKS
from ..runs import load_child, read_best, saved_config
from ..search import TaskSpec

CLASSES = 10  # of a network that has a name and no task
DTYPES = ("float32", "bfloat16", "float16")


def measure_network(
    network: str, *, shape: tuple[int, ...] | None, batch: int, dtype: str, device: str, as_json: bool
) -> None:
    """Measures the winner of a run folder, one of our networks, or what ``module:attribute`` makes."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}: use one of {', '.join(DTYPES)}")
    if batch < 1:
        raise ConfigError(f"batch = {batch}: give at least 1")
    if shape is not None and min(shape) < 1:
        raise ConfigError(f"--shape {','.join(map(str, shape))}: give sizes of at least 1")
    module, shape = _load(network, shape)
    kind = getattr(torch, dtype)
    where = resolve_device(device)
    cost = measure_module(module.to(kind), torch.randn(batch, *shape).to(kind), where)
    if as_json:
        print(json.dumps(asdict(cost), indent=2))
    else:
        _print(cost)


def _load(network: str, shape: tuple[int, ...] | None) -> tuple[nn.Module, tuple[int, ...]]:
    if Path(network).is_dir():
        module = load_child(network).to(memory_format=torch.channels_last)
        torch.set_num_threads(saved_config(Path(network)).threads)  # both as the search measured it
        return module, shape or tuple(read_best(Path(network))["task_spec"]["input_shape"])

    if ":" not in network and network not in NETWORKS:
        raise ConfigError(
            f"{network} is no run folder and no network of ours ({', '.join(NETWORKS)}); "
            "name one, or write module:attribute for a network of your own"
        )
    if shape is None:
        raise ConfigError(f"{network} does not say what it takes: give --shape, e.g. --shape 3,32,32")
    return network_of(network, TaskSpec(shape, CLASSES)), shape


def _print(cost: ModuleCost) -> None:
    table = Table("", "measured", "", title=f"{_device(cost)}, batch {cost.batch}, {cost.dtype}")
    table.columns[1].justify = "right"
    for name, latency in (("latency, eager", cost.eager), ("latency, replayed graph", cost.graph)):
        if latency is not None:
            table.add_row(name, f"{latency.median_s * 1e3:.4f} ms", _spread(latency))
    table.add_row("throughput", f"{cost.throughput_per_s:,.0f} /s", "samples")
    if cost.energy_j is not None:
        table.add_row("energy", f"{cost.energy_j * 1e3:.4f} mJ", "a sample, above idle")
    if cost.power_w is not None and cost.idle_power_w is not None:
        table.add_row("power", f"{cost.power_w:.1f} W", f"idle {cost.idle_power_w:.1f} W")
    if cost.peak_memory_bytes is not None:
        table.add_row("peak memory", f"{cost.peak_memory_bytes / 2**20:.2f} MiB", "")
    if cost.clock_mhz is not None:
        table.add_row("clock", f"{cost.clock_mhz} MHz", "")
    table.add_row("FLOPs", f"{cost.flops:,}", "a sample; a multiply-add is two")
    table.add_row("parameters", f"{cost.parameters:,}", "")
    console = Console(emoji=False, markup=False)
    console.print(table)
    for name, reason in cost.unknown.items():
        console.print(f"unknown: {name.removesuffix('_j')}: {reason}", highlight=False)
    for caveat in cost.caveats:
        console.print(f"caveat: {caveat}", highlight=False)


def _device(cost: ModuleCost) -> str:
    threads = cost.device.get("threads")
    name = cost.device.get("name", "")
    return name if threads is None else f"{name}, {threads} thread{'s' * (threads != '1')}"


def _spread(latency: Latency) -> str:
    low, high = (bound * 1e3 for bound in latency.interval_s)
    return f"95 % {low:.4f} to {high:.4f}; p10 {latency.p10_s * 1e3:.4f}, p90 {latency.p90_s * 1e3:.4f}"
