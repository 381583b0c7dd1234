"""A placement run: from names and settings to a trained network, in a folder that survives a crash."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .components import Component, make, network_of
from .compose import resolve_device
from .errors import ConfigError, DataError, RunError
from .placement.agents import StageAgent, make_agent
from .placement.batches import CLEAN, Batches, LoaderBatches, TaskBatches
from .placement.inserter import NONE, NonLocalInserter
from .placement.probe import ActivationProbe
from .placement.procedure import FixedAgent, Placement, collapse_of
from .placement.rewards import RewardRule, added_latency
from .placement.stages import as_it_came_on_failure, plain_network
from .placement_folder import PlacementConfig, PlacementFolder, Progress, Silent, saved_config, write_text
from .report.placements import choices_of, gain_of, save_placement_picture
from .search import Budget, TaskSpec
from .search.archives import replace_file
from .tasks.task import Task
from .training.data import DeviceData, on_device
from .training.loop import make_optimizer, rate_factor
from .training.recipe import Recipe

__all__ = ["PlacementConfig", "PlacementResult", "Progress", "load_placed", "place", "resume_place"]

FIXED = "fixed:"
# Of blocks that learn while they are compared, one that is chosen more often looks better for it: draws are
# uniform until `explore_until` ends them.  Few rows, because rewards are few.
OPTIONS: dict[str, dict[str, Any]] = {"q-table": {"rows": 4, "epsilon": 1.0}}


@dataclass(frozen=True)
class PlacementResult:
    """What a placement run found.

    Attributes:
        folder: where everything is.
        network: trained, in evaluation mode, with the block at ``stage``; the caller's own, if one was given.
        inserter: of the network, to swap its trained blocks by hand.
        stage: the one that the agent thinks best for most validation batches; "none" for no block.
        accuracy: on the validation split, with the stage that the agent thinks best for each batch.
        accuracies: of the trained network with each stage's block fixed, and with "none".
        counts: how often each was chosen in training.
        collapsed: the policy thinks one stage best whatever the state.
        test_accuracy: of ``network`` on the test split, read once; None with loaders.
        summary: all of it as plain data, as in ``summary.json``.
    """

    folder: Path
    network: nn.Module
    inserter: NonLocalInserter
    stage: str
    accuracy: float
    accuracies: dict[str, float]
    counts: dict[str, int]
    collapsed: bool
    test_accuracy: float | None
    summary: dict[str, Any]


def place(
    model: str | nn.Module,
    data: str | Task | tuple[Iterable[Any], Iterable[Any]] = "digits",
    *,
    agent: str | Callable[..., StageAgent] = "q-table",
    out: str | Path | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> PlacementResult:
    """Trains a network while an agent learns at which stage a non-local block helps it most.

    The same call with the same ``out`` goes on where it was stopped.

    Args:
        model: your own module, which is trained in place, left as it came if anything fails, and whose
            class is not touched; or a name of ``rlnas_fast.networks``, or ``module:attribute`` that is a
            module or makes one (of nothing, or of channels and classes).
        data: a task by name, a ``Task``, or (training loader, validation loader) of (x, y) or
            (x, y, regime).
        agent: "q-table", "dqn", "reinforce" or "ppo"; "fixed:NAME" for always the same stage (or "none"); or
            what makes a ``StageAgent`` of (features, actions, seed=...).
        out: the run folder; by default a new one in ``runs/``.
        settings: of ``PlacementConfig``, where each is explained: ``stages``, ``epochs``, ``decide``,
            ``metric``, ``delay``, ``control``, ``latency_price``, ``revert_below``, ``explore_until``,
            ``regimes``, ``validation_batch``, ``seed``, ``device``, ``block``, ``agent_options``,
            ``recipe``, ``task``.  Where ``agent_options`` does not say otherwise, a "q-table" draws uniformly
            while it explores and has four rows.

    Raises:
        ConfigError, ShapeError, DataError, MeterError: the input cannot be used; says which and why.
        RunError: ``out`` holds another run, or is being written.
    """
    unknown = set(settings) - {f.name for f in PlacementConfig.__dataclass_fields__.values()}
    if unknown:
        raise ConfigError(f"unknown setting {sorted(unknown)[0]!r}: see rlnas_fast.placement_runs.place")
    for name in ("stages", "regimes"):
        if isinstance(settings.get(name), str):
            raise ConfigError(f"{name} = {settings[name]!r}: give several, as a list")
        if settings.get(name) is not None:
            settings[name] = tuple(settings[name])
    config = PlacementConfig(model=_named(model), data=_named(data), agent=_named(agent), **settings)
    folder = Path(out) if out else _default_folder(config)
    return _placed(config, model, data, agent, folder, progress or Silent())


def resume_place(folder: Path, progress: Progress | None = None) -> PlacementResult:
    """Goes on with the run in ``folder``, where everything in it has a name.

    Raises:
        RunError: it is no placement run, or was given objects.
    """
    config = saved_config(folder)
    for name in (config.model, config.data, config.agent):
        if name.startswith("object "):
            raise RunError(f"{folder} was started with an {name}: call place() again with it and this folder")
    return _placed(config, config.model, config.data, config.agent, folder, progress or Silent())


def load_placed(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The network of a finished placement run with its block, in evaluation mode, on the CPU.

    Args:
        model: a fresh one of the kind that was given to ``place`` in place of a name.
    Raises:
        RunError: the run is not finished, or was given a module and ``model`` is None.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        saved = json.loads((folder / "network.json").read_text())
        weights = load_file(folder / "network.safetensors")
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder} has no trained network ({error}); finish it with `rlnas resume {folder}`"
        ) from error
    if model is None:
        if saved["model"].startswith("object "):
            raise RunError(f"{folder} was started with an {saved['model']}: give a fresh one as `model`")
        model = network_of(saved["model"], TaskSpec(tuple(saved["input_shape"]), saved["classes"]))
    if saved["stage"] != NONE:
        example = torch.zeros(2, *saved["input_shape"])
        inserter = NonLocalInserter(model.train(), example, [saved["stage"]], **saved["block"])
        inserter.insert(1)
    model.load_state_dict(weights)
    return model.eval()


def _placed(
    config: PlacementConfig, model: Any, data: Any, agent: Any, folder: Path, progress: Progress
) -> PlacementResult:
    rule = RewardRule(config.metric, config.delay, config.latency_price, config.control)
    recipe = _options("recipe", Recipe, config.recipe)
    with torch.random.fork_rng(devices=_gpus(config.device, model)):
        torch.manual_seed(config.seed)
        task = data if isinstance(data, Task) else None
        if isinstance(data, str):
            task = make("task", Component(name=data, options=dict(config.task)))
        elif config.task:
            raise ConfigError("options of a task were given, and an object as data")
        network, compiled = _network(model, task)
        with as_it_came_on_failure(network):
            device = _device(config.device, network, moved=not isinstance(model, nn.Module))
            network.to(device)
            batches = _batches(config, task, data, recipe, device)
            optimizer = make_optimizer(network, recipe)
            example = batches.validation[0].x
            inserter = NonLocalInserter(
                network, example, config.stages, optimizer=optimizer, seed=config.seed, **_block(config)
            )
            layers = [stage.name for stage in inserter.stages]
            with _closed_on_failure(inserter), ActivationProbe(network, layers, watch=False) as probe:
                made = _agent(agent, config, probe.features, inserter.names)
                placement = Placement(
                    inserter, probe, made, optimizer, batches,
                    rate=lambda spent: recipe.learning_rate * rate_factor(spent, recipe.warmup),
                    epochs=config.epochs, rule=rule, decide=config.decide, revert_below=config.revert_below,
                    explore_until=config.explore_until,
                    label_smoothing=recipe.label_smoothing, forward=compiled,
                )  # fmt: skip
                with PlacementFolder(folder, config, placement) as run:
                    if not run.restore():
                        if rule.latency_price:
                            placement.added_latency = added_latency(inserter, example[:1], str(device))
                        run.save()
                    run.train(config.epochs, progress)
                    return _finished(run, task, device)


def _batches(
    config: PlacementConfig, task: Task | None, data: Any, recipe: Recipe, device: torch.device
) -> Batches:
    if task is None:
        if config.regimes != (CLEAN,):
            raise ConfigError("regimes of loaders come with their batches, as (x, y, regime)")
        return LoaderBatches(*_loaders(data), device)
    return TaskBatches(
        DeviceData.of(task, device),
        recipe,
        recipe.augmentations(Budget(config.epochs)),
        config.regimes,
        validation_batch=config.validation_batch,
        seed=config.seed,
    )


@contextmanager
def _closed_on_failure(inserter: NonLocalInserter) -> Iterator[None]:
    try:
        yield
    except BaseException:
        inserter.close()
        raise


def _finished(run: PlacementFolder, task: Task | None, device: torch.device) -> PlacementResult:
    placement, config, folder = run.placement, run.config, run.folder
    inserter, names = placement.inserter, placement.inserter.names
    choices = placement.choices()
    right = {name: placement.validate([action] * len(choices)) for action, name in enumerate(names)}
    accuracy = float(placement.validate(choices).mean())
    chosen = Counter(choices).most_common(1)[0][0]
    network = inserter.network
    network.train()  # a block that never was in training may be chosen too, and is the identity
    inserter.insert(chosen)
    network.eval()
    test_accuracy = None if task is None else _test_accuracy(network, task, device)
    collapse, latency = collapse_of(placement.best), placement.added_latency
    times = Counter(names[action] for _, action in placement.taken)
    counts = {name: times[name] for name in names}
    summary = {
        "model": config.model,
        "data": config.data,
        "agent": config.agent,
        "stages": {stage.name: list(stage.shape) for stage in inserter.stages},
        "stage": names[chosen],
        "choices": [
            {"regime": batch.regime, "stage": names[choice]}
            for batch, choice in zip(placement.validation, choices, strict=True)
        ],
        "accuracy": accuracy,
        "test_accuracy": test_accuracy,
        "fixed": {
            name: gain_of(each.numpy(), right[NONE].numpy()) | {"accuracy": float(each.mean())}
            for name, each in right.items()
        },
        "decisions": len(placement.taken),
        "counts": counts,
        "rewards": choices_of(placement.rewarded, names),
        "reverted": placement.reverted,
        "added_latency": dict(zip(names, latency.shares, strict=True)) if config.latency_price else None,
        "latency_caveats": list(latency.caveats),
        "collapse": None if collapse is None else asdict(collapse) | {"action": names[collapse.action]},
        "epochs": run.epochs,
        "steps": placement.step,
    }
    _save_network(folder, config, network, names[chosen], placement)
    save_placement_picture(summary, folder / "placement.png")
    write_text(folder / "summary.json", json.dumps(summary, indent=2))
    return PlacementResult(
        folder=folder,
        network=network,
        inserter=inserter,
        stage=names[chosen],
        accuracy=accuracy,
        accuracies={name: float(each.mean()) for name, each in right.items()},
        counts=counts,
        collapsed=bool(collapse and collapse.collapsed),
        test_accuracy=test_accuracy,
        summary=summary,
    )


def _save_network(
    folder: Path, config: PlacementConfig, network: nn.Module, stage: str, placement: Placement
) -> None:
    from safetensors.torch import save_file

    # Copies: weights that a network ties together share memory, which the format does not allow.
    tensors = {name: tensor.cpu().contiguous().clone() for name, tensor in network.state_dict().items()}
    replace_file(folder / "network.safetensors", lambda temporary: save_file(tensors, temporary))
    x, _, _ = placement.validation[0]
    with torch.no_grad():
        classes = network(x[:2]).shape[1]
    saved = {
        "model": config.model,
        "stage": stage,
        "block": dict(config.block),
        "classes": classes,
        "input_shape": list(x.shape[1:]),
    }
    write_text(folder / "network.json", json.dumps(saved, indent=2))


@torch.no_grad()
def _test_accuracy(network: nn.Module, task: Task, device: torch.device) -> float:
    x, y = on_device(task.test_split(), device)
    data = DeviceData.of(task, device)
    logits = torch.cat([network(data.normalise(some)) for some in torch.split(x, 512)])
    return float((logits.argmax(dim=1) == y).double().mean())


def _network(
    model: str | nn.Module, task: Task | None
) -> tuple[nn.Module, Callable[[Tensor], Tensor] | None]:
    """The network, and its compiled form where it came compiled."""
    if isinstance(model, nn.Module):
        plain = plain_network(model)
        return plain, None if plain is model else model
    if task is None:
        raise ConfigError(f"model {model!r} is a name and the data are loaders: give the module itself")
    return network_of(model, task.spec), None


def _agent(agent: Any, config: PlacementConfig, features: int, names: Sequence[str]) -> StageAgent:
    if not isinstance(agent, str):
        made: StageAgent = agent(features, len(names), seed=config.seed, **config.agent_options)
        return made
    if agent.startswith(FIXED):
        name = agent.removeprefix(FIXED)
        if name not in names:
            raise ConfigError(f"agent {agent!r}: there is no stage {name!r}; choose from {', '.join(names)}")
        return FixedAgent(names.index(name), len(names))
    options = OPTIONS.get(agent, {}) | dict(config.agent_options)
    return make_agent(agent, features, len(names), seed=config.seed, **options)


def _options(what: str, factory: Callable[..., Any], options: Mapping[str, Any]) -> Any:
    known = inspect.signature(factory).parameters
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown option {what}.{name}: known are {', '.join(known)}")
    return factory(**options)


def _block(config: PlacementConfig) -> dict[str, Any]:
    known = ("inner_channels", "kind", "subsample", "norm", "bias", "backend")
    for name in config.block:
        if name not in known:
            raise ConfigError(f"unknown option block.{name}: known are {', '.join(known)}")
    return dict(config.block)


def _loaders(data: Any) -> tuple[Any, Any]:
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        raise DataError(
            f"data is a {type(data).__name__}: give a task, its name, or (training, validation) loaders"
        )
    return data[0], data[1]


def _device(name: str, network: nn.Module, *, moved: bool) -> torch.device:
    if name == "auto" and not moved:  # a caller's network stays where it is
        return next((p.device for p in network.parameters()), torch.device("cpu"))
    return torch.device(resolve_device(name))


def _gpus(device: str, model: str | nn.Module) -> list[int]:
    """The GPUs whose random state the run draws from."""
    used = {p.device for p in model.parameters()} if isinstance(model, nn.Module) else set()
    if device != "auto" or not used:
        used.add(torch.device(resolve_device(device)))
    return [each.index or 0 for each in used if each.type == "cuda"]


def _named(given: Any) -> str:
    if isinstance(given, str):
        return given
    if isinstance(given, Task):
        return f"object Task {given.name} {given.data_hash[:16]}"
    if isinstance(given, (tuple, list)):
        return "object loaders"
    return f"object {getattr(given, '__qualname__', type(given).__qualname__)}"


def _default_folder(config: PlacementConfig) -> Path:
    names = [
        name.rpartition(":")[2].removeprefix("object ").replace(" ", "-")
        for name in (config.model, config.data)
    ]
    digest = hashlib.sha256(f"{os.getpid()} {time.time_ns()}".encode()).hexdigest()[:4]
    stem = "-".join([time.strftime("%Y%m%d-%H%M%S"), *names, config.agent.replace(":", "-"), digest])
    return Path("runs") / stem
