"""What a search may know of hardware costs before it trains anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from .components import make
from .compose import Parts, resolve_device
from .config import SearchConfig
from .errors import ConfigError
from .evaluators.train_child import settings_of
from .hardware import meter_for
from .hardware.identity import device_identity
from .hardware.latency_table import Conditions, LatencyTable, LayeredSpace, make_table, network_cost
from .search import SearchSpace, TaskSpec

FASTER = 0.8  # a limit below this share of the cheapest network's latency is taken to be out of reach


def cost_model(
    config: SearchConfig, space: SearchSpace, task_spec: TaskSpec, devices: list[str]
) -> LatencyTable:
    """The table that ``config.cost_model`` names, for this space on each of these devices.

    Raises:
        ConfigError: the file is not such a table, or was made for other conditions; says which.
    """
    assert config.cost_model is not None
    if config.evaluator.name == "tabular":
        raise ConfigError("cost_model: a tabular search looks its costs up; leave --cost-model out")
    if config.recipe.get("dtype", "float32") != "float32":
        raise ConfigError("cost_model: tables are made in float32, the recipe asks for another dtype")
    table = LatencyTable.load(config.cost_model)
    for device in devices:
        table.conditions.refuse(_conditions(config, space, device), str(config.cost_model))
    return table.of(cast(LayeredSpace, space), task_spec)


def profile(config: SearchConfig, on_step: Any = lambda what, done, total: None) -> LatencyTable:
    """Measures a table for the configuration's space, task, device and threads."""
    import torch

    task_spec = make("task", config.task).spec
    space = make("space", config.space, task_spec)
    device = resolve_device(config.device)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        return make_table(
            space,
            task_spec,
            _conditions(config, space, device),
            meter_for(device),
            quick_meter(device),
            seed=config.seed,
            device=device,
            on_step=on_step,
        )
    finally:
        torch.set_num_threads(before)


def check_reachable(parts: Parts) -> None:
    """Refuses a latency limit or target that the space's cheapest network misses by far on this device.

    Where the space cannot say which network is cheapest, or costs are not measured here, the search itself
    has to find out.
    """
    config = parts.config
    asked_ms = [("max_latency_ms", config.max_latency_ms), ("target_latency_ms", config.target_latency_ms)]
    asked_ms += [("targets", value) for value in config.targets]
    given = [(value, name) for name, value in asked_ms if value is not None]
    measured = config.evaluator.name == "train-child" and config.meter is None
    if not (given and measured and hasattr(parts.space, "cheapest") and hasattr(parts.space, "build")):
        return
    least_ms, name = min(given)
    device = resolve_device(config.devices[0] if config.devices else config.device)
    took_ms = float("inf")
    for _ in range(3):  # a machine that was busy with something else is asked again
        took_ms = min(took_ms, 1e3 * _cheapest_s(parts, device))
        if least_ms >= FASTER * took_ms:
            return
    raise ConfigError(
        f"{name} = {least_ms:g}: the cheapest network of {parts.space.name} takes {took_ms:.3g} ms on this "
        "device; give more, or another space"
    )


def _cheapest_s(parts: Parts, device: str) -> float:
    """Seconds of the space's cheapest network, as fast as it gets: the 10th percentile."""
    import torch

    config, space = parts.config, cast(LayeredSpace, parts.space)
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        batch = int(config.evaluator.options.get("latency_batch", 1))
        cost = network_cost(space, space.cheapest(()), parts.task_spec, meter_for(device), batch, device)
    finally:
        torch.set_num_threads(before)
    seconds = cost.latency_low_s or cost.latency_s
    assert seconds is not None
    return seconds


def _conditions(config: SearchConfig, space: SearchSpace, device: str) -> Conditions:
    identity = device_identity(device)
    if "threads" in identity:
        identity["threads"] = str(config.threads)
    return Conditions(settings_of(space), identity, int(config.evaluator.options.get("latency_batch", 1)))


def quick_meter(device: str) -> Any:
    """A meter for operators, of which there are hundreds."""
    if device == "cpu":
        from .hardware.wall_clock import WallClockMeter

        return WallClockMeter(warmup_seconds=0.005, seconds=0.015)
    from .hardware.cuda_events import CudaEventMeter

    return CudaEventMeter(device, graph=True, warmup_seconds=0.01, seconds=0.02)


def default_file(config: SearchConfig) -> Path:
    """Where a table goes that is given no name."""
    kind = resolve_device(config.device).partition(":")[0]
    return Path(f"{config.space.name.replace(':', '-')}-{kind}.json")
