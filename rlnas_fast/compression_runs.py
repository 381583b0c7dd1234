"""A compression: its folder, how it starts, goes on after a crash, and is read again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .compose import COMPONENTS, Component, find, make, resolve_device
from .errors import ConfigError, DataError, RunError, unknown_name
from .runs import load_child, read_best, saved_config, versions
from .search import Architecture, TaskSpec
from .storage.measurement_cache import SqliteCache
from .storage.writer_lock import WriterLock

if TYPE_CHECKING:
    from torch import nn

    from .compression.compressed import Compressed
    from .compression.layers import Masks
    from .compression.problem import Problem
    from .tasks.task import Task

SETTINGS, BASE, EVALUATIONS, SUMMARY = (
    "compression.json",
    "base.safetensors",
    "evaluations.sqlite",
    "summary.json",
)
LATENCY_TRIES = 8

Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Settings(BaseModel):
    """What a compression depends on, beside the network and the task.  Unknown keys are errors.

    Attributes:
        density: share of the weights to keep, by their bits where there is int8.
        method: a rule of ``compression.heuristics`` or a search of ``compression.search``.
        procedure: "search", or "layerwise" for the document's own.
        groups: what is decided as one: weights, rows, tiles, tiles:16x16, 2:4.
        int8: let weights be int8.
        gather: reorder rows and columns first, so that what matters lies in few tiles; not the function.
        evaluations: of a search.
        fine_tune_steps: within each of them.
        epochs: of the final fine-tuning, on masked kernels.
        base_epochs: of training a named network that comes without weights.
        max_latency_ms: keep fewer weights than asked where the compressed network is slower than this.
        latency_batch: images in the pass that is timed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    density: float = 0.1
    method: str = "lamp"
    procedure: Literal["search", "layerwise"] = "search"
    groups: str = "weights"
    int8: bool = False
    gather: bool = False
    evaluations: Annotated[int, Field(ge=1)] = 60
    fine_tune_steps: Annotated[int, Field(ge=0)] = 0
    epochs: Annotated[int, Field(ge=0)] = 1
    base_epochs: Annotated[int, Field(ge=1)] = 10
    price_density: Price = 0.0
    price_reconstruction: Price = 0.0
    price_latency_ms: Price = 0.0
    max_latency_ms: Annotated[float, Field(gt=0)] | None = None
    latency_batch: Annotated[int, Field(ge=1)] = 64
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0


