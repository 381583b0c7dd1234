"""A run: its folder, how it starts, goes on after a crash, names its winner, and is read again."""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, TypeVar

import tomli_w

from . import __version__, search
from .components import Component, make
from .compose import Parts, build
from .config import SearchConfig, read_config
from .errors import ConfigError, ReplayMismatch, RunError
from .report.front import front_of, save_front_picture
from .search import Archive, Budget, Measurement, Request, SearchContext, Trial
from .search.goals import Adaptive, excess, volumes
from .search.rewards import within
from .storage.measurement_cache import SqliteCache
from .storage.sqlite_log import SqliteLog

COST_MODEL = "cost_model.json"
PACKAGES = ("torch", "numpy")
OBJECTS = ("space", "task", "strategy", "reward", "evaluator")  # what may be an object of the user's
OBJECT = "object "  # begins the name that it leaves in the record

Done = TypeVar("Done")


class Progress(Protocol):
    """Hears how a run goes on; what the command line draws."""

    def note(self, text: str) -> None: ...

    def started(self, folder: Path, done: Sequence[Trial], total: int) -> None: ...

    def measured(self, position: int, measurement: Measurement, seconds: float) -> None: ...

    def told(self, trials: Sequence[Trial]) -> None: ...

    def confirmed(self, done: int, total: int) -> None: ...


