"""Batches to train on and to validate with, from a task or from a user's own loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError, DataError
from ..training.augmentation import AUGMENTATIONS
from ..training.data import DeviceData
from ..training.recipe import Recipe
from ..training.robustness import Corruption, corrupted

__all__ = ["Batch", "Batches", "LoaderBatches", "TaskBatches"]

CLEAN = "clean"


class Batch(NamedTuple):
    """Samples x [B, ...] as the network takes them, labels y [B] int64, and how they were taken."""

    x: Tensor
    y: Tensor
    regime: str = CLEAN


class Batches(Protocol):
    """What the training procedure takes its batches from."""

    @property
    def validation(self) -> Sequence[Batch]:
        """The batches to validate with; the same ones every time."""
        ...

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def epoch(self, number: int) -> Iterator[Batch]:
        """The training batches of an epoch, from 0; the same ones whenever the number is the same."""
        ...


class TaskBatches:
    """Batches of a task that lives on the device, normalised and augmented, each under a drawn regime.

    Args:
        data: on its device.
        recipe: its batch size; the rest of an epoch that fills no batch is left out.
        augment: names of augmentations.
        regimes: "clean", or corruptions such as "noise:0.5" and "blur"; a training batch gets one of them at
            random, every validation batch comes under each.
        validation_batch: about how many images a validation batch has.
        seed: of everything that is drawn.
    Raises:
        ConfigError: an unknown regime.
    """

    def __init__(
        self,
        data: DeviceData,
        recipe: Recipe,
        augment: Sequence[str],
        regimes: Sequence[str],
        *,
        validation_batch: int,
        seed: int,
    ) -> None:
        self._data, self._augment, self._seed = data, tuple(augment), seed
        self._batch = min(recipe.batch_size, len(data.x))
        self._regimes = tuple((name, None if name == CLEAN else Corruption.of(name)) for name in regimes)
        if len({name for name, _ in self._regimes}) < len(self._regimes) or not self._regimes:
            raise ConfigError(f"regimes {', '.join(regimes)}: name each one once, and at least one")
        self.validation = tuple(self._validation(validation_batch))

    def __len__(self) -> int:
        return len(self._data.x) // self._batch

    def epoch(self, number: int) -> Iterator[Batch]:
        device = self._data.x.device
        order = torch.randperm(len(self._data.x), generator=self._generator(number, "cpu")).to(device)
        chance = self._generator(number, device)
        kinds = torch.randint(len(self._regimes), (len(self),), generator=self._generator(number, "cpu"))
        for rows, kind in zip(torch.split(order, self._batch), kinds.tolist(), strict=False):
            x = self._data.normalise(self._data.x[rows])
            for name in self._augment:
                x = AUGMENTATIONS[name](x, chance)
            regime, corruption = self._regimes[kind]
            yield Batch(
                x if corruption is None else corrupted(x, corruption, chance), self._data.y[rows], regime
            )

    def _validation(self, size: int) -> Iterator[Batch]:
        order = torch.randperm(len(self._data.x_validation), generator=self._generator(-1, "cpu"))
        chance = self._generator(-1, self._data.x.device)
        parts = max(1, round(len(order) / size))  # of equal size: each may judge decisions
        for rows in torch.tensor_split(order.to(self._data.x.device), parts):
            x, y = self._data.normalise(self._data.x_validation[rows]), self._data.y_validation[rows]
            for regime, corruption in self._regimes:
                yield Batch(x if corruption is None else corrupted(x, corruption, chance), y, regime)

    def _generator(self, number: int, device: torch.device | str) -> torch.Generator:
        return torch.Generator(device).manual_seed((self._seed + 1) * 1_000_003 + number)


class LoaderBatches:
    """Batches of a user's loaders: each item is (x, y) or (x, y, regime), regime a string.

    Args:
        train: anything with a length that can be iterated again each epoch, such as a ``DataLoader``.
        validation: any iterable; its batches are kept on the device.
        device: where batches go.
    Raises:
        DataError: ``validation`` yields nothing, or something that is no batch.
        ConfigError: ``train`` has no length.
    """

    def __init__(self, train: Iterable[Any], validation: Iterable[Any], device: torch.device) -> None:
        self._train, self._device = train, device
        try:
            self._length = len(train)  # type: ignore[arg-type]
        except TypeError as error:
            raise ConfigError(
                "the training loader has no len(): the learning rate follows from it"
            ) from error
        self.validation = tuple(_batch(item, device, "validation") for item in validation)
        if not self.validation:
            raise DataError("the validation loader yields nothing")
        if not self._length:
            raise DataError("the training loader yields nothing")

    def __len__(self) -> int:
        return self._length

    def epoch(self, number: int) -> Iterator[Batch]:
        """Iterates the loader; equal epochs need torch's generator in the same state."""
        empty = True
        for item in self._train:
            empty = False
            yield _batch(item, self._device, "training")
        if empty:
            raise DataError("the training loader yields nothing")


def _batch(item: Any, device: torch.device, what: str) -> Batch:
    if not isinstance(item, (tuple, list)) or len(item) not in (2, 3):
        raise DataError(f"the {what} loader yields a {type(item).__name__}; give (x, y) or (x, y, regime)")
    x, y = item[0], item[1]
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or y.shape != x.shape[:1] or not len(y):
        raise DataError(
            f"the {what} loader must yield tensors x [B, ...] and labels y [B] of at least one sample"
        )
    return Batch(x.to(device), y.to(device), str(item[2]) if len(item) == 3 else CLEAN)
