"""Which weights to keep: a learned allocation against published rules and black-box searches.

Fashion-MNIST, two networks, five seeds (of the split, the network's training and the searches).  Every search
makes 60 evaluations on 5,000 validation images, each after 20 steps of fine-tuning: the five rules' first, in
the end those of three candidates.  The n-th evaluation of all is on the same training images.  Ours carries
weights from one proposal to the next, the black boxes propose from the trained weights; whatever was carried,
every pick is fine-tuned from the trained weights for the same epoch, as every rule's is, and the test split
is scored once.  All methods keep exactly the same number of weights.  The rate of fine-tuning was chosen for
LAMP and ERK, the settings of the searches too, on other seeds and by validation accuracy.

Margins are means over the seeds, in points, against the rule that turned out best on the test split;
intervals are of 95 % (Student's t) and paired by seed.  Needs ``RLNAS_DATA_DIR`` with fashion_mnist.npz.
Runs in ``OMP_NUM_THREADS`` processes (all cores where it is not set) and keeps each result in
build/bench_sparsity_allocation (or ``RLNAS_CELLS_DIR``): a run that was ended goes on where it was.
``--part latency`` times one network and takes a minute.  ``--quick`` decides nothing.
"""

from __future__ import annotations

import copy
import functools
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import cell
from harness import Row, main
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from rlnas_fast.compression import agents, black_boxes, differentiable, features, heuristics, latency
from rlnas_fast.compression import search as searching
from rlnas_fast.compression.layers import Masks, bits, kept
from rlnas_fast.compression.operations import OPERATIONS, Groups, gathering, operate
from rlnas_fast.compression.problem import Problem
from rlnas_fast.search import Budget
from rlnas_fast.tasks.task import Task, make_task
from rlnas_fast.training.data import DeviceData
from rlnas_fast.training.loop import train
from rlnas_fast.training.recipe import Recipe

PIECES = Path(__file__).parent.parent / "build" / "bench_sparsity_allocation"
CODE = (agents, black_boxes, differentiable, features, heuristics, searching)
SEEDS = range(5)
STUDENT_T = 2.776  # two-sided, 95 %, four degrees of freedom
ZEROS = {80: 0.2, 90: 0.1, 95: 0.05, 98: 0.02}
MARGIN_POINTS = {80: -0.1, 90: -0.1, 95: 0.3, 98: 0.7}
RULES = ("uniform", "uniform+", "global", "lamp", "erk")
OURS = "ppo"
PEERS = {"random search": ("random", "random-ratios"), "CEM": ("cem", "cem-ratios")}
GRADUAL = "without agents and gradients"
ABLATION: dict[str, dict[str, Any]] = {
    "flat": {"hierarchical": False},
    "without autoencoder": {"autoencoder": False},
    "without curriculum": {"curriculum": 0.0},
    "without differentiable mask": {"differentiable": False},
    "without carried weights": {"carried": False},
    # Gradual magnitude pruning (Zhu and Gupta 2018): what is left when nothing is learned about the masks.
    GRADUAL: {
        "hierarchical": False,
        "differentiable": False,
        "budget_deviation": 0.0,
        "coefficient_deviation": 0.0,
    },
}
TRAINING_EPOCHS = 8
TILE, SWAPPED = (16, 16), 0.1


@dataclass(frozen=True)
class Cell:
    """One result: which network, seed and share of zeros, and what chose the weights."""

    network: str
    seed: int
    zeros: int
    method: str
    evaluations: int = 60


def lenet() -> nn.Sequential:
    """LeNet-300-100: 266,200 weights."""
    layers = (nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    return nn.Sequential(nn.Flatten(), *layers)


def convolutional() -> nn.Sequential:
    """Two strided convolutions and two linear layers: 65,400 weights, 0.63 MFLOPs."""
    convolutions = (nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(), nn.Conv2d(16, 32, 5, stride=2), nn.ReLU())
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(512, 100), nn.ReLU(), nn.Linear(100, 10))


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {"LeNet-300-100": lenet, "CNN": convolutional}