class Silent:
    """Progress that nobody watches."""

    def note(self, text: str) -> None: ...

    def started(self, folder: Path, done: Sequence[Trial], total: int) -> None: ...

    def measured(self, position: int, measurement: Measurement, seconds: float) -> None: ...

    def told(self, trials: Sequence[Trial]) -> None: ...

    def confirmed(self, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class RunResult:
    """What a finished run found.

    Attributes:
        folder: where everything is.
        trials: every trial, in order.
        pareto: the trials no other one beats in accuracy, latency and parameters.
        best: the chosen trial: of the best few, trained again with other seeds, the one with the
            highest mean reward; None when every child failed or none kept the limits.
        test_accuracy: of the chosen, trained network on the test split, which is read once; None where
            the evaluator does not train.
        summary: all of it as plain data, as in ``summary.json``.
    """

    folder: Path
    trials: tuple[Trial, ...]
    pareto: tuple[Trial, ...]
    best: Trial | None
    test_accuracy: float | None
    summary: dict[str, Any]


def run(*, out: str | Path | None = None, config: str | Path | None = None, **settings: Any) -> RunResult:
    """Runs a search to its end and returns what it found.

    Args:
        out: the new run folder; by default one below ``runs/``.
        config: a TOML file that ``settings`` are laid over.
        settings: any setting of ``SearchConfig``.  ``space``, ``task``, ``strategy``, ``reward`` and
            ``evaluator`` may be names, tables {"name": ..., option: ...}, or objects of your own;
            a function or class is called as ours are: ``space(task.spec)``, ``strategy(space, seed=...)``,
            ``evaluator(space, task)``.
    """
    names, objects = _split(settings)
    return start(read_config(names, Path(config) if config else None), out=out, objects=objects)


def resume_run(folder: str | Path, *, continue_from_log: bool = False, **objects: Any) -> RunResult:
    """Goes on with the run in ``folder``; ``objects`` are those that ``run`` was given."""
    return resume(Path(folder), objects=objects, continue_from_log=continue_from_log)


def start(
    config: SearchConfig,
    *,
    out: str | Path | None = None,
    objects: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> RunResult:
    """Starts a new run in ``out``, which must not hold anything yet."""
    parts = build(config, objects)
    if parts.config.evaluator.name == "train-child":
        from .costs import check_reachable

        check_reachable(parts)
    folder = _new_folder(Path(out) if out else None, config)
    _save_config(parts.config, folder)
    if parts.cost_model is not None:
        parts.cost_model.save(folder / COST_MODEL)
    return _go_on(parts, folder, progress or Silent(), replay=True)


def resume(
    folder: Path,
    *,
    objects: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    continue_from_log: bool = False,
    progress: Progress | None = None,
) -> RunResult:
    """Goes on where the log of ``folder`` ends; ``settings`` (more trials, say) replace saved ones."""
    config = saved_config(folder, settings)
    _check_not_fewer(folder, config)
    _check_given(folder, config, objects or {})
    kept = folder / COST_MODEL
    parts = build(config.model_copy(update={"cost_model": kept}) if kept.is_file() else config, objects)
    if settings:
        _save_config(config, folder)
    return _go_on(parts, folder, progress or Silent(), replay=not continue_from_log)


def saved_config(folder: Path, settings: Mapping[str, Any] | None = None) -> SearchConfig:
    """The effective configuration a run was started with."""
    file = folder / "config.toml"
    if not file.is_file():
        raise RunError(f"{folder} is not a run folder: it has no config.toml")
    return read_config(settings or {}, file)


def load_child(folder: str | Path, *, space: Any = None, name: str = "best") -> Any:
    """The trained network of a finished run, in eval mode, on the CPU.

    Args:
        name: "best", or that of another target's pick, such as "best-1ms".
        space: the object that was given to ``run`` in place of a named space.
    """
    folder = Path(folder)
    best = read_best(folder, name)
    spec = search.TaskSpec(
        tuple(best["task_spec"]["input_shape"]), best["task_spec"]["outputs"], best["task_spec"]["kind"]
    )
    if space is None:
        space = make("space", saved_config(folder).space, spec)
    elif not hasattr(space, "build") or isinstance(space, type):
        space = space(spec)
    weights = folder / f"{name}.safetensors"
    if not weights.is_file():
        raise RunError(
            f"{folder} has no {weights.name}: its evaluator {best['evaluator']!r} does not train networks"
        )
    from safetensors.torch import load_file

    module = space.build(search.Architecture(best["space"], tuple(best["choices"])), spec)
    module.load_state_dict(load_file(weights))
    return module.eval()


def read_best(folder: Path, name: str = "best") -> dict[str, Any]:
    """The winner of a finished run, as in ``best.json``; or another target's pick."""
    try:
        best: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{folder} has no winner to load ({error}); finish it with `rlnas resume {folder}`"
        ) from error
    return best


def versions() -> dict[str, str]:
    """What a replay may depend on."""
    packages = {name: version(name) for name in PACKAGES}
    return {"rlnas_fast": __version__, "python": platform.python_version()} | packages


def _go_on(parts: Parts, folder: Path, progress: Progress, *, replay: bool) -> RunResult:
    return search_in(
        parts, folder, progress, replay=replay, then=lambda result: _finish(parts, folder, result, progress)
    )


def search_in(
    parts: Parts,
    folder: Path,
    progress: Progress,
    *,
    replay: bool = True,
    then: Callable[[search.SearchResult], Done],
) -> Done:
    """Searches with log and cache in ``folder``, and answers with what ``then`` makes of the result.

    The workers of ``parts`` end afterwards.
    """
    config = parts.config
    with ExitStack() as stack:
        if hasattr(parts.executor, "close"):
            stack.callback(parts.executor.close)
        log = stack.enter_context(SqliteLog(folder / "trials.sqlite", durability=config.durability))
        cache = stack.enter_context(SqliteCache(config.cache or folder / "measurements.sqlite"))
        started_with = json.loads(log.meta.get("versions", "{}")) or versions()
        log.meta["versions"] = json.dumps(started_with)
        done = log.read()
        for note in log.notes:
            progress.note(note)
        progress.started(folder, done, config.trials)
        try:
            result = search.run_search(
                space=parts.space,
                strategy=parts.strategy,
                evaluator=parts.evaluator,
                reward=parts.reward,
                executor=parts.executor,
                log=log,
                cache=cache,
                trials=config.trials,
                batch_size=config.batch_size,
                budget=Budget(config.epochs, config.child_seconds),
                seed=config.seed,
                context=SearchContext(cost_model=parts.cost_model),
                limits=config.limits,
                max_seconds=config.max_seconds,
                replay=replay,
                on_measured=progress.measured,
                on_trials=progress.told,
            )
        except ReplayMismatch as error:
            raise ReplayMismatch(f"{error}{_changed(started_with)}") from error
        return then(result)


@dataclass(frozen=True)
class _Wish:
    """One network that a run is to end with.

    Attributes:
        limits: what it must keep.
        rank: larger is better; None ranks by reward.
        name: of its files, beside "best".
    """

    limits: Mapping[str, float]
    rank: Callable[[Measurement], float] | None = None
    name: str = "best"


@dataclass(frozen=True)
class _Pick:
    """What became of a wish."""

    wish: _Wish
    trial: Trial | None
    module: Any
    confirmations: dict[int, list[Measurement]]
    test_accuracy: float | None = None


def _wishes(parts: Parts, trials: Sequence[Trial]) -> list[_Wish]:
    """One for each target that is to be kept, the loosest first; else one, of the front or by reward."""
    config = parts.config
    aim = parts.reward if isinstance(parts.reward, Adaptive) else getattr(parts.reward, "reward", None)
    if isinstance(aim, Adaptive):
        cost = aim.cost
        targets = sorted(aim.targets, reverse=True)
        return [
            _Wish(
                {**config.limits, cost: min(target, config.limits.get(cost, target))},
                functools.partial(_meets_first, cost=cost, target=target),
                "best" if target == targets[0] else f"best-{_named(cost, target)}",
            )
            for target in targets
        ]
    if config.objectives:
        archive = Archive(config.objective_numbers)
        archive.add(trials)
        return [_Wish(config.limits, archive.nearness if archive.members else None)]
    return [_Wish(config.limits)]


def _named(cost: str, target: float) -> str:
    return f"{1e3 * target:g}ms" if cost == "latency_s" else f"{cost}-{target:g}"


def _meets_first(measurement: Measurement, cost: str, target: float) -> float:
    above = excess(measurement, cost, target)
    return -1.0 - above if above > 0 else measurement.accuracy or 0.0


def _finish(parts: Parts, folder: Path, result: search.SearchResult, progress: Progress) -> RunResult:
    """Confirms the best few, reads the test split once for each winner, and writes the report."""
    picks = []
    for wish in _wishes(parts, result.trials):
        pick = _confirm(parts, result.trials, progress, wish)
        if pick.module is not None:
            accuracy = parts.evaluator.test_accuracy(pick.module)  # type: ignore[attr-defined]
            pick = replace(pick, test_accuracy=accuracy)
        picks.append(pick)
    # an earlier winner stays until the new ones are known, and never beside weights that are not its own
    for file in (*folder.glob("best*.json"), *folder.glob("best*.safetensors")):
        file.unlink()
    for pick in picks:
        if pick.module is not None:
            _save_weights(pick.module, folder / f"{pick.wish.name}.safetensors")
        if pick.trial is not None:
            best = _best(parts, pick.trial, pick.confirmations, pick.test_accuracy)
            _write(folder / f"{pick.wish.name}.json", json.dumps(best, indent=2))
    chosen, test_accuracy = picks[0].trial, picks[0].test_accuracy
    summary = _summary(parts, result, picks)
    save_front_picture(result.trials, folder / "pareto.png", chosen.number if chosen else None)
    _write(folder / "summary.json", json.dumps(summary, indent=2))
    front = front_of(result.trials, parts.config.objective_numbers)
    return RunResult(folder, result.trials, front, chosen, test_accuracy, summary)


def _confirm(parts: Parts, trials: Sequence[Trial], progress: Progress, wish: _Wish) -> _Pick:
    """Trains the best few again with other seeds at the full budget."""
    config = parts.config
    allowed = [t for t in trials if t.state == "complete" and within(t.measurement, wish.limits)]
    ranks = {t.number: t.reward if wish.rank is None else wish.rank(t.measurement) for t in allowed}
    first_of = {
        trial.key: trial for trial in sorted(allowed, key=lambda trial: (ranks[trial.number], -trial.number))
    }
    finalists = sorted(first_of.values(), key=lambda trial: (-ranks[trial.number], trial.number))
    finalists = finalists[: config.confirm]
    if not finalists or not hasattr(parts.evaluator, "train"):
        return _Pick(wish, finalists[0] if finalists else None, None, {})
    budget = Budget(config.confirm_epochs or 2 * config.epochs)
    total = len(finalists) * config.confirm_seeds
    confirmations: dict[int, list[Measurement]] = {}
    best: tuple[float, Trial, Any] | None = None
    for trial in finalists:
        measured, networks = [], []
        for again in range(config.confirm_seeds):
            seed = search.child_seed(config.seed, f"confirm {again}: {trial.key}")
            module, measurement = parts.evaluator.train(Request(trial.architecture, budget, seed))
            measured.append(measurement)
            networks.append((measurement.accuracy or 0.0, again, module))
            progress.confirmed(len(confirmations) * config.confirm_seeds + again + 1, total)
        confirmations[trial.number] = measured
        mean = _mean_rank(parts, measured, trials, wish)
        if best is None or mean > best[0]:
            best = (mean, trial, max(networks, key=lambda entry: entry[:2])[2])
    assert best is not None
    return _Pick(wish, best[1], best[2], confirmations)


def _mean_rank(parts: Parts, measured: Sequence[Measurement], trials: Sequence[Trial], wish: _Wish) -> float:
    good = [m for m in measured if m.failure is None]
    values = parts.reward(good, trials) if wish.rank is None else [wish.rank(m) for m in good]
    floor = parts.reward.floor if wish.rank is None else min([*values, -1.0]) - 1.0
    values = values + [floor] * (len(measured) - len(good))
    return sum(values) / len(values)


def _best(
    parts: Parts,
    chosen: Trial,
    confirmations: Mapping[int, Sequence[Measurement]],
    test_accuracy: float | None,
) -> dict[str, Any]:
    return {
        "space": parts.space.name,
        "choices": list(chosen.architecture.choices),
        "key": chosen.key,
        "network": parts.space.describe(chosen.architecture),
        "task_spec": asdict(parts.task_spec),
        "evaluator": parts.config.evaluator.name,
        "trial": chosen.number,
        "reward": chosen.reward,
        "measurement": asdict(chosen.measurement),
        "confirmations": [asdict(m) for m in confirmations.get(chosen.number, [])],
        "test_accuracy": test_accuracy,
    }


def _summary(parts: Parts, result: search.SearchResult, picks: Sequence[_Pick]) -> dict[str, Any]:
    def row(trial: Trial) -> dict[str, Any]:
        m = trial.measurement
        return {
            "trial": trial.number,
            "network": parts.space.describe(trial.architecture),
            "accuracy": m.accuracy,
            "latency_s": m.cost.latency_s,
            "parameters": m.parameters,
            **{name: m.value(name) for name in objectives if name not in ("accuracy", "latency_s")},
            "reward": trial.reward,
            "caveats": list(m.cost.caveats),
        }

    trials, chosen = result.trials, picks[0].trial
    objectives = parts.config.objective_numbers
    return {
        "stopped": result.stopped,
        "trials": len(trials),
        "failed": sum(trial.state == "failed" for trial in trials),
        "from_cache": sum(trial.cached for trial in trials),
        "evaluation_seconds": sum(trial.seconds for trial in trials),
        "limits": dict(picks[0].wish.limits),
        "nearest_to_limits": _nearest(trials, picks[0].wish.limits) if chosen is None else {},
        "objectives": list(objectives),
        "pareto": [row(trial) for trial in front_of(trials, objectives)],
        "hypervolume": {str(k): v for k, v in volumes(trials, objectives).items()} if objectives else None,
        "picks": [
            {
                "limits": dict(pick.wish.limits),
                "network": None if pick.trial is None else row(pick.trial),
                "test_accuracy": pick.test_accuracy,
                "score": None if pick.trial is None else pick.trial.measurement.value("score"),
                "nearest": _nearest(trials, pick.wish.limits) if pick.trial is None else {},
                "file": f"{pick.wish.name}.json",
            }
            for pick in picks
        ],
        "chosen": row(chosen) if chosen else None,
        "confirmed_accuracy": {
            str(number): [m.accuracy for m in measured] for number, measured in picks[0].confirmations.items()
        },
        "test_accuracy": picks[0].test_accuracy,
        "score": chosen.measurement.value("score") if chosen else None,
        "evaluator": dict(parts.evaluator.identity()),
        "versions": versions(),
    }


def _nearest(trials: Sequence[Trial], limits: Mapping[str, float]) -> dict[str, float]:
    """For each limit, the least value that any trial reached."""
    seen = {name: [v for t in trials if (v := t.measurement.value(name)) is not None] for name in limits}
    return {name: min(values) for name, values in seen.items() if values}


def _split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings that a file can hold, and objects; an object leaves its type's name in the record."""
    names, objects = dict(settings), {}
    for kind in OBJECTS:
        value = names.get(kind)
        if value is not None and not isinstance(value, (str, Mapping, Component)):
            objects[kind] = value
            names[kind] = f"{OBJECT}{getattr(value, '__qualname__', type(value).__qualname__)}"
    return names, objects


def _holds_something(folder: Path) -> bool:
    """Whether anything is in ``folder`` but what a start that was killed left half-written."""
    return any(not entry.name.endswith(".partial") for entry in folder.iterdir())


def _new_folder(out: Path | None, config: SearchConfig) -> Path:
    stem = "-".join(
        [time.strftime("%Y%m%d-%H%M%S"), config.space.name, config.task.name, config.strategy.name]
    )
    folder = out or Path("runs") / re.sub(r"[^\w.-]+", "_", f"{stem}-{config.seed}")
    if (folder / "trials.sqlite").exists():
        raise RunError(
            f"{folder} holds a run already: go on with `rlnas resume {folder}` or choose another --out"
        )
    if folder.exists() and (not folder.is_dir() or _holds_something(folder)):
        raise RunError(f"{folder} is there and is not empty: choose another --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"cannot make the run folder {folder}: {error.strerror}") from error
    return folder


def _check_not_fewer(folder: Path, config: SearchConfig) -> None:
    """Refuses to go on with fewer trials than there are."""
    try:
        with SqliteLog.open_readonly(folder / "trials.sqlite") as log:
            done = len(log.read())
    except RunError:  # nothing was ever written to it; or what is wrong is said when it is opened to go on
        return
    if config.trials < done:
        raise ConfigError(f"trials = {config.trials}: {folder} has {done} already; give at least as many")


def _check_given(folder: Path, config: SearchConfig, objects: Mapping[str, Any]) -> None:
    """Refuses to go on without an object that the run was started with."""
    for kind in OBJECTS:
        component = getattr(config, kind)
        if kind not in objects and component is not None and component.name.startswith(OBJECT):
            raise RunError(
                f"{folder} was started with {kind} = {component.name}: give it again, from Python, with "
                f"rlnas_fast.resume_run({str(folder)!r}, {kind}=...)"
            )


def _save_config(config: SearchConfig, folder: Path) -> None:
    _write(folder / "config.toml", tomli_w.dumps(config.model_dump(mode="json", exclude_none=True)))


def _save_weights(module: Any, file: Path) -> None:
    from safetensors.torch import save_file

    partial = file.with_name(file.name + ".partial")
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in module.state_dict().items()}, partial
    )
    partial.replace(file)


def _write(file: Path, text: str) -> None:
    """All of it or none of it."""
    partial = file.with_name(file.name + ".partial")
    with partial.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _changed(before: Mapping[str, str]) -> str:
    now = versions()
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    return f" (changed since: {', '.join(changed)})" if changed else ""
