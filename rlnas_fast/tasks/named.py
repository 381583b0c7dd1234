"""Data sets by name: MNIST, Fashion-MNIST, CIFAR-10, and CIFAR-10 from JPEG files.

A file is taken from the folder that RLNAS_DATA_DIR names, where it is there; else from this user's cache,
into which it is downloaded once.
"""

from __future__ import annotations

import gzip
import io
import os
import struct
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..search.archives import read_npz
from .download import RemoteFile, fetch
from .task import Task, make_task

_Arrays = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip

IDX_NAMES = tuple(
    f"{split}-{what}-ubyte.gz" for split in ("train", "t10k") for what in ("images-idx3", "labels-idx1")
)
MNIST_SITES = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
MNIST_MD5 = (
    "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "d53e105ee54ea40749a09fcbcd1e9432",
    "9fb629c4189551a2d022fa330f9573f3",
    "ec29112dd5afa0611ce80d1b7f02629c",
)
FASHION_SITES = (
    "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
FASHION_MD5 = (
    "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "25c81989df183df01b3e8a0aad5dffbe",
    "bef4ecab320f06d8554ea6380940ec79",
    "bb300cfdad3c16e7a12a480ee83cd310",
)
CIFAR_ARCHIVE = RemoteFile(
    "cifar-10-binary.tar.gz",
    "c32a1d4ab5d03f1284b67883e8d87530",
    ("https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",),
)


def mnist(
    *,
    classes: tuple[int, ...] | None = None,
    validation_fraction: float = 0.2,
    train_size: int | None = None,
    seed: int = 0,
) -> Task:
    """MNIST handwritten digits, 28 x 28, 10 classes: 60,000 to train and validate, 10,000 to test.

    Args:
        classes: the digits to keep; None keeps all.
        validation_fraction: of the official training images.
        train_size: how many images to train on; None trains on all.
        seed: draws the validation split.
    """
    (x, y), (x_test, y_test) = _read_idx_set("mnist", MNIST_SITES, MNIST_MD5)
    return make_task(
        "mnist",
        (x, y),
        (x_test, y_test),
        class_names=[str(digit) for digit in range(10)],
        classes=classes,
        validation_fraction=validation_fraction,
        train_size=train_size,
        seed=seed,
    )


def fashion_mnist(
    *,
    classes: tuple[int, ...] | None = None,
    validation_fraction: float = 0.2,
    train_size: int | None = None,
    seed: int = 0,
) -> Task:
    """Fashion-MNIST articles of clothing, 28 x 28, 10 classes: 60,000 to train and validate, 10,000 to test.

    Args:
        classes: the labels to keep; None keeps all.
        validation_fraction: of the official training images.
        train_size: how many images to train on; None trains on all.
        seed: draws the validation split.
    """
    train, test = _read_idx_set("fashion_mnist", FASHION_SITES, FASHION_MD5)
    return make_task(
        "fashion-mnist",
        train,
        test,
        class_names=FASHION_CLASSES,
        classes=classes,
        validation_fraction=validation_fraction,
        train_size=train_size,
        seed=seed,
    )


def cifar10(
    *,
    classes: tuple[int, ...] | None = None,
    validation_fraction: float = 0.2,
    train_size: int | None = None,
    seed: int = 0,
) -> Task:
    """CIFAR-10 colour photographs, 32 x 32, 10 classes: 50,000 to train and validate, 10,000 to test.

    Args:
        classes: the labels to keep; None keeps all.
        validation_fraction: of the official training images.
        train_size: how many images to train on; None trains on all.
        seed: draws the validation split.
    """
    train, test = _read_cifar(_file(CIFAR_ARCHIVE, "cifar10"))
    return make_task(
        "cifar10",
        train,
        test,
        class_names=CIFAR_CLASSES,
        classes=classes,
        validation_fraction=validation_fraction,
        train_size=train_size,
        seed=seed,
    )


def cifar10_jpeg(
    *,
    classes: tuple[int, ...] | None = None,
    validation_fraction: float = 0.2,
    train_size: int | None = None,
    seed: int = 0,
) -> Task:
    """CIFAR-10 after lossy JPEG, 32 x 32, 10 classes; not to be compared with CIFAR-10 to the decimal.

    Read from cifar10_jpeg_train.npz and cifar10_jpeg_test.npz in the folder that RLNAS_DATA_DIR names.

    Args:
        classes: the labels to keep; None keeps all.
        validation_fraction: of the official training images.
        train_size: how many images to train on; None trains on all.
        seed: draws the validation split.
    """
    train, test = (_read_jpegs(_given(f"cifar10_jpeg_{split}.npz")) for split in ("train", "test"))
    return make_task(
        "cifar10-jpeg",
        train,
        test,
        class_names=CIFAR_CLASSES,
        classes=classes,
        validation_fraction=validation_fraction,
        train_size=train_size,
        seed=seed,
    )


def _read_idx_set(name: str, sites: tuple[str, ...], hashes: tuple[str, ...]) -> _Arrays:
    """Training and test arrays, from ``name``.npz in the data folder or from the published files."""
    folder = _data_folder()
    if folder is not None and (folder / f"{name}.npz").exists():
        found = read_npz(folder / f"{name}.npz", ("x_train", "y_train", "x_test", "y_test"), ())
        return (found["x_train"], found["y_train"]), (found["x_test"], found["y_test"])
    x, y, x_test, y_test = (
        _read_idx(_file(RemoteFile(file, md5, tuple(site + file for site in sites)), name))
        for file, md5 in zip(IDX_NAMES, hashes, strict=True)
    )
    return (x, y), (x_test, y_test)


def _data_folder() -> Path | None:
    folder = os.environ.get("RLNAS_DATA_DIR")
    return Path(folder) if folder else None


def _given(name: str) -> Path:
    """A file that must be in the data folder."""
    folder = _data_folder()
    if folder is None:
        raise DataError(f"{name} is read from the folder that RLNAS_DATA_DIR names, which is not set")
    if not (folder / name).exists():
        raise DataError(f"{name} is not in {folder}, the folder that RLNAS_DATA_DIR names")
    return folder / name


def _file(file: RemoteFile, data_set: str) -> Path:
    """The file in the data folder or its sub-folder of this set, else in the cache."""
    folder = _data_folder()
    if folder is not None:
        for place in (folder / data_set / file.name, folder / file.name):
            # MNIST and Fashion-MNIST have files of the same names, so those are in sub-folders alone.
            if place.exists() and (place.parent != folder or file.name not in IDX_NAMES):
                return place
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlnas_fast" / data_set
    return fetch(file, cache)


def _read_idx(path: Path) -> np.ndarray:
    """Array of bytes in the IDX format: two zeros, type, rank, sizes big-endian, then the contents."""
    try:
        raw = gzip.decompress(path.read_bytes())
        zeros, kind, rank = struct.unpack_from(">HBB", raw)
        shape = struct.unpack_from(f">{rank}I", raw, 4)
        if (zeros, kind) != (0, 8):
            raise DataError(f"{path} is not an IDX file of bytes")
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path}: {error}; remove it to have it downloaded again") from error


