"""Any data of the user's own, in one NumPy archive."""

from __future__ import annotations

from pathlib import Path

from ..search.archives import read_npz
from .task import Task, make_task

_KEYS = ("x_train", "y_train", "x_test", "y_test")


def npz(
    *,
    path: str,
    classes: tuple[int, ...] | None = None,
    validation_fraction: float = 0.2,
    train_size: int | None = None,
    seed: int = 0,
) -> Task:
    """Images and labels from an .npz file with x_train, y_train, x_test and y_test.

    Images are [N, H, W], [N, C, H, W] or [N, H, W, C] of integers or floats, labels [N] integers from 0;
    ``class_names`` (strings) in the file is used where it is there.  Pickles are never read.

    Args:
        path: the file.
        classes: the labels to keep; None keeps all.
        validation_fraction: of the images in x_train.
        train_size: how many images to train on; None trains on all.
        seed: draws the validation split.
    Raises:
        DataError: the file cannot be used; says what is wrong with it.
    """
    file = Path(path)
    arrays = read_npz(file, required=_KEYS, optional=("class_names",))
    names = arrays.get("class_names")
    return make_task(
        file.stem,
        (arrays["x_train"], arrays["y_train"]),
        (arrays["x_test"], arrays["y_test"]),
        class_names=None if names is None else [str(name) for name in names.ravel()],
        classes=classes,
        validation_fraction=validation_fraction,
        train_size=train_size,
        seed=seed,
    )
