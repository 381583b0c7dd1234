"""What a search can be made of: a line for each component, what its name stands for, and its options.

A component is named by its line in ``COMPONENTS`` or as ``module:attribute`` (the user's own), and its
options are checked against the signature of what the name stands for.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from . import search
from .errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from torch import nn

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


def make(kind: str, component: Component, *arguments: Any, **fixed: Any) -> Any:
    """Makes what ``component`` names, or returns it if it names an object that is made already."""
    factory = find(kind, component.name)
    if not callable(factory) or is_made(kind, factory):
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


def is_made(kind: str, value: Any) -> bool:
    """Whether ``value`` is a component already, and nothing that makes one."""
    return kind in PROTOCOLS and not inspect.isclass(value) and isinstance(value, PROTOCOLS[kind])


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
