"""From a validated configuration to the parts of a running search."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from . import search
from .components import (
    COMPONENTS,
    PROTOCOLS,
    Component,
    check_options,
    find,
    is_made,
    make,
    options_of,
)
from .config import SearchConfig
from .errors import ConfigError
from .search import rewards

if TYPE_CHECKING:
    from .hardware.latency_table import LatencyTable

TABLE_SPEC = search.TaskSpec((3, 32, 32), 10)  # a table needs no data; its networks were trained on CIFAR


@dataclass(frozen=True)
class Parts:
    """A search ready to run; ``config`` has the defaults that depend on the other parts filled in."""

    config: SearchConfig
    task_spec: search.TaskSpec
    space: search.SearchSpace
    strategy: search.Strategy
    reward: search.Reward
    evaluator: search.Evaluator
    executor: search.Executor
    cost_model: LatencyTable | None = None


def build(config: SearchConfig, objects: Mapping[str, Any] | None = None) -> Parts:
    """Composes a search.  ``objects`` (by kind) take the place of what the configuration names."""
    given = dict(objects or {})
    tabular = config.evaluator.name == "tabular" and "evaluator" not in given
    task = None if tabular else given.get("task") or make("task", config.task)
    task_spec = TABLE_SPEC if task is None else task.spec
    space = _part("space", given, config.space, task_spec)
    config = _with_goal_defaults(config, given)
    strategy = _strategy(config, given, space)
    if config.targets and not getattr(strategy, "conditioned", False):
        raise ConfigError(
            f"targets = {', '.join(f'{t:g}' for t in config.targets)}: strategy {config.strategy.name!r} "
            "cannot be told a target; use composite, reinforce or ppo, or one --target-latency-ms"
        )
    devices = ["cpu"] if tabular else [resolve_device(name) for name in config.devices or (config.device,)]
    if "evaluator" in given or config.evaluator.name != "train-child":
        evaluator = _part("evaluator", given, config.evaluator, space, task)
    else:
        evaluator = _train_child(config, space, task, devices[0])
    if config.reward is None:
        name = "soft" if "latency_s" in _provided(evaluator) else "accuracy"
        config = config.model_copy(update={"reward": Component(name=name)})
    reward = _reward(config, given)
    _check_needs(reward, evaluator)
    executor = _executor(config, devices)
    if config.cost_model is None:
        return Parts(config, task_spec, space, strategy, reward, evaluator, executor)
    from .costs import cost_model

    table = cost_model(config, space, task_spec, devices)
    return Parts(config, task_spec, space, strategy, reward, evaluator, executor, table)


def resolve_device(name: str) -> str:
    """Turns "auto" into the device it stands for, and checks that any other is here."""
    import torch

    if name == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is not a device: use cpu, cuda:0 or auto") from error
    here = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
    if (device.index or 0) >= here:
        raise ConfigError(f"device {name!r} is not here ({here} of type {device.type}): use cpu or auto")
    return f"cuda:{device.index or 0}" if device.type == "cuda" else "cpu"


def _part(kind: str, given: Mapping[str, Any], component: Component, *arguments: Any, **fixed: Any) -> Any:
    part = given[kind] if kind in given else make(kind, component, *arguments, **fixed)
    if inspect.isclass(part) or (kind in given and not is_made(kind, part) and callable(part)):
        part = part(*arguments, **fixed)
    absent = [name for name in _members(PROTOCOLS[kind]) if not hasattr(part, name)]
    if absent:
        raise ConfigError(
            f"{kind} {type(part).__name__} lacks {', '.join(absent)}: see rlnas_fast.search for the interface"
        )
    return part


def _members(protocol: type) -> list[str]:
    return sorted(name for name in vars(protocol) if not name.startswith("_"))


def _strategy(config: SearchConfig, given: Mapping[str, Any], space: search.SearchSpace) -> search.Strategy:
    """The strategy, within the exploration if there is one."""

    def inner(part_of: search.SearchSpace) -> search.Strategy:
        component = _with_objectives("strategy", config)
        made: search.Strategy = _part("strategy", given, component, part_of, seed=config.seed)
        return made

    if config.exploration is None:
        return inner(space)
    if "strategy" in given and is_made("strategy", given["strategy"]):
        raise ConfigError(
            f"exploration {config.exploration.name!r} needs a strategy that can be made for it: give a "
            "class or a name, not an object"
        )
    explored: search.Strategy = make("exploration", config.exploration, space, inner, seed=config.seed)
    return explored


def _reward(config: SearchConfig, given: Mapping[str, Any]) -> search.Reward:
    component = _with_objectives("reward", config)
    assert component is not None
    if config.target_latency_ms is not None:
        if "reward" in given or "target" not in options_of(find("reward", component.name)):
            raise ConfigError(
                f"reward {component.name!r} takes no target: "
                "use adaptive, soft, hard or absolute with --target-latency-ms"
            )
        component = _with_options(component, target=config.target_latency_ms / 1e3)
    if config.targets:
        if "reward" in given or "targets" not in options_of(find("reward", component.name)):
            raise ConfigError(f"reward {component.name!r} takes one target at most: use adaptive")
        component = _with_options(component, targets=config.targets_s)
    reward: search.Reward = _part("reward", given, component)
    return rewards.limited(reward, config.limits) if config.limits else reward


def _with_goal_defaults(config: SearchConfig, given: Mapping[str, Any]) -> SearchConfig:
    """With the reward, and the strategy where none was named, that serve targets and objectives."""
    if not (config.targets_s or config.objectives):
        return config
    update = {}
    if "robustness" in config.objectives and config.evaluator.name == "train-child":
        update["evaluator"] = _with_options(
            config.evaluator, **{"robustness": "noise", **config.evaluator.options}
        )
    if config.reward is None:
        update["reward"] = Component(name="adaptive" if config.targets_s else "hypervolume-gain")
    if "strategy" not in config.model_fields_set and "strategy" not in given:
        update["strategy"] = Component(name="composite")
    return config.model_copy(update=update)


def _with_objectives(kind: str, config: SearchConfig) -> Component:
    """The component named for ``kind``, told the objectives of the search if it takes any."""
    component: Component = getattr(config, kind)
    if not config.objectives or (component.name not in COMPONENTS[kind] and ":" not in component.name):
        return component
    factory = find(kind, component.name)
    takes = callable(factory) and "objectives" in options_of(factory)
    return _with_options(component, objectives=config.objective_numbers) if takes else component


def _executor(config: SearchConfig, devices: list[str]) -> search.Executor:
    """In this process, or in workers where there are several, or limits that only a process can keep."""
    from .executors.process_pool import ProcessPool
    from .executors.serial import Serial

    workers = max(config.workers, len(devices))
    if workers == 1 and config.child_timeout_seconds is None and config.child_memory_bytes is None:
        return Serial()
    return ProcessPool(
        workers,
        devices=devices,
        threads_per_worker=config.threads,
        timeout_seconds=config.child_timeout_seconds,
        memory_limit_bytes=config.child_memory_bytes,
    )


def _with_options(component: Component, **options: Any) -> Component:
    return component.model_copy(update={"options": component.options | options})


def _train_child(config: SearchConfig, space: Any, task: Any, device: str) -> search.Evaluator:
    from .evaluators.train_child import TrainChild
    from .hardware import meter_for
    from .hardware.exclusion import training
    from .hardware.identity import device_identity
    from .training.recipe import Recipe

    if not hasattr(space, "build"):
        raise ConfigError(f"space {space.name!r} cannot be trained: it has no build(architecture, task_spec)")
    options = check_options(
        "evaluator 'train-child'", TrainChild, config.evaluator.options, skip=6,
        fixed=dict.fromkeys(("turn", "environment")),
    )  # fmt: skip
    trainer: search.Evaluator = TrainChild(
        space,
        task,
        Recipe(**check_options("recipe", Recipe, config.recipe)),
        device,
        meter_for(device, energy=_asks_for_energy(config))
        if config.meter is None
        else make("meter", config.meter),
        config.threads,
        turn=training,
        environment=device_identity(device),
        **options,
    )
    return trainer


def _asks_for_energy(config: SearchConfig) -> bool:
    """Whether a limit, an objective, or an option of the reward is the energy."""
    options = config.reward.options.values() if config.reward else ()
    return "energy_j" in (*config.limits, *config.objective_numbers, *options)


def _provided(evaluator: search.Evaluator) -> tuple[str, ...]:
    """What the evaluator says it measures; nothing where it does not say."""
    return tuple(evaluator.provides()) if hasattr(evaluator, "provides") else ()


def _check_needs(reward: search.Reward, evaluator: search.Evaluator) -> None:
    """Refuses to start where the evaluator says what it measures and something needed is not in it."""
    provided = _provided(evaluator)
    absent = [name for name in reward.needs if name not in provided]
    if provided and absent:
        raise ConfigError(
            f"the reward needs {absent[0]!r}, which cannot be measured here; choose another reward or cost "
            f"(this evaluator measures {', '.join(sorted(provided))})"
        )