@functools.lru_cache(maxsize=len(SEEDS))
def task_of(seed: int) -> Task:
    with np.load(Path(os.environ["RLNAS_DATA_DIR"]) / "fashion_mnist.npz", allow_pickle=False) as file:
        train_split, test_split = (file["x_train"], file["y_train"]), (file["x_test"], file["y_test"])
    return make_task("fashion-mnist", train_split, test_split, validation_fraction=1 / 12, seed=seed)


def recipe_of(density: float) -> Recipe:
    """Of fine-tuning: the sparser, the faster."""
    rate = min(0.012, 6e-4 / density)
    return Recipe(learning_rate=rate, batch_size=128, label_smoothing=0.0, augment=())


def trained(network: str, seed: int) -> nn.Sequential:
    """The dense network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = NETWORKS[network]()

    def compute() -> np.ndarray:
        recipe = Recipe(learning_rate=1e-3, batch_size=128, label_smoothing=0.0, augment=())
        device = torch.device("cpu")
        data, budget = DeviceData.of(task_of(seed), device), Budget(TRAINING_EPOCHS)
        train(module, data, recipe, budget, device=device, seed=seed)
        found: np.ndarray = parameters_to_vector(module.parameters()).detach().numpy()
        return found

    weights = cell(f"dense {network} {seed} {TRAINING_EPOCHS}", (NETWORKS[network],), compute)
    vector_to_parameters(torch.from_numpy(weights), module.parameters())
    return module.eval()


def problem_of(network: str, seed: int, density: float, groups: Groups | None = None) -> Problem:
    module = trained(network, seed)
    return Problem(module, task_of(seed), recipe=recipe_of(density), seed=seed, groups=groups)


def result(which: Cell) -> np.ndarray:
    """Test accuracy (%), validation accuracy (%) at the end, kept weights, bits."""
    name = f"{which.network} {which.seed} {which.zeros} {which.method} {which.evaluations}"
    return cell(name, CODE, functools.partial(_compute, which))


def _compute(which: Cell) -> np.ndarray:
    torch.set_num_threads(1)
    density = ZEROS[which.zeros]
    if which.method == "dense":
        problem = problem_of(which.network, which.seed, density)
        return _scored(problem, problem.model, {})
    if which.method.startswith(("tiles", "swapped")):
        return _shuffled(which, density)
    problem = problem_of(which.network, which.seed, density)
    if which.method in RULES:
        masks = problem.by_rule(which.method, density)
    else:
        found = searching.search(
            problem,
            density=density,
            method=OURS if which.method in (*ABLATION, "int8") else which.method,
            evaluations=which.evaluations,
            seed=which.seed,
            int8=which.method == "int8",
            settings=searching.Settings(**ABLATION.get(which.method, {})),
        )
        masks = found.states if which.method == "int8" else found.masks
    return _scored(problem, problem.fine_tune(masks, 1), masks)


def _shuffled(which: Cell, density: float) -> np.ndarray:
    """LAMP's masks: of tiles, of tiles that weights were gathered into, of weights after random swaps."""
    groups = None if which.method == "swapped" else Groups("tiles", Groups.of("tiles:16x16").layout)
    problem = problem_of(which.network, which.seed, density, groups)
    if which.method == "tiles gathered":
        squares = {layer.name: layer.weight.square() for layer in problem.layers}
        orders = gathering(problem.layers, squares, TILE, density)
        problem = problem_of(which.network, which.seed, density, Groups.of("tiles:16x16", orders))
    if which.method == "swapped":
        module, chance = copy.deepcopy(problem.model), torch.Generator().manual_seed(which.seed)
        for name, weight in problem.layers.weights.items():
            count = int(SWAPPED * weight.numel() / 2)
            chosen = torch.randperm(weight.numel(), generator=chance)[:count].sort().values
            operations = torch.full((count,), OPERATIONS.index("shuffle"))
            state = torch.ones_like(weight, dtype=torch.uint8)
            moved, _ = operate(name, weight, state, problem.groups, chosen, operations)
            module.get_submodule(name).weight.data.copy_(moved)  # type: ignore[union-attr, operator]
        problem = Problem(module, problem.task, recipe=problem.recipe, seed=which.seed)
    masks = problem.by_rule("lamp", density)
    return _scored(problem, problem.fine_tune(masks, 1), masks)


