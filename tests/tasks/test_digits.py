"""The digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np

from rlnas_fast.tasks.digits import digits


def test_sizes_and_classes() -> None:
    task = digits()
    assert task.spec.input_shape == (1, 8, 8)
    assert task.spec.outputs == 10
    assert [len(split.y) for split in (task.train, task.validation, task.test_split())] == [1150, 287, 360]


def test_the_test_images_do_not_depend_on_the_seed() -> None:
    assert np.array_equal(digits(seed=0).test_split().x, digits(seed=3).test_split().x)
    assert not np.array_equal(digits(seed=0).validation.x, digits(seed=3).validation.x)


def test_no_test_image_is_trained_on() -> None:
    task = digits()
    seen = {image.tobytes() for split in (task.train, task.validation) for image in split.x}
    assert not seen & {image.tobytes() for image in task.test_split().x}
