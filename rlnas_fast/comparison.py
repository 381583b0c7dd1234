"""Strategies compared on tables: many seeded searches, in pieces that are kept, so that nothing runs twice.

The reward is what a searcher would see, the score that of the architecture with the best reward so far.
One trial is asked and told at a time.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from .components import Component, find, make
from .compose import TABLE_SPEC
from .errors import ConfigError
from .evaluators.tabular import Tabular
from .rl.threads import one_blas_thread, one_torch_thread
from .search import (
    Architecture,
    Budget,
    Measurement,
    Request,
    SearchContext,
    SearchSpace,
    Strategy,
    Trial,
)
from .search.archives import replace_file
from .strategies.novelty import enumerate_space

SEEDS_A_PIECE = 5


@dataclass(frozen=True)
class TableSource:
    """Where a table comes from; small, so that it can be sent to a worker.

    Attributes:
        name: for people.
        data: the file, in the format of ``evaluators.tabular``.
        reward: column that a search sees.
        score: column that its pick is judged by.
        space: which space the rows are of.
    """

    name: str
    data: Path
    reward: str
    score: str
    space: Component = Component(name="cell-201", options={"distinct": "cells"})  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Table:
    """A space with the reward and the score of each architecture by its choices, in percent."""

    space: SearchSpace
    reward: dict[tuple[int, ...], float]
    score: dict[tuple[int, ...], float]

    @cached_property
    def size(self) -> int:
        """How many different networks it has."""
        return len(
            {self.space.canonical_key(Architecture(self.space.name, choices)) for choices in self.reward}
        )


@dataclass(frozen=True)
class Plan:
    """Searches that differ in their seeds alone.

    Attributes:
        table: where.
        strategy: who; its options are checked before anything runs.
        seeds: 0 to ``seeds`` - 1.
        trials: distinct evaluations of each search.
        noise: standard deviation of the Gaussian noise on the reward, in percent points; the same for
            every strategy at the same seed and trial.
    """

    table: TableSource
    strategy: Component
    seeds: int
    trials: int
    noise: float = 0.0


Piece = tuple[Plan, int, Path]  # five searches of a plan, the first of their seeds, and where they are kept


@dataclass(frozen=True)
class Searches:
    """What the searches of a plan found.

    Attributes:
        scores: float [seeds, trials], of the pick after each evaluation.
        seconds: float [seeds], CPU time of asking and telling.
        evaluations: int [seeds]; below ``trials`` where the space had no more.
    """

    scores: np.ndarray
    seconds: np.ndarray
    evaluations: np.ndarray


@lru_cache(maxsize=8)
def read_table(data: Path, reward: str, score: str, space: str, options: str = "{}") -> Table:
    """Reads a table; ``options`` of the space are JSON.

    Raises:
        ConfigError, DataError: the space, the file or a column cannot be used; one line.
    """
    made = make("space", Component(name=space, options=json.loads(options)), TABLE_SPEC)
    evaluator = Tabular(made, data=str(data), reward_column=reward, score_column=score)
    rewards, scores = {}, {}
    for architecture in enumerate_space(made):
        measured = evaluator.evaluate(Request(architecture, Budget(epochs=1), 0))
        rewards[architecture.choices] = 100 * (measured.value("accuracy") or 0.0)
        scores[architecture.choices] = 100 * (measured.value("score") or 0.0)
    return Table(made, rewards, scores)


def table_of(source: TableSource) -> Table:
    """The table of a source; read once in each process."""
    options = json.dumps(source.space.options, sort_keys=True)
    return read_table(source.data, source.reward, source.score, source.space.name, options)


def search(
    strategy: Strategy, table: Table, trials: int, noise: float = 0.0, seed: int = 0
) -> tuple[np.ndarray, float]:
    """Scores of the pick after each evaluation, at most ``trials``, and the CPU seconds it took."""
    context, best, picked, scores = SearchContext(), -np.inf, 0.0, []
    errors = np.random.default_rng([seed, 1])
    start = time.process_time()
    for number in range(trials):
        asked = strategy.ask(1, context)
        if not asked:
            break
        reward = table.reward[asked[0].choices] + noise * errors.standard_normal()
        if reward > best:
            best, picked = reward, table.score[asked[0].choices]
        scores.append(picked)
        key = table.space.canonical_key(asked[0])
        measured = Measurement(accuracy=reward / 100)
        strategy.tell([Trial(number, number, asked[0], key, measured, reward)])
    return np.array(scores), time.process_time() - start


def compare(
    plans: Sequence[Plan],
    *,
    pieces: Path,
    jobs: int = 1,
    on_piece: Callable[[int, int], None] = lambda done, total: None,
) -> list[Searches]:
    """Runs what is missing of ``plans``, the first ones first, and answers with all of it in their order.

    Args:
        pieces: folder of what has been run; a piece is found again by the table, the strategy, its
            options and the code of both.
        jobs: processes.
        on_piece: told how many pieces are there, of how many.
    Raises:
        ConfigError, DataError: before anything runs.
    """
    for plan in plans:
        check(plan)
    wanted = [[(plan, first, _file(plan, first, pieces)) for first in _firsts(plan)] for plan in plans]
    missing = []
    for group in wanted:
        absent = [piece for piece in group if not piece[2].exists()]
        random.Random(os.getpid()).shuffle(absent)  # two runs on one folder seldom do the same piece
        missing += absent
    total = sum(map(len, wanted))
    done = total - len(missing)
    on_piece(done, total)
    for _ in _run(missing, jobs):
        done += 1
        on_piece(done, total)
    return [_joined(plan, group) for plan, group in zip(plans, wanted, strict=True)]


def check(plan: Plan) -> None:
    """Raises a ConfigError or DataError where a plan cannot be run."""
    if plan.seeds < 1 or plan.trials < 1 or plan.noise < 0:
        raise ConfigError(
            f"seeds = {plan.seeds}, budget = {plan.trials}, noise = {plan.noise}: give at least 1, 1 and 0"
        )
    _strategy(plan, 0)


def _strategy(plan: Plan, seed: int) -> Strategy:
    strategy: Strategy = make("strategy", plan.strategy, table_of(plan.table).space, seed=seed)
    return strategy


def _firsts(plan: Plan) -> range:
    return range(0, plan.seeds, SEEDS_A_PIECE)


def _run(missing: Sequence[Piece], jobs: int) -> Iterator[None]:
    if jobs == 1 or len(missing) < 2:
        for piece in missing:
            _run_piece(*piece)
            yield
        return
    with ProcessPoolExecutor(min(jobs, len(missing)), mp_context=get_context("spawn")) as pool:
        running = [pool.submit(_run_piece, *piece) for piece in missing]
        try:
            for future in as_completed(running):
                future.result()
                yield
        finally:
            pool.shutdown(cancel_futures=True)


def _run_piece(plan: Plan, first: int, file: Path) -> None:
    """The searches with seeds ``first`` to ``first`` + 4, whatever the plan's number of seeds."""
    if file.exists():  # made by another run meanwhile
        return
    table = table_of(plan.table)
    scores = np.full((SEEDS_A_PIECE, plan.trials), np.nan)
    seconds, evaluations = np.zeros(SEEDS_A_PIECE), np.zeros(SEEDS_A_PIECE, dtype=int)
    with one_blas_thread(), one_torch_thread():
        for row, seed in enumerate(range(first, first + SEEDS_A_PIECE)):
            found, seconds[row] = search(_strategy(plan, seed), table, plan.trials, plan.noise, seed)
            evaluations[row] = len(found)
            scores[row] = np.concatenate([found, np.repeat(found[-1:], plan.trials - len(found))])

    def write(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            np.savez_compressed(stream, scores=scores, seconds=seconds, evaluations=evaluations)

    replace_file(file, write)


def _joined(plan: Plan, pieces: Sequence[Piece]) -> Searches:
    parts = []
    for _, _, file in pieces:
        with np.load(file, allow_pickle=False) as archive:
            parts.append({name: archive[name] for name in ("scores", "seconds", "evaluations")})
    return Searches(*(np.concatenate([part[name] for part in parts])[: plan.seeds] for name in parts[0]))


def _file(plan: Plan, first: int, folder: Path) -> Path:
    source = plan.table
    parts = (
        _content(source.data, source.data.stat().st_mtime_ns), source.reward, source.score,
        source.space.model_dump_json(), plan.strategy.model_dump_json(), plan.trials, plan.noise, first,
        code_of(find("space", source.space.name)), code_of(find("strategy", plan.strategy.name)),
        inspect.getsource(search),
    )  # fmt: skip
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return folder / f"{key}.npz"


@lru_cache(maxsize=64)
def _content(path: Path, changed: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@lru_cache(maxsize=64)
def code_of(part: Any) -> str:
    """A hash of the file that defines ``part`` and of every file of ours that it imports, and they import."""
    ours = __name__.split(".")[0]
    seen: dict[str, bytes] = {}
    queue = [inspect.getmodule(part).__name__]  # type: ignore[union-attr]
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        try:
            spec = importlib.util.find_spec(name)
        except ModuleNotFoundError:  # not a module but what is imported from one
            spec = None
        if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
            continue
        seen[name] = Path(spec.origin).read_bytes()
        package = name if spec.submodule_search_locations else name.rpartition(".")[0]
        queue += [found for found in _imports(seen[name], package) if found.split(".")[0] == ours]
    text = itertools.chain.from_iterable((name.encode(), seen[name]) for name in sorted(seen))
    return hashlib.sha256(b"\0".join(text)).hexdigest()


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Names of the modules that a file imports, and of what it imports from them (which may be modules)."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