def _scored(problem: Problem, module: nn.Module, masks: Masks) -> np.ndarray:
    accuracy = problem.test_accuracy(module), problem.accuracy(module)[0]
    return np.array([100 * accuracy[0], 100 * accuracy[1], kept(masks), bits(masks)])


def wanted(quick: bool) -> list[Cell]:
    """Every result that the tables need, those that decide first."""
    if quick:
        methods = (*RULES, OURS, "random", "cem")
        return [Cell("LeNet-300-100", 0, 98, method, 6) for method in methods]
    black_boxes = [method for pair in PEERS.values() for method in pair]
    plan: list[tuple[str, int, str]] = []
    for network in NETWORKS:
        plan += [(network, zeros, method) for zeros in reversed(ZEROS) for method in (*RULES, OURS)]
        plan += [(network, 98, method) for method in (*black_boxes, "amc", "int8", GRADUAL)]
        plan += [(network, 98, "dense")]
    plan += [("LeNet-300-100", 98, method) for method in (*ABLATION, "dqn", "swapped") if method != GRADUAL]
    plan += [("LeNet-300-100", 90, method) for method in ("tiles", "tiles gathered")]
    plan += [(network, 95, method) for network in NETWORKS for method in (*black_boxes, GRADUAL)]
    return [Cell(network, seed, zeros, method) for network, zeros, method in plan for seed in SEEDS]


def rows_of(found: dict[Cell, np.ndarray], quick: bool) -> list[Row]:
    """The table of a network and a share of zeros, margins first."""
    rows: list[Row] = []
    of: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    for which, values in sorted(found.items(), key=lambda item: item[0].seed):
        by_method = of.setdefault((which.network, which.zeros), {})
        before = by_method.get(which.method, np.zeros((0, 4)))
        by_method[which.method] = np.concatenate([before, values[None]])
    for (network, zeros), by_method in of.items():
        where = f"{network} {zeros} %"
        if quick:
            rows += [Row(f"{where} {name}", float(v[:, 0].mean()), unit="%") for name, v in by_method.items()]
            continue
        test = {name: values[:, 0] for name, values in by_method.items()}
        if OURS in test and "lamp" in test:
            rows += _margins(where, zeros, test)
            kept_by = {int(n) for name in (*RULES, OURS) for n in by_method[name][:, 2]}
            name = f"{where}: different numbers of kept weights"
            rows.append(Row(name, len(kept_by), 1, at_most=True, unit=""))
        if "int8" in test:
            row = _difference(f"{where} keep/int8/prune - keep/prune", test["int8"], test[OURS], must=1e-9)
            most = by_method["int8"][:, 3].max() / by_method[OURS][:, 3].min()
            rows += [row, Row(f"{where} int8: bits over those of keep/prune", most, 1.0, at_most=True)]
        ablation = [name for name in (*ABLATION, "dqn", "amc") if name in test]
        rows += [_difference(f"{where} {name} - {OURS}", test[name], test[OURS]) for name in ablation]
        if "swapped" in test:
            rows.append(_difference(f"{where} LAMP after swaps - LAMP", test["swapped"], test["lamp"]))
        if "tiles" in test:
            gathered = test["tiles gathered"]
            rows.append(_difference(f"{where} LAMP tiles gathered - as they are", gathered, test["tiles"]))
        for name, values in test.items():
            mean, half = interval(values)
            validation = f"{mean:.2f} ± {half:.2f}; validation {by_method[name][:, 1].mean():.2f}"
            rows.append(Row(f"{where} {name}", mean, unit="%", detail=validation))
    return rows


