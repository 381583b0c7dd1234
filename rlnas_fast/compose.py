"""From a validated configuration to the parts of a running search; the only list of what exists.

A component is named by its line in ``COMPONENTS`` or as ``module:attribute`` (the user's own), and its
options are checked against the signature of what the name stands for.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from . import search
from .errors import ConfigError, unknown_name
from .search import rewards

if TYPE_CHECKING:
    from torch import nn

    from .hardware.latency_table import LatencyTable

COMPONENTS: dict[str, dict[str, str]] = {
    "space": {
        "chain-cnn": "rlnas_fast.spaces.chain_cnn:ChainCNN",
        "macro-cnn": "rlnas_fast.spaces.macro_cnn:MacroCNN",
        "cell-201": "rlnas_fast.spaces.cell_201:Cell201",
        "nasbench-macro": "rlnas_fast.spaces.nasbench_macro:NasBenchMacro",
    },
    "task": {
        "digits": "rlnas_fast.tasks.digits:digits",
        "npz": "rlnas_fast.tasks.npz:npz",
        "mnist": "rlnas_fast.tasks.named:mnist",
        "fashion-mnist": "rlnas_fast.tasks.named:fashion_mnist",
        "cifar10": "rlnas_fast.tasks.named:cifar10",
        "cifar10-jpeg": "rlnas_fast.tasks.named:cifar10_jpeg",
    },
    "strategy": {
        "random": "rlnas_fast.strategies.random:RandomSearch",
        "reinforce": "rlnas_fast.strategies.reinforce:Reinforce",
        "ppo": "rlnas_fast.strategies.ppo:PPO",
        "trpo": "rlnas_fast.strategies.trpo:TRPO",
        "a3c": "rlnas_fast.strategies.a3c:A3C",
        "sac": "rlnas_fast.strategies.sac:SAC",
        "q-learning": "rlnas_fast.strategies.q_learning:QLearning",
        "dqn": "rlnas_fast.strategies.dqn:DQN",
        "bandit": "rlnas_fast.strategies.bandit:Bandit",
        "model-based": "rlnas_fast.strategies.model_based:ModelBased",
        "evolution": "rlnas_fast.strategies.evolution:Evolution",
        "local-search": "rlnas_fast.strategies.local_search:LocalSearch",
        "composite": "rlnas_fast.strategies.composite:Composite",
        "nsga2": "rlnas_fast.strategies.nsga2:Nsga2",
        "sb3:maskable-ppo": "rlnas_fast.strategies.sb3:maskable_ppo",
        "sb3:ppo": "rlnas_fast.strategies.sb3:ppo",
        "sb3:a2c": "rlnas_fast.strategies.sb3:a2c",
        "sb3:dqn": "rlnas_fast.strategies.sb3:dqn",
    },
    "exploration": {
        "curriculum": "rlnas_fast.strategies.curriculum:Curriculum",
        "bandit": "rlnas_fast.strategies.bandit_exploration:BanditExploration",
    },
    "reward": {
        "accuracy": "rlnas_fast.search.rewards:accuracy",
        "soft": "rlnas_fast.search.rewards:soft",
        "hard": "rlnas_fast.search.rewards:hard",
        "absolute": "rlnas_fast.search.rewards:absolute",
        "size-penalty": "rlnas_fast.search.rewards:size_penalty",
        "weighted-sum": "rlnas_fast.search.rewards:weighted_sum",
        "constrained": "rlnas_fast.search.rewards:constrained",
        "adaptive": "rlnas_fast.search.goals:adaptive",
        "hypervolume-gain": "rlnas_fast.search.goals:hypervolume_gain",
        "random-scalarisation": "rlnas_fast.search.goals:random_scalarisation",
    },
    "evaluator": {
        "train-child": "rlnas_fast.evaluators.train_child:TrainChild",
        "tabular": "rlnas_fast.evaluators.tabular:Tabular",
    },
    "meter": {
        "wall-clock": "rlnas_fast.hardware.wall_clock:WallClockMeter",
        "cuda-events": "rlnas_fast.hardware.cuda_events:CudaEventMeter",
        "replay": "rlnas_fast.hardware.replay:ReplayMeter",
    },
}

LIMITS = {
    "max_latency_ms": ("latency_s", 1e-3),
    "max_energy_mj": ("energy_j", 1e-3),
    "max_params": ("parameters", 1.0),
    "max_flops": ("flops", 1.0),
}

OBJECTIVES = {
    "accuracy": "accuracy",
    "latency": "latency_s",
    "energy": "energy_j",
    "memory": "peak_memory_bytes",
    "params": "parameters",
    "flops": "flops",
    "robustness": "robust_accuracy",
}

TABLE_SPEC = search.TaskSpec((3, 32, 32), 10)  # a table needs no data; its networks were trained on CIFAR

PROTOCOLS: dict[str, type] = {
    "space": search.SearchSpace,
    "strategy": search.Strategy,
    "reward": search.Reward,
    "evaluator": search.Evaluator,
    "meter": search.Meter,
}


class Component(BaseModel):
    """A name and the options that go with it; in TOML a string, or a table with ``name``."""

    model_config = ConfigDict(frozen=True)
    name: str
    options: dict[str, Any] = {}


def _component(value: Any) -> Any:
    if isinstance(value, str):
        return Component(name=value)
    if isinstance(value, Mapping):
        options = dict(value)
        name, further = options.pop("name", None), options.pop("options", {})
        return {"name": name, "options": {**further, **options} if isinstance(further, Mapping) else further}
    return value


Named = Annotated[Component, BeforeValidator(_component)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SearchConfig(BaseModel):
    """Everything a search depends on.  Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    space: Named = Component(name="chain-cnn")
    task: Named = Component(name="digits")
    strategy: Named = Component(name="model-based")
    exploration: Named | None = None  # what surrounds the strategy; policies have options of their own
    # adaptive with targets, hypervolume-gain with objectives, else soft or, without latency, accuracy
    reward: Named | None = None
    evaluator: Named = Component(name="train-child")
    meter: Named | None = None  # that of the device
    recipe: dict[str, Any] = {}
    trials: Annotated[int, Field(ge=1)] = 24
    batch_size: Annotated[int, Field(ge=1)] = 6
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    epochs: Annotated[int, Field(ge=1)] = 20
    child_seconds: Positive | None = None
    device: str = "auto"
    devices: tuple[str, ...] = ()
    workers: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] = 1
    child_timeout_seconds: Positive | None = None
    child_memory_bytes: Annotated[int, Field(ge=1)] | None = None
    target_latency_ms: Positive | None = None
    targets: tuple[Positive, ...] = ()  # several target latencies, in milliseconds
    objectives: tuple[str, ...] = ()
    max_latency_ms: Positive | None = None
    max_energy_mj: Positive | None = None  # of one pass, above idle
    max_params: Positive | None = None
    max_flops: Positive | None = None
    max_seconds: Positive | None = None
    confirm: Annotated[int, Field(ge=1)] = 3
    confirm_seeds: Annotated[int, Field(ge=1)] = 2
    confirm_epochs: Annotated[int, Field(ge=1)] | None = None  # twice the epochs
    durability: Literal["crash", "full"] = "crash"
    cache: Path | None = None
    cost_model: Path | None = None  # a latency table that `rlnas profile` made

    @model_validator(mode="after")
    def _sensible(self) -> SearchConfig:
        if self.target_latency_ms and self.max_latency_ms and self.target_latency_ms > self.max_latency_ms:
            raise ValueError(
                f"target_latency_ms = {self.target_latency_ms} is above "
                f"max_latency_ms = {self.max_latency_ms}: "
                "give a target at or below the limit"
            )
        if self.targets and self.target_latency_ms:
            raise ValueError("target_latency_ms and targets were both given: give one of them")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets = {', '.join(map(str, self.targets))}: give each once")
        if self.objectives:
            self._sensible_objectives()
        if self.devices and self.workers not in (1, len(self.devices)):
            raise ValueError(
                f"workers = {self.workers} with {len(self.devices)} devices: each device has one worker"
            )
        return self

    def _sensible_objectives(self) -> None:
        for name in self.objectives:
            if name not in OBJECTIVES:
                raise unknown_name("objective", name, OBJECTIVES)
        if len(self.objectives) < 2 or len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives = {', '.join(self.objectives)}: name at least two, each once")
        if self.targets or self.target_latency_ms:
            raise ValueError(
                "objectives and a target were both given: objectives keep a whole front, a target picks one "
                "point of it; give one of them, or a limit such as max_latency_ms with the objectives"
            )

    @property
    def targets_s(self) -> tuple[float, ...]:
        """The target latencies in seconds, in the order given."""
        one = () if self.target_latency_ms is None else (self.target_latency_ms,)
        return tuple(value / 1e3 for value in (*one, *self.targets))

    @property
    def objective_numbers(self) -> tuple[str, ...]:
        """The objectives by the names of their numbers in a measurement."""
        return tuple(OBJECTIVES[name] for name in self.objectives)

    @property
    def limits(self) -> dict[str, float]:
        """The hard limits by the name of the number they bound, in that number's unit."""
        given = {name: getattr(self, option) for option, (name, _) in LIMITS.items()}
        return {name: given[name] * unit for name, unit in LIMITS.values() if given[name] is not None}


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


