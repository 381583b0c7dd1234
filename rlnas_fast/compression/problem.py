"""A trained network, its task, and what becomes of its accuracy under a mask."""

from __future__ import annotations

import copy
import hashlib
import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import ConfigError, ShapeError
from ..search import Budget, Measurement
from ..training.data import DeviceData, Task, on_device
from ..training.loop import evaluate, train
from ..training.recipe import Recipe
from . import layers as masking
from .compressed import save_tensors
from .heuristics import project, scores
from .layers import Masks, prunable
from .operations import Groups

__all__ = ["FINE_TUNING", "Evaluation", "Memory", "Prices", "Problem", "fine_tune", "fingerprint"]

# A tenth of the rate that a network is trained with.
FINE_TUNING = Recipe(learning_rate=0.0005, batch_size=64, label_smoothing=0.0, augment=())


@dataclass(frozen=True)
class Evaluation:
    """How good a network is under a mask.

    Attributes:
        accuracy: fraction of the validation split that is right.
        loss: mean cross entropy there.
        density: share of weights that stay.
        bits: what they cost (``layers.bits``).
    """

    accuracy: float
    loss: float
    density: float
    bits: int


@dataclass(frozen=True)
class Prices:
    """What an agent is rewarded for: validation accuracy, minus what is charged for the rest.

    Attributes:
        density: for the share of weights kept (1 is the whole network), in fractions of accuracy.
        reconstruction: for the relative error with which the autoencoder gives the groups back.
        latency_ms: for a millisecond of measured latency.
        latency_batch: images in the pass that is measured.
    """

    density: float = 0.0
    reconstruction: float = 0.0
    latency_ms: float = 0.0
    latency_batch: int = 64

    def __post_init__(self) -> None:
        for name in ("density", "reconstruction", "latency_ms"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"price of {name} = {value}: give a number of at least 0")
        if self.latency_batch < 1:
            raise ConfigError(f"latency_batch = {self.latency_batch}: give at least 1")

    def reward(
        self, accuracy: float, *, density: float, reconstruction: float = 0.0, latency_s: float = 0.0
    ) -> float:
        """The number to maximise."""
        return (
            accuracy
            - self.density * density
            - self.reconstruction * reconstruction
            - self.latency_ms * 1e3 * latency_s
        )


class Memory(Protocol):
    """Remembers evaluations beyond the process; ``storage.measurement_cache.SqliteCache`` is one."""

    def get(self, key: str) -> Measurement | None: ...

    def put(self, key: str, measurement: Measurement) -> None: ...


