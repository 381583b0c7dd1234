"""Scikit-learn's handwritten digits: 1,797 images of 8 x 8 that come with the installation."""

from __future__ import annotations

import numpy as np

from .task import Task, make_task, stratified

_TEST_SIZE = 360


def digits(
    *,
    classes: tuple[int, ...] | None = None,
    validation_fraction: float = 0.2,
    train_size: int | None = None,
    seed: int = 0,
) -> Task:
    """Scikit-learn's handwritten digits, 8 x 8, 10 classes: 1,150 / 287 / 360 images; no download.

    The set has no official test split: 360 images, every class in proportion, are always the same ones,
    whatever ``seed`` says of train and validation.

    Args:
        classes: the digits to keep; None keeps all ten.
        validation_fraction: of the 1,437 images that are not for the test.
        train_size: how many images to train on; None trains on all.
        seed: draws the validation split.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = bunch.images.astype(np.uint8), bunch.target
    test = np.zeros(len(y), dtype=bool)
    test[stratified(y, _TEST_SIZE, np.random.default_rng(0))] = True
    return make_task(
        "digits",
        (x[~test], y[~test]),
        (x[test], y[test]),
        class_names=[str(digit) for digit in range(10)],
        classes=classes,
        validation_fraction=validation_fraction,
        train_size=train_size,
        seed=seed,
    )