def read_config(settings: Mapping[str, Any], file: Path | None = None) -> SearchConfig:
    """Validates ``settings`` laid over the TOML ``file``; nested names are joined by dots.

    Raises:
        ConfigError: one line that names the first setting that is wrong.
    """
    merged: dict[str, Any] = {}
    if file is not None:
        try:
            merged = tomllib.loads(file.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {file}: {error}") from error
    for path, value in settings.items():
        _assign(merged, path, value)
    for kind in COMPONENTS:
        default = SearchConfig.model_fields[kind].default or (
            Component(name="soft") if kind == "reward" else None
        )
        if default and isinstance(merged.get(kind), Mapping):  # options of the default need not name it
            merged[kind] = {"name": default.name} | dict(merged[kind])
    try:
        return SearchConfig.model_validate(merged)
    except ValidationError as error:
        raise _first_problem(error) from error


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


def make(kind: str, component: Component, *arguments: Any, **fixed: Any) -> Any:
    """Makes what ``component`` names, or returns it if it names an object that is made already."""
    factory = find(kind, component.name)
    if not callable(factory) or _is_made(kind, factory):
        if component.options:
            raise ConfigError(
                f"{kind} {component.name!r} is an object and takes no options: {component.options}"
            )
        return factory
    options = check_options(
        f"{kind} {component.name!r}", factory, component.options, skip=len(arguments), fixed=fixed
    )
    return factory(*arguments, **fixed, **options)


def find(kind: str, name: str) -> Any:
    """What ``name`` stands for: a line of ``COMPONENTS``, or ``module:attribute`` of the user's."""
    known = COMPONENTS.get(kind, {})
    family = name.partition(":")[0] + ":"  # "sb3:" is a family of ours, no module of the user's
    if name not in known and (family[:-1] == name or any(other.startswith(family) for other in known)):
        raise unknown_name(kind, name, known)
    module_name, _, attribute = known.get(name, name).partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(f"{kind} {name!r} is not a name: write one of ours, or module:attribute")
    if name not in known and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind} {name!r} cannot be imported: {error}") from error


