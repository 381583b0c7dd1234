"""Data sets by name, with a server of our own in place of the sites they come from."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import struct
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from rlnas_fast.errors import DataError
from rlnas_fast.tasks import named
from rlnas_fast.tasks.download import RemoteFile, fetch

pytest.importorskip("pooch", reason="the extra 'data' is not installed")


class Site(ThreadingHTTPServer):
    """Serves ``files`` by the last part of the path; sends only half of what is in ``cut``."""

    daemon_threads = True

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        name = self.path.rsplit("/", 1)[-1]
        if name not in self.server.files:
            self.send_error(404)
            return
        content = self.server.files[name]
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if name in self.server.cut else content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Site]:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("RLNAS_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


CONTENT = b"some data" * 1000


def remote(*urls: str, name: str = "file.bin", content: bytes = CONTENT) -> RemoteFile:
    return RemoteFile(name, hashlib.md5(content).hexdigest(), urls)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file()]


def test_downloads_once(site: Site, tmp_path: Path) -> None:
    site.files["file.bin"] = CONTENT
    file = remote(f"{site.url}file.bin")
    for _ in range(2):
        assert fetch(file, tmp_path / "d").read_bytes() == CONTENT
    assert len(site.asked) == 1
    assert leftovers(tmp_path / "d") == ["file.bin"]


def test_a_damaged_copy_is_downloaded_again(site: Site, tmp_path: Path) -> None:
    site.files["file.bin"] = CONTENT
    (tmp_path / "file.bin").write_bytes(b"damaged")
    assert fetch(remote(f"{site.url}file.bin"), tmp_path).read_bytes() == CONTENT


def test_a_wrong_hash_leaves_nothing(site: Site, tmp_path: Path) -> None:
    site.files["file.bin"] = b"something else"
    with pytest.raises(DataError, match=r"what came is not the file.*RLNAS_DATA_DIR") as caught:
        fetch(remote(f"{site.url}file.bin"), tmp_path / "d")
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_truncated_file_leaves_nothing(site: Site, tmp_path: Path) -> None:
    site.files["file.bin"] = CONTENT
    site.cut.add("file.bin")
    with pytest.raises(DataError, match=r"cannot download file\.bin"):
        fetch(remote(f"{site.url}file.bin"), tmp_path / "d")
    assert leftovers(tmp_path) == []


def test_the_next_site_is_tried(site: Site, tmp_path: Path) -> None:
    site.files["file.bin"] = CONTENT
    file = remote(f"{site.url}missing.bin", f"{site.url}file.bin")
    assert fetch(file, tmp_path).read_bytes() == CONTENT


def test_a_server_that_is_gone(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="refused"):
        fetch(remote("http://127.0.0.1:9/file.bin"), tmp_path / "d")
    with pytest.raises(DataError, match="404"):
        fetch(remote(f"{site.url}missing.bin"), tmp_path / "d")
    assert leftovers(tmp_path) == []


def test_goes_through_a_proxy(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site.files["file.bin"] = CONTENT
    monkeypatch.setenv("http_proxy", site.url)
    assert fetch(remote("http://data.invalid/file.bin"), tmp_path).read_bytes() == CONTENT
    assert site.asked == ["http://data.invalid/file.bin"]


def test_a_folder_that_cannot_be_written(site: Site, tmp_path: Path) -> None:
    site.files["file.bin"] = CONTENT
    (tmp_path / "taken").write_text("a file, no folder")
    with pytest.raises(DataError, match="cannot download"):
        fetch(remote(f"{site.url}file.bin"), tmp_path / "taken")


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.tobytes())


def offer_idx_files(site: Site, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (100, 5, 5), dtype=np.uint8)
    labels = (np.arange(100) % 10).astype(np.uint8)
    contents = [idx(images), idx(labels), idx(images[:10]), idx(labels[:10])]
    site.files.update(zip(named.IDX_NAMES, contents, strict=True))
    monkeypatch.setattr(named, "MNIST_SITES", (site.url,))
    monkeypatch.setattr(named, "MNIST_MD5", tuple(hashlib.md5(c).hexdigest() for c in contents))
    return images


def test_mnist_from_its_four_files(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    images = offer_idx_files(site, monkeypatch)
    task = named.mnist(validation_fraction=0.25)
    assert task.spec.input_shape == (1, 5, 5)
    assert len(task.train.y) == 75
    assert np.array_equal(task.test_split().x[:, 0], images[:10])
    named.mnist()
    assert len(site.asked) == 4


def test_the_data_folder_comes_first(site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    x, y = np.zeros((100, 5, 5), np.uint8), np.arange(100) % 10
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    monkeypatch.setenv("RLNAS_DATA_DIR", str(tmp_path))
    assert named.mnist().spec.input_shape == (1, 5, 5)
    assert site.asked == []


def cifar_archive(rows: int = 20) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
            content = np.full((rows, 3073), number, np.uint8)
            content[:, 0] = np.arange(rows) % 10
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}.bin")
            info.size = content.nbytes
            archive.addfile(info, io.BytesIO(content.tobytes()))
    return stream.getvalue()


def test_cifar10_from_its_binary_archive(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    content = cifar_archive()
    site.files["cifar.tar.gz"] = content
    file = remote(f"{site.url}cifar.tar.gz", name="cifar.tar.gz", content=content)
    monkeypatch.setattr(named, "CIFAR_ARCHIVE", file)
    task = named.cifar10()
    assert task.spec.input_shape == (3, 32, 32)
    assert len(task.train.y) + len(task.validation.y) == 100
    assert (task.test_split().x == 5).all()
    assert task.class_names[0] == "airplane"


def test_a_cifar10_archive_of_the_users_that_is_damaged(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(cifar_archive()[:500])
    monkeypatch.setenv("RLNAS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match="cannot read"):
        named.cifar10()


def test_jpeg_files_need_the_data_folder(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="which is not set"):
        named.cifar10_jpeg()
    monkeypatch.setenv("RLNAS_DATA_DIR", str(tmp_path))
    with pytest.raises(DataError, match=r"cifar10_jpeg_train\.npz is not in"):
        named.cifar10_jpeg()


def test_packed_jpeg_files(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image_module = pytest.importorskip("PIL.Image", reason="the extra 'data' is not installed")
    files = []
    for number in range(100):
        stream = io.BytesIO()
        image_module.new("RGB", (32, 32), (number, 100, 200)).save(stream, "JPEG")
        files.append(stream.getvalue())
    packed = {
        "jpeg": np.frombuffer(b"".join(files), np.uint8),
        "offsets": np.cumsum([0, *map(len, files)]),
        "label": np.arange(100) % 10,
    }
    for split in ("train", "test"):
        np.savez(tmp_path / f"cifar10_jpeg_{split}.npz", **packed)
    monkeypatch.setenv("RLNAS_DATA_DIR", str(tmp_path))
    task = named.cifar10_jpeg()
    assert task.test_split().x.shape == (100, 3, 32, 32)
    assert np.abs(task.test_split().x[:, 0, 0, 0].astype(int) - np.arange(100)).max() <= 3
    np.savez(tmp_path / "cifar10_jpeg_test.npz", **(packed | {"jpeg": np.zeros_like(packed["jpeg"])}))
    with pytest.raises(DataError, match="cannot decode"):
        named.cifar10_jpeg()


needs_data = pytest.mark.skipif("RLNAS_DATA_DIR" not in os.environ, reason="RLNAS_DATA_DIR is not set")


@needs_data
@pytest.mark.parametrize(
    ("task", "mean", "std"),
    [(named.mnist, 0.13066, 0.30811), (named.fashion_mnist, 0.28604, 0.35302)],
)
def test_real_files_are_what_they_are_known_to_be(task: object, mean: float, std: float) -> None:
    """Mean and deviation of all training images; the split's differ by the draw."""
    found = task(validation_fraction=0.01)  # type: ignore[operator]
    assert len(found.train.y) == 59_400
    assert found.mean[0] / 255 == pytest.approx(mean, abs=2e-4)
    assert found.std[0] / 255 == pytest.approx(std, abs=2e-4)