def _margins(where: str, zeros: int, test: dict[str, np.ndarray]) -> list[Row]:
    best = max(RULES, key=lambda name: float(test[name].mean()))
    mean, half = paired(test[OURS], test[best])
    detail = f"best rule {best}, [{mean - half:+.2f}, {mean + half:+.2f}]"
    rows = [Row(f"{where} {OURS} - best rule", mean, MARGIN_POINTS[zeros], unit="points", detail=detail)]
    for peer, ways in PEERS.items():
        if all(way in test for way in ways):
            better = max(ways, key=lambda name: float(test[name].mean()))
            row = _difference(
                f"{where} {OURS} - {peer}",
                test[OURS],
                test[better],
                must=1e-9 if zeros == 98 else None,
                aim=1e-9,
                note=f"the better of {' and '.join(ways)}: {better}; ",
            )
            rows.append(row)
    return rows


def paired(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Mean of the differences, and half their 95 % interval for as few values as these."""
    return interval(ours - theirs)


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half its 95 % interval."""
    half = STUDENT_T * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def _difference(
    name: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    *,
    must: float | None = None,
    aim: float | None = None,
    note: str = "",
) -> Row:
    """The lower end of the paired interval."""
    mean, half = paired(ours, theirs)
    detail = f"{note}{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    return Row(f"{name}: low end", mean - half, must=must, aim=aim, unit="points", detail=detail)


def measure_latency(quick: bool) -> list[Row]:
    """LeNet-300-100 at 90 % zeros in gathered tiles, on our kernels and on dense ones."""
    _check_data()
    plain = problem_of("LeNet-300-100", 0, 0.1)
    squares = {layer.name: layer.weight.square() for layer in plain.layers}
    orders = gathering(plain.layers, squares, (32, 32), 0.1)
    problem = problem_of("LeNet-300-100", 0, 0.1, Groups.of("tiles", orders))
    masks, rows = problem.by_rule("lamp", 0.1), []
    cores = torch.get_num_threads()
    for threads in sorted({1, cores}):
        torch.set_num_threads(threads)
        found = latency.twins(problem, masks, epochs=1, batch=64, rounds=3 if quick else 9)
        seconds = ", ".join(f"{name} {1e3 * value:.3g}" for name, value in found.timing.latency_s.items())
        name = f"LeNet-300-100 90 % tiles, batch 64, {threads} thread{'s' * (threads > 1)}"
        caveats = "".join(f"; {caveat}" for caveat in found.timing.caveats)
        off = abs(found.accuracy - found.dense_accuracy)
        rows += [
            Row(f"{name}: dense / ours", found.speedup, 1.8, detail=f"{seconds} ms{caveats}"),
            Row(f"{name}: accuracy off that of the dense twin", off, 1e-4, unit="", at_most=True),
        ]
    torch.set_num_threads(cores)
    return rows


def measure(quick: bool) -> list[Row]:
    """Accuracies of every method."""
    _check_data()
    jobs = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
    every = wanted(quick)
    networks = sorted({(which.network, which.seed) for which in every})
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_prepare, networks))
        found = dict(zip(every, pool.map(result, every), strict=True))
    return rows_of(found, quick)


def _check_data() -> None:
    if "RLNAS_DATA_DIR" not in os.environ:
        sys.exit("set RLNAS_DATA_DIR to the folder that holds fashion_mnist.npz")
    os.environ.setdefault("RLNAS_CELLS_DIR", str(PIECES))


def _prepare(which: tuple[str, int]) -> None:
    torch.set_num_threads(1)
    trained(*which)


if __name__ == "__main__":
    main(__doc__, {"accuracy": measure, "latency": measure_latency}, processes=1)