def network_of(name: str, spec: search.TaskSpec) -> nn.Module:
    """The network for ``spec`` that one of our names, or ``module:attribute`` of the user's, stands for.

    The attribute is a module or makes one, of nothing or of (channels, classes).
    """
    from torch import nn

    from .networks import make_network

    if ":" not in name:
        return make_network(name, spec)
    made: Any = find("network", name)
    if not isinstance(made, nn.Module):
        try:
            needed = [p for p in inspect.signature(made).parameters.values() if p.default is p.empty]
            made = made(spec.input_shape[0], spec.outputs) if len(needed) == 2 else made()
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{name} makes no network of nothing or of (channels, classes): {error}"
            ) from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{name} makes a {type(made).__name__}, not a torch.nn.Module")
    return made


def options_of(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The keyword-only options a factory takes."""
    parameters = inspect.signature(factory).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def check_options(
    owner: str,
    factory: Callable[..., Any],
    options: Mapping[str, Any],
    *,
    skip: int = 0,
    fixed: Mapping[str, Any] = {},
) -> dict[str, Any]:
    """``options`` with the types that the factory's signature asks for, or a ConfigError."""
    parameters = list(inspect.signature(factory).parameters.values())[skip:]
    known = {p.name: p for p in parameters if p.name not in fixed}
    hints = _hints(factory) if options else {}
    checked = {}
    for name, value in options.items():
        if name not in known:
            takers = _takers(owner, name)
            if takers:
                raise ConfigError(f"{owner} has no {name!r}; these have: {', '.join(takers)}")
            raise (
                unknown_name(f"option of {owner}:", name, known)
                if known
                else ConfigError(f"{owner} takes no options, got {name!r}")
            )
        try:
            checked[name] = TypeAdapter(hints.get(name, Any)).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"{owner}: {name} = {value!r}: {error.errors()[0]['msg']}") from error
        if isinstance(checked[name], float) and not math.isfinite(checked[name]):
            raise ConfigError(f"{owner}: {name} = {value!r}: give a finite number")
    missing = [p.name for p in known.values() if p.default is p.empty and p.name not in checked]
    if missing:
        raise ConfigError(
            f"{owner} needs the option {missing[0]!r}: give it with --set {owner.split()[0]}.{missing[0]}=..."
        )
    return checked


