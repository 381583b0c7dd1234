"""What a user may ask of a search: every setting with its default, read from a TOML file and from flags."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from .components import COMPONENTS, Component
from .errors import ConfigError, unknown_name

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