class Problem:
    """Evaluates masks of one trained network on the validation split of its task.

    The network that is given is never changed: the problem has a copy.

    Args:
        model: the trained network.
        task: what it was trained for.
        device: where to evaluate.
        recipe: of fine-tuning.
        groups: what is kept or pruned as one.
        memory: where evaluations are remembered; those it holds are not made again.
        seed: of the order of images in fine-tuning.
        gains: a folder for the tensors that evaluations found beside (``recall``), or None to keep none.

    Attributes:
        layers: those that can be compressed, of the copy.
        evaluations: how many different masks were asked for, remembered ones among them.

    Raises:
        ConfigError: no layer can be compressed, or weights are NaN.
        ShapeError: the network does not take the task's images, or does not answer with one number a class.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        *,
        device: str | torch.device = "cpu",
        recipe: Recipe = FINE_TUNING,
        groups: Groups | None = None,
        memory: Memory | None = None,
        seed: int = 0,
        gains: Path | None = None,
    ) -> None:
        found = prunable(model)
        self.device = torch.device(device)
        self.task = task
        self.recipe = recipe
        self.groups = groups or Groups()
        self.seed = seed
        self.model = copy.deepcopy(model).to(self.device).eval()
        # A copy does not share what views of one weight shared, so the layers are those of the original.
        names = {layer.name for layer in found}
        layers = tuple(layer for layer in prunable(self.model) if layer.name in names)
        self.layers = replace(found, layers=layers)
        self.data = DeviceData.of(task, self.device)
        self.evaluations = 0
        self._memory = memory
        self._gains = gains
        self._known: dict[str, Evaluation] = {}
        self._identity: str | None = None
        _check_answer(self.model, self.data, task)

    def project(
        self, scored: Mapping[str, Tensor], density: float, *, int8: Mapping[str, Tensor] | None = None
    ) -> Masks:
        """``heuristics.project`` with this problem's groups."""
        return project(
            scored, density, groups=None if self.groups.kind == "weights" else self.groups, int8=int8
        )

    def by_rule(self, method: str, density: float, *, int8: bool = False) -> Masks:
        """The masks of a published rule; with ``int8`` everything that stays is int8."""
        found = scores(method, self.layers, density=density)
        everything = {name: torch.ones_like(score, dtype=torch.bool) for name, score in found.items()}
        return self.project(found, density, int8=everything if int8 else None)

    def images(self, batch: int) -> Tensor:
        """A normalised batch of validation images, for timing; repeated where there are too few."""
        images = self.data.x_validation
        return self.data.normalise(images[torch.arange(batch, device=self.device) % len(images)])

    def evaluate(self, masks: Mapping[str, Tensor], fine_tune_steps: int = 0) -> Evaluation:
        """Accuracy and loss on the validation split under ``masks``, which must name every layer.

        With ``fine_tune_steps`` a copy is trained for so many steps first.  The same question is answered
        from memory, and counts once.
        """
        masking.check_masks(self.layers, masks)
        key = f"{masking.digest(masks)}/{fine_tune_steps}"
        if key not in self._known:
            self.evaluations += 1
            accuracy, loss, _ = self.recall(
                f"evaluate {fine_tune_steps}", masks, lambda: (*self._evaluate(masks, fine_tune_steps), {})
            )
            self._known[key] = Evaluation(accuracy, loss, masking.density(masks), masking.bits(masks))
        return self._known[key]

    def recall(
        self,
        question: str,
        masks: Mapping[str, Tensor],
        answer: Callable[[], tuple[float, float, dict[str, Tensor]]],
    ) -> tuple[float, float, dict[str, Tensor]]:
        """What ``answer`` gives, or what it gave to this question about these masks in an earlier process.

        This is how a search that was killed goes on: it asks the same questions again, in the same order, and
        those in the log cost nothing.

        Args:
            question: everything that the answer depends on beside the network, the data and the masks.
            answer: (accuracy, loss, tensors found beside).
        """
        if self._memory is None:
            return answer()
        key = self._key(question, masks)
        found = self._memory.get(key)
        if found is not None and found.accuracy is not None and found.loss is not None:
            if not found.extra.get("tensors"):
                return found.accuracy, found.loss, {}
            file = None if self._gains is None else self._gains / f"{key}.safetensors"
            if file is not None and file.is_file():
                return found.accuracy, found.loss, load_file(file, device=str(self.device))
        accuracy, loss, tensors = answer()
        if tensors:
            if self._gains is None:
                return accuracy, loss, tensors
            self._gains.mkdir(exist_ok=True)
            save_tensors(tensors, self._gains / f"{key}.safetensors")
        extra = {"tensors": 1.0} if tensors else {}
        self._memory.put(key, Measurement(accuracy=accuracy, loss=loss, extra=extra))
        return accuracy, loss, tensors

    def fine_tune(self, masks: Mapping[str, Tensor], epochs: int, seed: int | None = None) -> nn.Module:
        """A copy of the network, trained under ``masks`` (``fine_tune``)."""
        seed = self.seed if seed is None else seed
        return fine_tune(self.model, masks, self.data, epochs, self.recipe, seed, self.groups.layout)

    def accuracy(self, module: nn.Module) -> tuple[float, float]:
        """(accuracy, loss) of any network on the validation split."""
        return evaluate(module, self.data, self.data.x_validation, self.data.y_validation, self.recipe)

    def test_accuracy(self, module: nn.Module) -> float:
        """Accuracy on the test split, to be read once, for what is reported."""
        x, y = on_device(self.task.test_split(), self.device)
        return evaluate(module, self.data, x, y, self.recipe)[0]

    def _evaluate(self, masks: Mapping[str, Tensor], steps: int) -> tuple[float, float]:
        if not steps:
            with masking.masked(self.model, masks, self.groups.layout):
                return self.accuracy(self.model)
        rows = torch.randperm(len(self.data.x), generator=torch.Generator().manual_seed(self.seed))
        rows = rows[: steps * self.recipe.batch_size].to(self.device)
        some = replace(self.data, x=self.data.x[rows], y=self.data.y[rows])
        epochs = -(-steps // max(1, len(rows) // self.recipe.batch_size))
        tuned = fine_tune(self.model, masks, some, epochs, self.recipe, self.seed, self.groups.layout)
        return self.accuracy(tuned)

    def _key(self, question: str, masks: Mapping[str, Tensor]) -> str:
        if self._identity is None:
            parts = {
                "network": fingerprint(self.model),
                "data": self.task.data_hash,
                "recipe": asdict(self.recipe),
                "device": f"{self.device.type} {platform.machine()}",
                "torch": torch.__version__,
                "seed": self.seed,
            }
            self._identity = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        int8 = any(mask.dtype != torch.bool for mask in masks.values())
        parts_of_key = (self._identity, masking.digest(masks), question, self._layout_name() if int8 else "")
        return hashlib.sha256("/".join(parts_of_key).encode()).hexdigest()

    def _layout_name(self) -> str:
        orders = {
            name: [None if order is None else order.tolist() for order in pair]
            for name, pair in self.groups.layout.orders.items()
        }
        return json.dumps([self.groups.layout.tile, orders], sort_keys=True)


def fingerprint(module: nn.Module) -> str:
    """One name for equal networks with equal weights, and only for them."""
    total = hashlib.sha256(str(module).encode())
    for name, tensor in module.state_dict().items():
        total.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        total.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def fine_tune(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    data: DeviceData,
    epochs: int,
    recipe: Recipe = FINE_TUNING,
    seed: int = 0,
    layout: masking.Layout | None = None,
) -> nn.Module:
    """A copy of ``model``, trained under ``masks``; pruned weights are exactly zero, before and after.

    int8 weights are rounded in every forward pass, and gradients go straight through.

    Args:
        model: on the data's device; stays as it is.
        epochs: 0 only applies the masks.

    Returns:
        In eval mode; int8 weights have the values they stand for.
    """
    tuned = copy.deepcopy(model)
    for name, mask in masks.items():
        masking_of = _Masking(name, mask, layout)
        parametrize.register_parametrization(tuned.get_submodule(name), "weight", masking_of, unsafe=True)
    if epochs:
        train(tuned, data, recipe, Budget(epochs), device=data.x.device, seed=seed)
    for name in masks:
        parametrize.remove_parametrizations(tuned.get_submodule(name), "weight", leave_parametrized=True)
    return tuned.eval()


class _Masking(nn.Module):
    """The weight of a layer as its mask leaves it."""

    def __init__(self, name: str, mask: Tensor, layout: masking.Layout | None) -> None:
        super().__init__()
        self.name, self.mask, self.layout = name, mask, layout

    def forward(self, weight: Tensor) -> Tensor:
        return masking.effective(self.name, weight, self.mask, self.layout)


@torch.no_grad()
def _check_answer(model: nn.Module, data: DeviceData, task: Task) -> None:
    try:
        answer = model(data.normalise(data.x_validation[:2]))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ShapeError(
            f"the model does not take the images {task.spec.input_shape} of task {task.name!r}: {reason}"
        ) from error
    if tuple(answer.shape) != (2, task.spec.outputs):
        found = "x".join(map(str, answer.shape[1:]))
        raise ShapeError(
            f"task {task.name!r} has {task.spec.outputs} classes, the model's head answers with {found}; "
            "choose the task that the model was trained for"
        )
