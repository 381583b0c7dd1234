"""Splits, checks and numbers of a task."""

from __future__ import annotations

from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from rlnas_fast.errors import ConfigError, DataError, RlnasError
from rlnas_fast.tasks.task import Task, make_task, stratified

RNG = np.random.default_rng(0)
X = RNG.integers(0, 256, (60, 4, 5), dtype=np.uint8)
Y = np.repeat(np.arange(3), 20)


def task(**changes: Any) -> Task:
    arguments = {"train": (X, Y), "test": (X[:12], Y[::5])} | changes
    return make_task("made", arguments.pop("train"), arguments.pop("test"), **arguments)


@hypothesis.settings(max_examples=50, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_stratified_takes_each_class_in_proportion(counts: list[int], share: float, seed: int) -> None:
    y = np.repeat(np.arange(len(counts)), counts)
    size = round(share * len(y))
    rows = stratified(y, size, np.random.default_rng(seed))
    assert len(rows) == size == len(set(rows.tolist()))
    taken = np.bincount(y[rows], minlength=len(counts))
    assert np.abs(taken - np.array(counts) * size / len(y)).max() < 1


def test_splits_share_no_image_and_lose_none() -> None:
    numbered = np.arange(60 * 20, dtype=np.float32).reshape(60, 4, 5)
    made = task(train=(numbered, Y), test=(numbered[:12], Y[::5]))
    first_pixels = np.concatenate([made.train.x[:, 0, 0, 0], made.validation.x[:, 0, 0, 0]])
    assert sorted(first_pixels) == sorted(numbered[:, 0, 0])
    assert np.bincount(made.validation.y).tolist() == [4, 4, 4]


def test_statistics_are_of_the_training_split_alone() -> None:
    made = task()
    assert made.mean == pytest.approx((made.train.x.mean(),))
    assert made.std == pytest.approx((made.train.x.std(),))


def test_a_constant_channel_can_be_normalised() -> None:
    assert task(train=(np.full_like(X, 7), Y)).std == (1.0,)


def test_classes_are_kept_in_order_and_renumbered() -> None:
    made = task(classes=(2, 0))
    assert made.class_names == ("2", "0")
    assert made.spec.outputs == 2
    assert len(made.train.y) + len(made.validation.y) == 40
    assert np.isin(made.train.x[made.train.y == 0], X[Y == 2]).all()


def test_train_size_shrinks_the_validation_split_in_proportion() -> None:
    made = task(train_size=24)
    assert len(made.train.y) == 24
    assert len(made.validation.y) == 6
    assert np.bincount(made.train.y).tolist() == [8, 8, 8]


def test_the_seed_divides_and_the_hash_knows_it() -> None:
    assert task().data_hash == task().data_hash
    assert task(seed=1).data_hash != task().data_hash
    assert task(classes=(0, 1)).data_hash != task().data_hash
    assert np.array_equal(task(seed=1).test_split().x, task().test_split().x)


@pytest.mark.parametrize(
    ("images", "shape"),
    [
        (np.zeros((60, 4, 5), np.uint8), (1, 4, 5)),
        (np.zeros((60, 3, 4, 5), np.float64), (3, 4, 5)),
        (np.zeros((60, 4, 5, 3), np.int32), (3, 4, 5)),
        (np.zeros((60, 3, 3, 3), np.uint8), (3, 3, 3)),
    ],
)
def test_images_come_channels_first_as_bytes_or_float32(images: np.ndarray, shape: tuple[int, ...]) -> None:
    made = task(train=(images, Y), test=(images[:12], Y[::5]))
    assert made.spec.input_shape == made.train.x.shape[1:] == shape
    assert made.train.x.dtype in (np.uint8, np.float32)
    assert not made.train.x.flags.writeable


def nan_image() -> np.ndarray:
    images = X.astype(np.float32)
    images[7, 0, 0] = np.nan
    return images


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train": (X.astype(str), Y)}, DataError, "dtype"),
        ({"train": (X, Y.astype(float))}, DataError, "labels have dtype float64"),
        ({"train": (X.reshape(60, 20), Y)}, DataError, r"shape \(60, 20\)"),
        ({"train": (X[:0], Y[:0])}, DataError, "shape"),
        ({"train": (X, Y[:50])}, DataError, "60 images but labels of shape"),
        ({"train": (X, Y - 1)}, DataError, "label -1 is out of range"),
        ({"test": (X[:12], Y[::5] + 1)}, DataError, "test label 3 is out of range: there are 3 classes"),
        ({"class_names": ["a", "b"]}, DataError, "train label 2 is out of range"),
        ({"train": (nan_image(), Y), "test": (nan_image(), Y)}, DataError, "NaN.*image 7"),
        ({"train": (X, np.zeros_like(Y)), "test": (X, np.zeros_like(Y))}, DataError, "only one class"),
        ({"classes": (1,)}, DataError, "only one class"),
        ({"classes": (0, 9)}, DataError, "no class 9: its classes are 0 to 2"),
        ({"classes": (0, 0)}, ConfigError, "name each class once"),
        ({"classes": ()}, ConfigError, "name each class once"),
        ({"train": (X, np.r_[Y[:59], 4])}, DataError, "class '3' has 0 training images"),
        ({"test": (X[:12, :3], Y[::5])}, DataError, "test images"),
        ({"validation_fraction": 1.5}, ConfigError, "validation_fraction = 1.5"),
        ({"train_size": 49}, ConfigError, "train_size = 49"),
        ({"train_size": 0}, ConfigError, "train_size = 0"),
        ({"validation_fraction": 0.02}, DataError, "leave a class without any"),
    ],
)
def test_bad_input_is_one_line(changes: dict[str, Any], error: type[RlnasError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        task(**changes)
    assert "\n" not in str(caught.value)
