"""The study of convolutional chains as a Markov decision process, without its leak.

An agent searches chains of layers; then 50 networks are generated without further updates and trained with
fresh seeds.  The study computed its rewards on the test set.  Here they come from a validation split, and
the test split is read for the networks that are reported, after the search.

Source: Sivaramakrishnan et al., Building Neural Networks using Deep Reinforcement Learning.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..components import make
from ..compose import Parts, build, resolve_device
from ..config import read_config
from ..errors import ConfigError, RunError, unknown_name
from ..evaluators.train_child import TrainChild
from ..ops import native
from ..report.chains import save_learning_curve, save_network_picture
from ..runs import Progress, Silent, search_in
from ..search import Architecture, Budget, Measurement, Request, SearchContext, Trial, child_seed
from ..search.trial import measurement_key
from ..storage.measurement_cache import SqliteCache
from ..strategies.random import RandomSearch
from ..training.recipe import Recipe

STRATEGIES = ("q-learning", "ppo", "sb3:maskable-ppo")
GENERATED = 50

# Mean test accuracy (%) of 50 generated networks, its deviation, and mean depth, where published.
PUBLISHED: dict[tuple[str, bool, str], str] = {
    ("mnist3", False, "q-learning"): "99.55 %, depth 5.48",
    ("mnist3", False, "ppo"): "99.63 %, depth 1.58",
    ("cifar5", False, "q-learning"): "67.14 ± 5.40 %",
    ("cifar5", False, "ppo"): "67.95 ± 3.14 %",
    ("cifar5", True, "q-learning"): "67.51 ± 7.01 %, parameters down by two orders",
    ("cifar5", True, "ppo"): "66.52 ± 7.07 %, parameters down by two orders",
    ("cifar10", False, "q-learning"): "56.69 ± 8.59 %",
    ("cifar10", False, "ppo"): "57.65 ± 4.54 %",
}

# (trials, epsilon): Baker et al.'s schedule as the study shortened it.
EPSILONS = ((1400, 1.0), (200, 0.8), (150, 0.6), (150, 0.4), (200, 0.2), (600, 0.1))


@dataclass(frozen=True)
class Schedule:
    """What the document says, or leaves open, of one data set.

    Attributes:
        task: the data set, by its name in ``rlnas tasks``.
        classes: the classes to keep; None keeps all.  The document does not name its three digits and five
            classes: 0, 1, 2 of MNIST have its counts of images (18,623 and 3,147).
        episodes: of the search, 2,700 for Q-learning in the document.
        train_size, validation_fraction: of each child of the search; None trains on all that validation
            leaves.
        epochs: of each child of the search.
        final_train_size, final_epochs: of each generated network.
        recipe: Adam, rate .01, batches of 100 and 5 epochs in the document; it names no schedule of the
            rate and no regularisation.
        beta: of the size penalty, which the document leaves open.
        networks_at_random: how many random networks are trained as the generated ones are.
    """

    task: str
    classes: tuple[int, ...] | None
    episodes: int
    train_size: int | None
    validation_fraction: float
    epochs: int
    final_train_size: int | None
    final_epochs: int
    recipe: Mapping[str, Any]
    beta: float
    networks_at_random: int


_PUBLISHED = {"learning_rate": 0.01, "batch_size": 100, "weight_decay": 0.0, "label_smoothing": 0.0}
_SHORT = {"learning_rate": 0.005, "batch_size": 32}
_FIVE = (0, 1, 2, 3, 4)

SCHEDULES: dict[str, dict[str, Schedule]] = {
    "full": {
        "mnist3": Schedule("mnist", (0, 1, 2), 2700, None, 0.2, 5, None, 5, _PUBLISHED, 0.07, 50),
        "cifar5": Schedule("cifar10", _FIVE, 2700, None, 0.2, 5, None, 5, _PUBLISHED, 0.01, 50),
        "cifar10": Schedule("cifar10", None, 2700, None, 0.2, 5, None, 5, _PUBLISHED, 0.01, 50),
    },
    "reduced": {
        "mnist3": Schedule("mnist", (0, 1, 2), 500, 1000, 0.5, 1, None, 1, _SHORT, 0.07, 0),
        "cifar5": Schedule("cifar10", _FIVE, 60, 5000, 0.2, 2, 5000, 2, _SHORT, 0.01, 60),
        "cifar10": Schedule("cifar10", None, 60, 5000, 0.2, 2, 5000, 2, _SHORT, 0.01, 60),
    },
}


@dataclass(frozen=True)
class Study:
    """One run of the study.

    Attributes:
        data: "mnist3", "cifar5" or "cifar10".
        strategy: "q-learning", "ppo" (ours) or "sb3:maskable-ppo" (the document's framework).
        penalty: the reward is accuracy less the size penalty.
        schedule: everything else about data and training.
        seed: of everything.
        generate: networks generated after the search.
        batch_size: children asked for at a time; the agent learns after each batch.  Twice as many as workers
            leave these little to wait for, as children take times of their own; but the agent learns later.
        space: options of chain-cnn.
        device, workers, threads: as in a search.
    """

    data: str
    strategy: str
    penalty: bool
    schedule: Schedule
    seed: int = 0
    generate: int = GENERATED
    batch_size: int = 2
    space: Mapping[str, Any] | None = None
    device: str = "auto"
    workers: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Networks:
    """Generated or random networks, each trained once with a seed of its own.

    Attributes:
        test_accuracy: mean, fraction; failed ones count as 0.
        deviation: standard deviation of the test accuracies.
        distinct: how many different networks there are.
        depth: mean number of layers, classifier not counted.
        parameters: mean.
        failed: how many could not be trained.
        accuracies: of each network, in the order of generation.
    """

    test_accuracy: float
    deviation: float
    distinct: int
    depth: float
    parameters: float
    failed: int
    accuracies: tuple[float, ...]


class SliceOver(RunError):
    """The minutes that were allowed are over; the same call goes on."""


def study(
    data: str,
    *,
    strategy: str = "q-learning",
    penalty: bool = False,
    schedule: str = "full",
    changes: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Study:
    """The study on ``data``; ``changes`` replace fields of its schedule, ``settings`` those of ``Study``.

    Raises:
        ConfigError: a name is unknown, or a number makes no sense.
    """
    for kind, name, known in (
        ("data", data, tuple(SCHEDULES["full"])),
        ("strategy", strategy, STRATEGIES),
        ("schedule", schedule, tuple(SCHEDULES)),
    ):
        if name not in known:
            raise unknown_name(f"{kind} of the experiment:", name, known)
    chosen = SCHEDULES[schedule][data]
    if schedule == "reduced":
        chosen = replace(chosen, recipe={**chosen.recipe, "dtype": _fastest_dtype()})
    chosen = replace(chosen, **dict(changes or {}))
    made = Study(data, strategy, penalty, chosen, **settings)
    for name, value in (
        ("episodes", chosen.episodes),
        ("epochs", chosen.epochs),
        ("final_epochs", chosen.final_epochs),
        ("generate", made.generate),
        ("batch_size", made.batch_size),
    ):
        if value < 1:
            raise ConfigError(f"{name} = {value}: give at least 1")
    return made


def run_study(
    settings: Study,
    folder: Path,
    *,
    cache: Path | None = None,
    max_minutes: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Runs the study in ``folder``, or goes on there; returns the summary that it also writes.

    Beside the files of a run the folder then has ``metaqnn.json``, ``network.png`` and ``learning.png``.

    Args:
        cache: measurements to share among studies (rewards may differ).
        max_minutes: stops after this long; the same call goes on.
    Raises:
        SliceOver: the minutes are over.
        RunError: the folder holds a study with other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record, now = folder / "study.json", json.dumps(_decisive(settings), indent=2)
    if record.exists() and json.loads(record.read_text()) != json.loads(now):
        raise RunError(f"{folder} holds a study with other settings: choose another --out")
    record.write_text(now)
    deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
    watch = _Deadline(progress or Silent(), deadline)
    parts = _parts(settings, cache or folder / "measurements.sqlite")

    def report(result: Any) -> dict[str, Any]:
        return _report(settings, parts, result.trials, folder, watch)

    return search_in(parts, folder, watch, replay=True, then=report)


def _parts(settings: Study, cache: Path) -> Parts:
    schedule = settings.schedule
    task = _task(schedule, schedule.train_size, schedule.validation_fraction)
    space = make("space", read_config({"space": _component("chain-cnn", settings.space)}).space, task.spec)
    evaluator = _evaluator(settings, space, task)
    reward = {"name": "size-penalty", "beta": schedule.beta} if settings.penalty else "accuracy"
    config = read_config(
        {
            "space": _component("chain-cnn", settings.space),
            "task": schedule.task,
            "strategy": _strategy(settings),
            "reward": reward,
            "trials": schedule.episodes,
            "batch_size": settings.batch_size,
            "epochs": schedule.epochs,
            "seed": settings.seed,
            "device": settings.device,
            "workers": settings.workers,
            "threads": settings.threads,
            "cache": str(cache),
        }
    )
    return build(config, {"task": task, "space": space, "evaluator": evaluator})


def _task(schedule: Schedule, train_size: int | None, fraction: float) -> Any:
    options = {"classes": schedule.classes, "train_size": train_size, "validation_fraction": fraction}
    return make("task", read_config({"task": _component(schedule.task, options)}).task)


def _fastest_dtype() -> str:
    """Of a short schedule: children train some 1.75 times faster where the processor multiplies bfloat16."""
    return "bfloat16" if "avx512_bf16" in native.cpu().usable_isas() else "float32"


def _component(name: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {"name": name, "options": dict(options or {})}


def _evaluator(settings: Study, space: Any, task: Any) -> TrainChild:
    device = resolve_device(settings.device)
    return TrainChild(space, task, Recipe(**settings.schedule.recipe), device, None, settings.threads)


def _strategy(settings: Study) -> dict[str, Any]:
    """The document's settings; with fewer episodes higher rates, and epsilon's steps in proportion.

    A state of Q-learning is the last layer alone, so that one-step returns never tell an early layer what it
    cost: the best of what may follow is the same for all.  2,700 episodes are the document's; fewer follow
    multi-step returns.
    """
    episodes = settings.schedule.episodes
    shortened = max(1.0, 2700 / episodes)
    match settings.strategy:
        case "q-learning":
            return {
                "name": "q-learning", "allow_repeats": True, "learning_rate": min(0.01 * shortened, 0.1),
                "replays": 30, "trace": 0.9 if shortened > 1 else 0.0, "scale": "none",
                "epsilon": epsilon_steps(episodes),
            }  # fmt: skip
        case "ppo":
            return {"name": "ppo", "allow_repeats": True, "clip": 0.2, "learning_rate": 0.01 * shortened**0.5}
    rate = 3e-4 * shortened**0.5
    return {"name": settings.strategy, "learning_rate": rate, "n_steps": 64, "batch_size": 64}


def epsilon_steps(episodes: int) -> str:
    """The document's epsilons, each for its share of ``episodes``: "1x78,0.8x11,..."."""
    total = sum(trials for trials, _ in EPSILONS)
    return ",".join(f"{epsilon:g}x{max(1, round(trials * episodes / total))}" for trials, epsilon in EPSILONS)


def _report(
    settings: Study, parts: Parts, trials: Sequence[Trial], folder: Path, watch: _Deadline
) -> dict[str, Any]:
    """Generates networks, trains them, and writes what came of it."""
    generated: list[Architecture] = []
    while len(generated) < settings.generate:
        generated += parts.strategy.ask(settings.generate - len(generated), SearchContext())
    count = settings.schedule.networks_at_random
    chance = RandomSearch(parts.space, seed=settings.seed).ask(count, SearchContext()) if count else []
    task = _task(settings.schedule, settings.schedule.final_train_size, 0.2)
    evaluator = Tested(_evaluator(settings, parts.space, task))
    measured = _train(settings, parts, evaluator, (*generated, *chance), watch)
    agent = summed_up(parts.space, generated, measured[: len(generated)])
    baseline = summed_up(parts.space, chance, measured[len(generated) :]) if chance else None
    best = max(range(len(generated)), key=lambda i: measured[i].accuracy or -1.0)  # on validation
    layers = parts.space.shapes(generated[best])  # type: ignore[attr-defined]
    save_network_picture(layers, task.spec, folder / "network.png")
    save_learning_curve(
        trials, folder / "learning.png", "reward" if settings.penalty else "validation accuracy"
    )
    summary = {
        "data": settings.data,
        "task": settings.schedule.task,
        "strategy": settings.strategy,
        "penalty": settings.penalty,
        "episodes": len(trials),
        "failed_episodes": sum(trial.state == "failed" for trial in trials),
        "generated": asdict(agent),
        "random": asdict(baseline) if baseline else None,
        "gain": _gain(agent, baseline) if baseline else None,
        "published": PUBLISHED.get(
            (settings.data, settings.penalty, settings.strategy.removeprefix("sb3:maskable-"))
        ),
        "best": {
            "network": parts.space.describe(generated[best]),
            "choices": list(generated[best].choices),
            "validation_accuracy": measured[best].accuracy,
            "test_accuracy": measured[best].extra.get("test_accuracy"),
            "parameters": measured[best].parameters,
        },
        "folder": str(folder),
    }
    text = json.dumps(summary, indent=2)
    (folder / "metaqnn.json").write_text(text)
    read: dict[str, Any] = json.loads(text)
    return read


def _train(
    settings: Study, parts: Parts, evaluator: Tested, networks: Sequence[Architecture], watch: _Deadline
) -> list[Measurement]:
    """Each network trained with a seed of its own; what was trained before a stop is not trained again."""
    budget = Budget(settings.schedule.final_epochs)
    requests, keys = [], []
    identity = evaluator.identity()
    for number, network in enumerate(networks):
        key = parts.space.canonical_key(network)
        seed = child_seed(settings.seed, f"generated {number}: {key}")
        requests.append(Request(network, budget, seed))
        keys.append(measurement_key(identity, key, budget, seed))
    assert parts.config.cache is not None
    with SqliteCache(parts.config.cache) as cache:
        found = {i: m for i, key in enumerate(keys) if (m := cache.get(key)) is not None}
        missing = [i for i in range(len(keys)) if i not in found]
        for position, measurement, _ in parts.executor.run(evaluator, [requests[i] for i in missing]):
            cache.put(keys[missing[position]], measurement)
            found[missing[position]] = measurement
            watch.confirmed(len(found), len(keys))
    return [found[i] for i in range(len(keys))]


def summed_up(space: Any, networks: Sequence[Architecture], measured: Sequence[Measurement]) -> Networks:
    """Means over networks that were trained; a failed one has accuracy 0."""
    accuracies = tuple(m.extra.get("test_accuracy", 0.0) for m in measured)
    sizes = [m.parameters for m in measured if m.parameters is not None]
    return Networks(
        test_accuracy=statistics.fmean(accuracies),
        deviation=statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0,
        distinct=len({space.canonical_key(network) for network in networks}),
        depth=statistics.fmean(len(space.shapes(network)) for network in networks),
        parameters=statistics.fmean(sizes) if sizes else math.nan,
        failed=sum(m.failure is not None for m in measured),
        accuracies=accuracies,
    )


def _gain(agent: Networks, baseline: Networks) -> dict[str, float]:
    """Difference of the means, with the 95 % interval of Welch's normal approximation."""
    gain = agent.test_accuracy - baseline.test_accuracy
    error = math.hypot(
        agent.deviation / math.sqrt(len(agent.accuracies)),
        baseline.deviation / math.sqrt(len(baseline.accuracies)),
    )
    return {"mean": gain, "low": gain - 1.96 * error, "high": gain + 1.96 * error}


@dataclass
class Tested:
    """Trains a network that is to be reported, and reads the test split for it.

    Its measurements have ``test_accuracy`` among ``extra``.
    """

    trainer: TrainChild

    def identity(self) -> Mapping[str, str]:
        return {**self.trainer.identity(), "evaluator": "train-child, tested"}

    def evaluate(self, request: Request) -> Measurement:
        module, measurement = self.trainer.train(request)
        if module is None:
            return measurement
        extra = {**measurement.extra, "test_accuracy": self.trainer.test_accuracy(module)}
        return replace(measurement, extra=extra)

    def on_device(self, device: str) -> Tested:
        return Tested(self.trainer.on_device(device))


class _Deadline:
    """Hands progress on, and ends the study once its minutes are over."""

    def __init__(self, progress: Progress, deadline: float) -> None:
        self._progress = progress
        self._deadline = deadline
        self.note = progress.note
        self.started = progress.started
        self.measured = progress.measured

    def told(self, trials: Sequence[Trial]) -> None:
        self._progress.told(trials)
        self._check(f"{trials[-1].number + 1} episodes are done")

    def confirmed(self, done: int, total: int) -> None:
        self._progress.confirmed(done, total)
        if done < total:
            self._check(f"the search is done, and {done} of {total} networks are trained")

    def _check(self, state: str) -> None:
        if time.monotonic() >= self._deadline:
            raise SliceOver(f"the minutes are over: {state}; the same command goes on")


def _decisive(settings: Study) -> dict[str, Any]:
    """What the outcome depends on: workers do not change it."""
    return {name: value for name, value in asdict(settings).items() if name != "workers"}


def default_folder(settings: Study) -> Path:
    """Where a study is kept unless it is told: its settings' own folder below ``runs``."""
    digest = hashlib.sha256(json.dumps(_decisive(settings), sort_keys=True).encode()).hexdigest()[:8]
    parts = ["metaqnn", settings.data, settings.strategy.replace(":", "-")]
    return Path("runs") / "-".join([*parts, *(["penalty"] if settings.penalty else []), digest])