def _read_cifar(path: Path) -> _Arrays:
    """The binary version: rows of one label and 3 x 32 x 32 pixels.  Nothing is unpacked to disk."""
    try:
        with tarfile.open(path) as archive:
            parts = []
            for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
                member = archive.extractfile(f"cifar-10-batches-bin/{name}")
                if member is None:
                    raise DataError(f"{path}: {name} is not a file")
                parts.append(np.frombuffer(member.read(), np.uint8).reshape(-1, 1 + 3 * 32 * 32))
    except (tarfile.TarError, KeyError, OSError, EOFError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path}: {error}; remove it to have it downloaded again") from error
    train, test = np.concatenate(parts[:-1]), parts[-1]
    return _images_and_labels(train), _images_and_labels(test)


def _images_and_labels(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]


def _read_jpegs(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3] and labels of a packed archive: file i is jpeg[offsets[i]:offsets[i + 1]]."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError("cifar10-jpeg needs Pillow: pip install 'rlnas_fast[data]'") from error
    found = read_npz(path, ("jpeg", "offsets", "label"), ())
    jpeg, offsets = found["jpeg"].tobytes(), found["offsets"]

    def decode(first: int, last: int) -> np.ndarray:
        files = (jpeg[offsets[i] : offsets[i + 1]] for i in range(first, last))
        return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])

    bounds = np.linspace(0, len(offsets) - 1, 33).astype(int).tolist()
    try:
        with ThreadPoolExecutor() as pool:  # decoding holds no interpreter lock
            parts = list(pool.map(decode, bounds[:-1], bounds[1:]))
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise DataError(f"cannot decode an image of {path}: {error}") from error
    return np.concatenate(parts), found["label"]
