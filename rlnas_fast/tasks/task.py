"""A classification task: its splits, its numbers, and the checks that any data passes first."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import ConfigError, DataError
from ..search import TaskSpec


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels.

    Attributes:
        x: [N, channels, height, width], uint8 or float32, as they came: not normalised, read-only.
        y: [N] int64 labels from 0, read-only.
    """

    x: np.ndarray = field(repr=False)
    y: np.ndarray = field(repr=False)


@dataclass(frozen=True, eq=False)
class Task:
    """A data set and how it is divided.  A search sees ``train`` and ``validation``.

    Attributes:
        mean, std: of each channel over the training split alone; an image x becomes (x - mean) / std.
        data_hash: sha256 of the contents and their division, hexadecimal.
    """

    name: str
    spec: TaskSpec
    train: Split
    validation: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    data_hash: str
    _test: Split = field(repr=False)

    def test_split(self) -> Split:
        """The test split: to be read once, after the search, for the networks that are reported."""
        return self._test


def make_task(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    class_names: Sequence[str] | None = None,
    classes: tuple[int, ...] | None = None,
    validation_fraction: float = 0.2,
    train_size: int | None = None,
    seed: int = 0,
) -> Task:
    """Checks images and labels, and divides those that are not for the test into train and validation.

    Args:
        train, test: images [N, H, W], [N, C, H, W] or [N, H, W, C] of any real dtype, and integer
            labels [N] from 0.
        class_names: one for each label; their number otherwise follows from the training labels.
        classes: the labels to keep, renumbered in this order; None keeps all.
        validation_fraction: of the images that are not for the test, drawn with ``seed`` so that every
            class keeps its share.
        train_size: how many images to train on, drawn likewise; the validation split shrinks in
            proportion.  None keeps all.
    Raises:
        DataError: the data cannot be used; says where and why.
        ConfigError: an option is out of range.
    """
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction = {validation_fraction}: give a number between 0 and 1")
    x, y = _checked(f"{name}: train", *train)
    x_test, y_test = _checked(f"{name}: test", *test)
    if x.shape[1:] != x_test.shape[1:] or x.dtype != x_test.dtype:
        raise DataError(
            f"{name}: training images are {x.shape[1:]} {x.dtype}, "
            f"test images {x_test.shape[1:]} {x_test.dtype}"
        )
    names = tuple(class_names) if class_names is not None else tuple(map(str, range(int(y.max()) + 1)))
    for split, labels in (("train", y), ("test", y_test)):
        if labels.max() >= len(names):
            raise DataError(
                f"{name}: {split} label {labels.max()} is out of range: "
                f"there are {len(names)} classes, from 0"
            )
    if classes is not None:
        _check_classes(name, classes, names)
        (x, y), (x_test, y_test) = _keep(x, y, classes), _keep(x_test, y_test, classes)
        names = tuple(names[label] for label in classes)
    if len(names) < 2:
        raise DataError(f"{name}: only one class ({names[0]!r}): there is nothing to tell apart")
    counts = np.bincount(y, minlength=len(names))
    if counts.min() < 2:
        raise DataError(
            f"{name}: class {names[counts.argmin()]!r} has {counts.min()} training images, "
            "and needs at least 2: one to train on and one to validate on"
        )
    train_rows, validation_rows = _divide(name, y, validation_fraction, train_size, seed)
    training = _split(x[train_rows], y[train_rows])
    validation = _split(x[validation_rows], y[validation_rows])
    held_out = _split(x_test, y_test)
    mean, std = _statistics(training.x)
    return Task(
        name=name,
        spec=TaskSpec(tuple(x.shape[1:]), len(names)),
        train=training,
        validation=validation,
        class_names=names,
        mean=mean,
        std=std,
        data_hash=_hash(training, validation, held_out),
        _test=held_out,
    )


