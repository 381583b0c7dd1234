"""What training a child costs beside the training itself: a row of ``bench_search_loop.py``."""

from __future__ import annotations

import math
import statistics

import torch
from harness import interleaved
from torch import nn
from torch.nn import functional as F

from rlnas_fast.evaluators.train_child import TrainChild
from rlnas_fast.search import Architecture, Budget, Request
from rlnas_fast.spaces.chain_cnn import ChainCNN
from rlnas_fast.tasks.digits import digits
from rlnas_fast.training.recipe import Recipe

# Nothing that the loop by hand does not do too.
RECIPE = Recipe(augment=(), label_smoothing=0.0)
LAYERS = ("conv3x3-20", "pool3x3/2", "conv3x3-32", "fc-64", "end")


def inside_over_by_hand(quick: bool) -> float:
    """Seconds to train a child through ``TrainChild`` over those of the same loop written by hand."""
    torch.set_num_threads(1)
    task = digits()
    space = ChainCNN(task.spec)
    names = space.decisions[0].choices
    architecture = Architecture(space.name, tuple(names.index(layer) for layer in LAYERS))
    request = Request(architecture, Budget(8), 0)
    evaluator = TrainChild(space, task, RECIPE, threads=1)
    mean, std = task.mean[0], task.std[0]
    data = [
        part
        for split in (task.train, task.validation)
        for part in ((torch.tensor(split.x).float() - mean) / std, torch.tensor(split.y))
    ]

    def by_hand() -> None:
        torch.manual_seed(0)
        network = space.build(architecture, task.spec).to(memory_format=torch.channels_last)
        _train_by_hand(network, *data, epochs=8)

    times = interleaved(
        {"ours": lambda: evaluator.train(request), "by hand": by_hand}, repeats=9 if quick else 31, warmup=2
    )
    return statistics.median(a / b for a, b in zip(times["ours"], times["by hand"], strict=True))


def _train_by_hand(
    network: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    x_validation: torch.Tensor,
    y_validation: torch.Tensor,
    epochs: int,
) -> float:
    size = RECIPE.batch_size
    steps = len(x) // size
    warmup = RECIPE.warmup * epochs * steps
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=RECIPE.learning_rate, weight_decay=RECIPE.weight_decay, fused=True
    )
    accuracy = 0.0
    for epoch in range(epochs):
        network.train()
        order = torch.randperm(len(x))
        for step in range(steps):
            done = epoch * steps + step
            fall = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (epochs * steps - warmup)))
            optimizer.param_groups[0]["lr"] = RECIPE.learning_rate * (
                (done + 1) / warmup if done < warmup else fall
            )
            rows = order[step * size : (step + 1) * size]
            loss = F.cross_entropy(network(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        network.eval()
        with torch.no_grad():
            answers = network(x_validation)
            accuracy = (answers.argmax(1) == y_validation).float().mean().item()
            F.cross_entropy(answers, y_validation).item()
    return accuracy
