"""A compression: its folder, how it starts, goes on after a crash, and is read again."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .compose import resolve_device
from .compression_sources import Source, rebuilt, source_of, task_of
from .errors import ConfigError, DataError, RunError, unknown_name
from .runs import versions
from .storage.measurement_cache import SqliteCache
from .storage.writer_lock import WriterLock

if TYPE_CHECKING:
    from torch import nn

    from .compression.compressed import Compressed
    from .compression.layers import Masks
    from .compression.problem import Problem
    from .tasks.task import Task

SETTINGS, SUMMARY = "compression.json", "summary.json"
BASE, EVALUATIONS, GAINS = "base.safetensors", "evaluations.sqlite", "gains"

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
        layer_steps, layer_epochs: of the layer-by-layer procedure: steps for each layer, fine-tuning in each.
        price_density, price_reconstruction, price_latency_ms: of the reward (``compression.problem.Prices``);
            None is the procedure's own.
        base_epochs: of training a named network that comes without weights.
        max_latency_ms: keep fewer weights than asked where the compressed network is slower than this.
        latency_batch: images in the pass that is timed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    density: float = 0.1
    method: str = "ppo"
    procedure: Literal["search", "layerwise"] = "search"
    groups: str = "weights"
    int8: bool = False
    gather: bool = False
    evaluations: Annotated[int, Field(ge=1)] = 60
    fine_tune_steps: Annotated[int, Field(ge=0)] = 20
    epochs: Annotated[int, Field(ge=0)] = 1
    base_epochs: Annotated[int, Field(ge=1)] = 10
    layer_steps: Annotated[int, Field(ge=1)] = 8
    layer_epochs: Annotated[int, Field(ge=1)] = 1
    price_density: Price | None = None
    price_reconstruction: Price | None = None
    price_latency_ms: Price | None = None
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
        model: a trained module, which stays as it is; or a named network (``rlnas_fast.networks``), which
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
    made_task = task_of(task)
    source = source_of(model, made_task)
    _check(chosen, source, made_task)
    folder = _folder(out, source, made_task, chosen)
    with ExitStack() as stack:
        lock = WriterLock(folder / "compression.lock")
        stack.callback(lock.release)
        _same_settings(folder, chosen, source, made_task, task, where)
        progress.began(folder)
        cache = stack.enter_context(SqliteCache(folder / EVALUATIONS))
        for note in cache.notes:
            progress.note(note)
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
            f"{folder} was started with objects: call rlnas_fast.compress with the same ones and "
            f"out={str(folder)!r}"
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
            model = rebuilt(origin)
        except ConfigError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            raise DataError(f"{folder}: what network it was cannot be read ({reason})") from error
        if model is None:
            raise ConfigError(
                f"{folder} was made from a network of your own: give it, with any weights, as model="
            )
    return Compressed.load(folder, model)


def _settings(given: Mapping[str, Any]) -> Settings:
    try:
        return Settings.model_validate(dict(given))
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            raise unknown_name("setting", name, Settings.model_fields) from error
        raise ConfigError(f"{name} = {problem['input']!r}: {problem['msg']}") from error


def _check(settings: Settings, source: Source, task: Task) -> None:
    """Refuses what cannot be done before anything is written or trained."""
    from .compression.heuristics import METHODS, check_density
    from .compression.layers import prunable
    from .compression.operations import Groups
    from .compression.problem import Problem
    from .networks import make_network

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
    Problem(module, task, groups=groups).by_rule("lamp", settings.density, int8=settings.int8)


def _searches() -> tuple[str, ...]:
    """The methods that search."""
    from .compression.search import SEARCHES

    return tuple(SEARCHES)


def _folder(out: str | Path | None, source: Source, task: Task, settings: Settings) -> Path:
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
    folder: Path, settings: Settings, source: Source, task: Task, given_task: Any, device: str
) -> None:
    """Writes what this compression is, or refuses to go on with another one."""
    from .compression.compressed import write_whole
    from .compression.problem import fingerprint

    weights = None if source.module is None else fingerprint(source.module)
    now = {
        "settings": settings.model_dump(mode="json"),
        "model": source.given,
        "task": _said(given_task),
        "device": device,
        "weights": weights,
        "data": task.data_hash,
        "versions": versions(),
    }
    file = folder / SETTINGS
    if not file.exists():
        write_whole(file, json.dumps(now, indent=2))
        return
    try:
        before = json.loads(file.read_text())
    except ValueError as error:
        raise RunError(f"{file} cannot be read: {error}; choose another --out") from error
    then: dict[str, Any] = {**before["settings"], "weights": before["weights"], "data": before["data"]}
    for name, value in {
        **settings.model_dump(mode="json"),
        "weights": weights,
        "data": task.data_hash,
    }.items():
        if then.get(name) != value:
            raise RunError(
                f"{folder} holds a compression with {name} = {then.get(name)}, now it is {value}: "
                "choose another --out, or ask for the same"
            )


def _said(task: Any) -> Any:
    """The task as it can be asked for again, from any folder; None of an object."""
    if isinstance(task, str):
        return str(Path(task).resolve()) if task.endswith(".npz") else task
    return dict(task) if isinstance(task, Mapping) else None


def _base(
    source: Source, task: Task, settings: Settings, device: str, folder: Path, progress: Progress
) -> nn.Module:
    """The trained network: as given, from the folder, or trained now."""
    from safetensors.torch import load_file

    from .compression.base_network import train_network
    from .compression.compressed import save_tensors
    from .networks import make_network

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
    save_tensors(module.state_dict(), file)
    return module


def _compress(
    base: nn.Module,
    source: Source,
    task: Task,
    settings: Settings,
    device: str,
    folder: Path,
    cache: SqliteCache,
    progress: Progress,
) -> CompressionResult:
    from .compression.compressed import Compressed, write_whole
    from .compression.heuristics import METHODS
    from .compression.latency import density_within, side_by_side
    from .compression.operations import Groups, gathering
    from .compression.problem import Problem
    from .compression.report import save_allocation_picture, summarise

    started = time.monotonic()

    def problem_of(groups: Groups) -> Problem:
        return Problem(
            base, task, device=device, groups=groups, memory=cache, seed=settings.seed, gains=folder / GAINS
        )

    problem = problem_of(Groups.of(settings.groups))
    if settings.gather:
        squares = {layer.name: layer.weight.square() for layer in problem.layers}
        orders = gathering(problem.layers, squares, problem.groups.layout.tile, settings.density)
        problem = problem_of(Groups.of(settings.groups, orders))
    density = settings.density
    caveats: tuple[str, ...] = ()
    if settings.max_latency_ms is not None:
        density, caveats = density_within(
            problem,
            settings.density,
            settings.max_latency_ms,
            method=settings.method if settings.method in METHODS else "lamp",
            int8=settings.int8,
            batch=settings.latency_batch,
        )
    masks, network, history = _allocate(problem, density, settings, folder, progress)
    compressed = Compressed.of(network, masks, problem.groups.layout).eval()
    if settings.epochs:
        result = compressed.fine_tune(problem.data, settings.epochs, problem.recipe, settings.seed)
        if result.failure is not None:
            raise RunError(f"fine-tuning failed: {result.failure}; ask for a higher density or fewer epochs")
    timing = side_by_side(
        {"before": problem.model, "after": compressed}, problem.images(settings.latency_batch)
    )
    took_ms = 1e3 * timing.latency_s["after"]
    if settings.max_latency_ms is not None and took_ms > settings.max_latency_ms:
        caveats += (f"measured again at the end: {took_ms:.3g} ms, above the limit",)
    compressed.save(
        folder,
        {
            "origin": source.origin,
            "task": task.name,
            "classes": list(task.class_names),
            "mean": list(task.mean),
            "std": list(task.std),
        },
    )
    summary = {
        "model": source.name,
        "method": settings.method if settings.procedure == "search" else settings.procedure,
        "settings": settings.model_dump(mode="json"),
        **summarise(problem, masks, compressed, timing, (folder / "compressed.safetensors").stat().st_size),
        "history": history,
        "seconds": time.monotonic() - started,
        "versions": versions(),
    }
    summary["caveats"] = [*caveats, *summary["caveats"]]
    save_allocation_picture(summary, folder / "allocation.png")
    write_whole(folder / SUMMARY, json.dumps(summary, indent=2))
    shutil.rmtree(folder / GAINS, ignore_errors=True)
    return CompressionResult(compressed, masks, summary, folder)


def _allocate(
    problem: Problem, density: float, settings: Settings, folder: Path, progress: Progress
) -> tuple[Masks, nn.Module, list[dict[str, Any]]]:
    """What stays, of which network (the layer-by-layer procedure trains as it goes), and how it was found."""
    from .compression.heuristics import METHODS
    from .compression.layerwise import PRICES, Layerwise, Procedure
    from .compression.problem import Prices

    given = {"density": settings.price_density, "reconstruction": settings.price_reconstruction}
    given["latency_ms"] = settings.price_latency_ms
    own: dict[str, Any] = {name: price for name, price in given.items() if price is not None}
    own["latency_batch"] = settings.latency_batch
    if settings.procedure == "layerwise":
        procedure = Procedure(
            steps=settings.layer_steps,
            epochs=settings.layer_epochs,
            prices=replace(PRICES, **own),
        )
        network, masks, history = Layerwise(
            problem,
            density,
            procedure=procedure,
            int8=settings.int8,
            seed=settings.seed,
            folder=folder,
            on_step=lambda done, total: progress.stage("layer by layer", done, total),
        ).run()
        return masks, network, history
    if settings.method in METHODS:
        return problem.by_rule(settings.method, density, int8=settings.int8), problem.model, []
    from .compression.search import search

    found = search(
        problem,
        density=density,
        method=settings.method,
        evaluations=settings.evaluations,
        seed=settings.seed,
        int8=settings.int8,
        reward=Prices(**own),
        fine_tune_steps=settings.fine_tune_steps,
        log=lambda row: progress.stage("evaluations", row["evaluation"] + 1, settings.evaluations),
    )
    return found.states if settings.int8 else found.masks, problem.model, list(found.history)
