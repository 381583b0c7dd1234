"""A user's own archive, and archives that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlnas_fast.errors import DataError
from rlnas_fast.tasks.npz import npz

X = np.random.default_rng(0).normal(size=(40, 6, 6))
Y = np.arange(40) % 4
ARRAYS = {"x_train": X, "y_train": Y, "x_test": X[:8], "y_test": Y[:8]}


def saved(folder: Path, **arrays: np.ndarray) -> str:
    np.savez(folder / "mine.npz", **arrays)  # type: ignore[arg-type]
    return str(folder / "mine.npz")


def test_reads_the_four_arrays_and_the_names(tmp_path: Path) -> None:
    names = np.array(["a", "b", "c", "d"])
    task = npz(path=saved(tmp_path, **ARRAYS, class_names=names), classes=(3, 1))
    assert task.name == "mine"
    assert task.class_names == ("d", "b")
    assert task.spec.input_shape == (1, 6, 6)


def test_lists_what_is_there_when_an_array_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no y_train, x_test, y_test; it holds x_train, labels"):
        npz(path=saved(tmp_path, x_train=X, labels=Y))


def test_never_reads_pickles(tmp_path: Path) -> None:
    objects = np.array([{"a": 1}] * 40, dtype=object)
    with pytest.raises(DataError, match="plain arrays"):
        npz(path=saved(tmp_path, **(ARRAYS | {"y_train": objects})))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"no archive at all"])
def test_a_file_that_is_no_archive(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*bad\.npz") as caught:
        npz(path=str(path))
    assert "\n" not in str(caught.value)


def test_an_archive_that_is_cut_off(tmp_path: Path) -> None:
    path = Path(saved(tmp_path, **ARRAYS))
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(DataError, match="cannot read"):
        npz(path=str(path))


def test_an_archive_with_a_damaged_array(tmp_path: Path) -> None:
    path = Path(saved(tmp_path, **ARRAYS))
    content = bytearray(path.read_bytes())
    content[2000] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DataError, match="cannot read"):
        npz(path=str(path))


def test_a_single_array(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", X)
    with pytest.raises(DataError, match="single array"):
        npz(path=str(tmp_path / "one.npy"))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data file"):
        npz(path=str(tmp_path / "none.npz"))
    with pytest.raises(DataError, match="cannot read"):
        npz(path=str(tmp_path))