class Progress(Protocol):
    """Hears how a compression goes on; what the command line draws."""

    def began(self, folder: Path) -> None: ...

    def note(self, text: str) -> None: ...

    def stage(self, what: str, done: int, total: int) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def began(self, folder: Path) -> None: ...

    def note(self, text: str) -> None: ...

    def stage(self, what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class CompressionResult:
    """What a finished compression made.

    Attributes:
        network: the compressed network, in eval mode, on the device it was made on.
        masks: what stays, by layer: bool, or states where there is int8.
        summary: everything measured, as plain data, as in ``summary.json``.
        folder: where everything is.
    """

    network: Compressed
    masks: Masks
    summary: dict[str, Any]
    folder: Path


def compress(
    model: str | nn.Module,
    task: str | Mapping[str, Any] | Task = "digits",
    *,
    out: str | Path | None = None,
    device: str = "auto",
    progress: Progress | None = None,
    **settings: Any,
) -> CompressionResult:
    """Compresses a trained network, and measures what that cost and what it saved.

    The same call with the same ``out`` goes on where it was stopped, however it was: evaluations in its log
    are not made again.

    Args:
        model: a trained module, which stays as it is; or a named network (``compression.networks``), which
            is trained first; a file with weights of one (safetensors, or a state dict of ``torch.save``);
            the folder of a finished ``rlnas search``; or ``module:attribute`` that makes a trained module.
        task: a task's name, a table {"name": ..., option: ...}, a .npz file, or a task.
        out: the folder; by default a new one below ``runs/``.
        device: cpu, cuda:0, ... or auto.
        progress: hears how it goes on.
        settings: of ``Settings``.

    Raises:
        ConfigError, ShapeError, DataError, RunError: something given cannot be used; nothing was written
            but the folder of a run that can go on.
    """
    chosen = _settings(settings)
    progress = progress or Silent()
    where = resolve_device(device)
    made_task = _task(task)
    source = _source(model, made_task)
    _check(chosen, source, made_task)
    folder = _folder(out, source, made_task, chosen)
    with ExitStack() as stack:
        lock = WriterLock(folder / "compression.lock")
        stack.callback(lock.release)
        _same_settings(folder, chosen, source, made_task, task, where)
        progress.began(folder)
        cache = stack.enter_context(SqliteCache(folder / EVALUATIONS))
        base = _base(source, made_task, chosen, where, folder, progress)
        return _compress(base, source, made_task, chosen, where, folder, cache, progress)


def resume_compression(folder: str | Path, *, progress: Progress | None = None) -> CompressionResult:
    """Goes on with the compression in ``folder``, of a model and a task that have names."""
    folder = Path(folder)
    try:
        known = json.loads((folder / SETTINGS).read_text())
        model, task, where, settings = (known[name] for name in ("model", "task", "device", "settings"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{folder} is not the folder of a compression: {error}") from error
    if model is None or task is None:
        raise RunError(
            f"{folder} was started with objects: call rlnas_fast.compress with the same ones and out={str(folder)!r}"
        )
    return compress(model, task, out=folder, device=where, progress=progress, **settings)


def load_compressed(folder: str | Path, model: nn.Module | None = None) -> Compressed:
    """The compressed network of a finished compression, in eval mode, on the CPU.

    Args:
        folder: holds compressed.safetensors and compressed.json.
        model: the network as it was before, with any weights; needed where it was an object or a
            ``module:attribute``, for no code is run that a file names.

    Raises:
        DataError: the files are damaged or of another network.
    """
    from .compression.compressed import Compressed, read_description

    folder = Path(folder)
    if model is None:
        origin = read_description(folder).get("origin")
        try:
            model = _rebuilt(origin)
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{folder}: what network it was cannot be read ({error})") from error
        if model is None:
            raise ConfigError(
                f"{folder} was made from a network of your own: give it, with any weights, as model="
            )
    return Compressed.load(folder, model)


@dataclass(frozen=True)
class _Source:
    """Where the network comes from.

    Attributes:
        name: for people.
        given: the text by which it can be asked for again; None of an object.
        origin: from which ``load_compressed`` builds it again; None if it cannot.
        module: None until it is trained.
        network: of a named network that is to be trained.
    """

    name: str
    given: str | None
    origin: dict[str, Any] | None
    module: nn.Module | None
    network: str | None = None


def _source(model: str | nn.Module, task: Task) -> _Source:
    from torch import nn

    from .compression.networks import NETWORKS, make_network, named_after

    if isinstance(model, nn.Module):
        return _Source(type(model).__name__, None, None, model)
    if not isinstance(model, str):
        raise ConfigError(f"model is a {type(model).__name__}: give a torch.nn.Module or a name")
    spec = asdict(task.spec)
    if model in NETWORKS:
        return _Source(model, model, {"network": model, "task_spec": spec}, None, model)
    path = Path(model)
    if path.is_dir():
        best, config = read_best(path), saved_config(path)
        origin = {
            "space": config.space.model_dump(mode="json"),
            "choices": best["choices"],
            "task_spec": best["task_spec"],
        }
        return _Source(path.name, str(path), origin, load_child(path))
    if path.is_file():
        state = _read_state(path)
        name = named_after(state, task.spec)
        if name is None:
            raise ConfigError(
                f"{model}: its tensors are those of no named network ({', '.join(NETWORKS)}) for task "
                f"{task.name!r} ({task.spec.outputs} classes, images {task.spec.input_shape}); "
                "give module:attribute for a network of your own"
            )
        module = make_network(name, task.spec)
        module.load_state_dict(state)
        return _Source(name, str(path), {"network": name, "task_spec": spec}, module.eval())
    if ":" in model:
        made: Any = find("network", model)
        try:
            module = made if isinstance(made, nn.Module) else made()
        except TypeError as error:
            raise ConfigError(f"{model} cannot be called without arguments: {error}") from error
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{model} makes a {type(module).__name__}, not a torch.nn.Module")
        return _Source(model, model, None, module)
    if path.suffix or os.sep in model:
        raise ConfigError(f"model {model!r}: there is no such file or folder")
    raise unknown_name("network", model, NETWORKS)


def _read_state(path: Path) -> dict[str, Any]:
    """Tensors by name, from a file that may be anyone's: nothing in it is run."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{path} is not read: it is no safetensors file and no plain state dict, and nothing else is "
            f"loaded, because it could run code ({reason})"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise DataError(f"{path} holds no state dict (tensors by name): save model.state_dict() instead")
    return {str(name): tensor for name, tensor in state.items()}


def _rebuilt(origin: Any) -> nn.Module | None:
    """The network that a saved file says it came from: ours only."""
    from .compression.networks import make_network

    if origin is None:
        return None
    spec = origin["task_spec"]
    task_spec = TaskSpec(tuple(spec["input_shape"]), spec["outputs"], spec["kind"])
    if "network" in origin:
        return make_network(origin["network"], task_spec)
    space = Component.model_validate(origin["space"])
    if space.name not in COMPONENTS["space"]:
        return None
    built = make("space", space, task_spec).build(
        Architecture(space.name, tuple(origin["choices"])), task_spec
    )
    return built  # type: ignore[no-any-return]


def _task(task: Any) -> Task:
    if isinstance(task, str):
        task = {"name": "npz", "path": task} if task.endswith(".npz") else {"name": task}
    if isinstance(task, Mapping):
        options = {key: value for key, value in task.items() if key != "name"}
        return make("task", Component(name=task["name"], options=options))  # type: ignore[no-any-return]
    return task  # type: ignore[no-any-return]


def _settings(given: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate(dict(given))
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            raise unknown_name("setting", name, Settings.model_fields) from error
        raise ConfigError(f"{name} = {problem['input']!r}: {problem['msg']}") from error


def _check(settings: Settings, source: _Source, task: Task) -> None:
    """Refuses what cannot be done before anything is written or trained."""
    from .compression.heuristics import METHODS, check_density
    from .compression.layers import prunable
    from .compression.networks import make_network
    from .compression.operations import Groups
    from .compression.problem import Problem

    known = (*METHODS, *_searches())
    if settings.method not in known:
        raise unknown_name("method", settings.method, known)
    groups = Groups.of(settings.groups)
    if settings.gather and groups.kind != "tiles":
        raise ConfigError(f"gather = True: gathers weights into tiles, but groups = {settings.groups}")
    if settings.int8 and groups.kind == "n:m":
        raise ConfigError(f"int8 = True with groups = {settings.groups}: give weights, rows or tiles")
    check_density(settings.density)
    module = source.module if source.module is not None else make_network(source.network or "", task.spec)
    check_density(settings.density, prunable(module))
    Problem(module, task)


def _searches() -> tuple[str, ...]:
    """The methods that search."""
    return ()


def _folder(out: str | Path | None, source: _Source, task: Task, settings: Settings) -> Path:
    stem = "-".join([time.strftime("%Y%m%d-%H%M%S"), "compress", source.name, task.name, settings.method])
    folder = Path(out) if out else Path("runs") / re.sub(r"[^\w.-]+", "_", f"{stem}-{settings.seed}")
    if folder.exists() and not folder.is_dir():
        raise RunError(f"{folder} is there and is no folder: choose another --out")
    started = (folder / SETTINGS).exists()
    if (
        folder.exists()
        and not started
        and any(not e.name.endswith((".partial", ".lock")) for e in folder.iterdir())
    ):
        raise RunError(f"{folder} is there and is not empty: choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the folder {folder}: {error.strerror}") from error
    return folder


def _same_settings(
    folder: Path, settings: Settings, source: _Source, task: Task, given_task: Any, device: str
) -> None:
    """Writes what this compression is, or refuses to go on with another one."""
    now = {
        "settings": settings.model_dump(mode="json"),
        "model": source.given,
        "task": dict(given_task)
        if isinstance(given_task, Mapping)
        else given_task
        if isinstance(given_task, str)
        else None,
        "device": device,
        "weights": None if source.module is None else _digest(source.module),
        "data": task.data_hash,
        "versions": versions(),
    }
    file = folder / SETTINGS
    if not file.exists():
        _write(file, json.dumps(now, indent=2))
        return
    try:
        before = json.loads(file.read_text())
    except ValueError as error:
        raise RunError(f"{file} cannot be read: {error}; choose another --out") from error
    flat_before, flat_now = ({**side.pop("settings"), **side} for side in (before, dict(now)))
    for name in flat_now:
        if name not in ("versions", "device", "model", "task") and flat_before.get(name) != flat_now[name]:
            raise RunError(
                f"{folder} holds a compression with {name} = {flat_before.get(name)}, now it is "
                f"{flat_now[name]}: choose another --out, or ask for the same"
            )


def _base(
    source: _Source, task: Task, settings: Settings, device: str, folder: Path, progress: Progress
) -> nn.Module:
    """The trained network: as given, from the folder, or trained now."""
    from safetensors.torch import load_file

    from .compression.networks import make_network, train_network

    if source.module is not None:
        return source.module
    assert source.network is not None
    file = folder / BASE
    if file.is_file():
        module: nn.Module = make_network(source.network, task.spec, settings.seed)
        module.load_state_dict(load_file(file))
        return module.eval()
    total = settings.base_epochs
    progress.stage("training the base network", 0, total)
    module, result = train_network(
        source.network,
        task,
        epochs=total,
        seed=settings.seed,
        device=device,
        on_epoch=lambda epoch, accuracy, loss: progress.stage("training the base network", epoch, total),
    )
    if result.failure is not None:
        raise RunError(f"the base network could not be trained: {result.failure}")
    _save(module, file)
    return module


def _compress(
    base: nn.Module,
    source: _Source,
    task: Task,
    settings: Settings,
    device: str,
    folder: Path,
    cache: SqliteCache,
    progress: Progress,
) -> CompressionResult:
    from .compression.compressed import Compressed
    from .compression.heuristics import METHODS
    from .compression.layers import bits, density
    from .compression.operations import Groups, gathering
    from .compression.problem import Problem
    from .compression.report import allocation, save_allocation_picture

    started = time.monotonic()
    groups = Groups.of(settings.groups)

    def evaluated(_: Any) -> None:
        progress.stage("evaluations", problem.evaluations, max(problem.evaluations, settings.evaluations))

    def problem_of(groups: Groups) -> Problem:
        return Problem(
            base, task, device=device, groups=groups, memory=cache, seed=settings.seed,
            on_evaluation=evaluated if settings.method not in METHODS else lambda _: None,
        )  # fmt: skip

    problem = problem_of(groups)
    if settings.gather:
        squares = {layer.name: layer.weight.square() for layer in problem.layers}
        orders = gathering(problem.layers, squares, groups.layout.tile, settings.density)
        problem = problem_of(Groups.of(settings.groups, orders))
    kept_share, caveats = _share_within_latency(problem, settings)
    masks, network, history = _allocate(problem, kept_share, settings, folder, progress)
    compressed = Compressed.of(network, masks, problem.groups.layout).eval()
    if settings.epochs:
        compressed.fine_tune(problem.data, settings.epochs, problem.recipe, settings.seed)
    timing = _timing(problem, compressed, settings.latency_batch)
    if settings.max_latency_ms is not None and 1e3 * timing.latency_s["after"] > settings.max_latency_ms:
        caveats += (
            f"measured again at the end, it takes {1e3 * timing.latency_s['after']:.3g} ms, more than "
            f"max_latency_ms = {settings.max_latency_ms:g}",
        )
    description = {
        "origin": source.origin,
        "task": task.name,
        "classes": list(task.class_names),
        "mean": list(task.mean),
        "std": list(task.std),
    }
    compressed.save(folder, description)
    whole_bits = 32 * problem.layers.total
    summary = {
        "model": source.name,
        "task": task.name,
        "method": settings.method if settings.procedure == "search" else "layerwise",
        "settings": settings.model_dump(mode="json"),
        "density": density(masks),
        "before": {
            "validation_accuracy": problem.accuracy(problem.model)[0],
            "test_accuracy": problem.test_accuracy(problem.model),
            "weights": problem.layers.total,
            "bits": whole_bits,
            "file_bytes": _file_bytes(problem.model),
            "latency_s": timing.latency_s["before"],
        },
        "after": {
            "validation_accuracy": problem.accuracy(compressed)[0],
            "test_accuracy": problem.test_accuracy(compressed),
            "weights": sum(row["kept"] for row in allocation(problem.layers, masks)),
            "bits": bits(masks),
            "file_bytes": (folder / "compressed.safetensors").stat().st_size,
            "latency_s": timing.latency_s["after"],
        },
        "speedup": timing.speedup["after"],
        "latency_batch": timing.batch,
        "caveats": [*caveats, *timing.caveats],
        "layers": allocation(problem.layers, masks),
        "skipped": [asdict(entry) for entry in problem.layers.skipped],
        "evaluations": problem.evaluations,
        "history": history,
        "seconds": time.monotonic() - started,
        "versions": versions(),
    }
    save_allocation_picture(summary, folder / "allocation.png")
    _write(folder / SUMMARY, json.dumps(summary, indent=2))
    return CompressionResult(compressed, masks, summary, folder)


def _allocate(
    problem: Problem, share: float, settings: Settings, folder: Path, progress: Progress
) -> tuple[Masks, nn.Module, list[Any]]:
    """What stays, of which network (the layer-by-layer procedure trains as it goes), and how that was found."""
    return _by_rule(problem, settings.method, share, settings.int8), problem.model, []


def _by_rule(problem: Problem, method: str, share: float, int8: bool) -> Masks:
    """A published rule; with int8 everything that stays is int8."""
    import torch

    from .compression.heuristics import scores

    found = scores(method, problem.layers, density=share)
    everything = {name: torch.ones_like(score, dtype=torch.bool) for name, score in found.items()}
    return problem.project(found, share, int8=everything if int8 else None)


def _share_within_latency(problem: Problem, settings: Settings) -> tuple[float, tuple[str, ...]]:
    """The largest share of weights, at most the density asked, whose network is fast enough.

    Found by bisection with the masks of LAMP, which is what a search starts from.
    """
    from .compression.compressed import Compressed
    from .compression.heuristics import METHODS, check_density

    limit = settings.max_latency_ms
    if limit is None:
        return settings.density, ()
    rule = settings.method if settings.method in METHODS else "lamp"

    def takes_ms(share: float) -> float:
        masks = _by_rule(problem, rule, share, settings.int8)
        compressed = Compressed.of(problem.model, masks, problem.groups.layout).eval()
        return 1e3 * _timing(problem, compressed, settings.latency_batch, rounds=1).latency_s["after"]

    if takes_ms(settings.density) <= limit:
        return settings.density, ()
    smallest = min(layer.weight.numel() for layer in problem.layers)
    low, high = 1 / smallest, settings.density
    fastest = takes_ms(low) if low < high else takes_ms(high)
    if fastest > limit:
        raise ConfigError(
            f"max_latency_ms = {limit:g}: even with {100 * min(low, high):.2g} % of its weights the network takes "
            f"{fastest:.3g} ms for {settings.latency_batch} images here; give more"
        )
    for _ in range(LATENCY_TRIES):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if takes_ms(middle) <= limit else (low, middle)
    check_density(low, problem.layers)
    return low, (f"density {low:.4g} instead of {settings.density:g}, to take at most {limit:g} ms",)


def _timing(problem: Problem, compressed: Compressed, batch: int, rounds: int = 3) -> Any:
    import torch

    from .compression.latency import side_by_side

    images = problem.data.x_validation
    rows = torch.arange(batch, device=images.device) % len(images)
    x = problem.data.normalise(images[rows])
    return side_by_side({"before": problem.model, "after": compressed}, x, rounds=rounds)


def _digest(module: nn.Module) -> str:
    import torch

    total = hashlib.sha256(str(module).encode())
    for name, tensor in module.state_dict().items():
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _file_bytes(module: nn.Module) -> int:
    """What the network takes when it is saved dense."""
    from safetensors.torch import save

    return len(save({k: v.detach().cpu().clone().contiguous() for k, v in module.state_dict().items()}))


def _save(module: nn.Module, file: Path) -> None:
    from safetensors.torch import save_file

    partial = file.with_name(file.name + ".partial")
    save_file({k: v.detach().cpu().clone().contiguous() for k, v in module.state_dict().items()}, partial)
    partial.replace(file)


def _write(file: Path, text: str) -> None:
    """All of it or none of it."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