def _takers(owner: str, option: str) -> list[str]:
    """The components of the owner's kind that take an option which the owner does not."""
    kind, takers = owner.split()[0], []
    for name in COMPONENTS.get(kind, {}):
        with contextlib.suppress(ConfigError):  # it cannot be imported here
            if option in options_of(find(kind, name)):
                takers.append(name)
    return takers


def _hints(factory: Callable[..., Any]) -> dict[str, Any]:
    """The types of a factory's arguments; none where an annotation names what its module does not hold."""
    try:
        return get_type_hints(factory.__init__ if inspect.isclass(factory) else factory)
    except NameError:
        return {}


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
    if inspect.isclass(part) or (kind in given and not _is_made(kind, part) and callable(part)):
        part = part(*arguments, **fixed)
    absent = [name for name in _members(PROTOCOLS[kind]) if not hasattr(part, name)]
    if absent:
        raise ConfigError(
            f"{kind} {type(part).__name__} lacks {', '.join(absent)}: see rlnas_fast.search for the interface"
        )
    return part


def _is_made(kind: str, value: Any) -> bool:
    return kind in PROTOCOLS and not inspect.isclass(value) and isinstance(value, PROTOCOLS[kind])


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
    if "strategy" in given and _is_made("strategy", given["strategy"]):
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


def _assign(settings: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        inner = settings.get(parent, {})
        if not isinstance(inner, (str, Mapping)):
            raise ConfigError(f"{path} = {value!r}: {parent} = {inner!r} is no table, it has no settings")
        settings[parent] = {"name": inner} if isinstance(inner, str) else dict(inner)
        settings = settings[parent]
    if isinstance(settings.get(last), Mapping) and isinstance(value, str):
        settings[last] = dict(settings[last]) | {"name": value}
    else:
        settings[last] = value


def _first_problem(error: ValidationError) -> ConfigError:
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return unknown_name("setting", where, SearchConfig.model_fields)
    message = problem["msg"].removeprefix("Value error, ")
    return ConfigError(f"{where} = {problem['input']!r}: {message}" if where else message)