def stratified(y: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draws ``size`` rows so that every class keeps its share (largest remainder), ascending.

    Args:
        y: [N] labels; ``size`` lies between 0 and N.
    """
    labels, counts = np.unique(y, return_counts=True)
    exact = counts * (size / len(y))
    take = np.floor(exact).astype(int)
    for _ in range(size - int(take.sum())):
        take[np.argmax(np.where(take < counts, exact - take, -np.inf))] += 1
    rows = [rng.permutation(np.flatnonzero(y == label))[:n] for label, n in zip(labels, take, strict=True)]
    return np.sort(np.concatenate(rows))


def _divide(
    name: str, y: np.ndarray, validation_fraction: float, train_size: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    total = len(y)
    validation_size = round(total * validation_fraction)
    if train_size is not None:
        if not 0 < train_size <= total - validation_size:
            raise ConfigError(
                f"train_size = {train_size}: {name} has {total - validation_size} training images beside its "
                f"validation split; give a number from 1 to that"
            )
        validation_size = round(train_size * validation_fraction / (1 - validation_fraction))
        rows = stratified(y, min(total, train_size + validation_size), rng)
    else:
        rows = np.arange(total)
    chosen = stratified(y[rows], validation_size, rng)
    held = np.zeros(len(rows), dtype=bool)
    held[chosen] = True
    train_rows, validation_rows = rows[~held], rows[held]
    for split, part in (("training", train_rows), ("validation", validation_rows)):
        if len(np.unique(y[part])) < len(np.unique(y)):
            raise DataError(
                f"{name}: {len(part)} {split} images leave a class without any; "
                "change validation_fraction or train_size"
            )
    return train_rows, validation_rows


def _checked(what: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if x.dtype.kind not in "uif":
        raise DataError(f"{what}: images have dtype {x.dtype}; give integers or floats")
    if y.dtype.kind not in "ui":
        raise DataError(f"{what}: labels have dtype {y.dtype}; give integers from 0")
    if x.ndim not in (3, 4) or 0 in x.shape:
        raise DataError(f"{what}: images have shape {x.shape}; give [N, H, W], [N, C, H, W] or [N, H, W, C]")
    if y.shape != x.shape[:1]:
        raise DataError(f"{what}: {x.shape[0]} images but labels of shape {y.shape}; give one label an image")
    if y.min() < 0:
        raise DataError(f"{what}: label {y.min()} is out of range; labels count from 0")
    if x.ndim == 3:
        x = x[:, None]
    elif x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    if x.dtype != np.uint8:
        x = x.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(x).all(axis=(1, 2, 3)))
        if len(bad):
            raise DataError(
                f"{what}: {len(bad)} images have NaN or infinite pixels, the first is image {bad[0]}"
            )
    return np.ascontiguousarray(x), y.astype(np.int64)


def _check_classes(name: str, classes: tuple[int, ...], names: tuple[str, ...]) -> None:
    unknown = [label for label in classes if not 0 <= label < len(names)]
    if unknown:
        raise DataError(f"{name} has no class {unknown[0]}: its classes are 0 to {len(names) - 1}")
    if len(set(classes)) < len(classes) or not classes:
        raise ConfigError(f"classes = {classes}: name each class once")


def _keep(x: np.ndarray, y: np.ndarray, classes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    renumbered = np.full(max(int(y.max()), *classes) + 1, -1)
    renumbered[list(classes)] = np.arange(len(classes))
    labels = renumbered[y]
    kept = labels >= 0
    return x[kept], labels[kept]


def _split(x: np.ndarray, y: np.ndarray) -> Split:
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    x.setflags(write=False)
    y.setflags(write=False)
    return Split(x, y)


def _statistics(x: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel; a constant channel has deviation 1."""
    mean = [float(x[:, c].mean(dtype=np.float64)) for c in range(x.shape[1])]
    std = [float(x[:, c].std(dtype=np.float64)) or 1.0 for c in range(x.shape[1])]
    return tuple(mean), tuple(std)


def _hash(*splits: Split) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for array in (split.x, split.y):
            digest.update(f"{array.dtype}{array.shape}".encode())
            digest.update(array.data)
    return digest.hexdigest()
