"""A board without a GPU, and locks of the tests' own, so that a search on the same machine meets neither."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest

from rlnas_fast.hardware.nvml import NvmlBoard

UUID = "GPU-00000000-1111-2222-3333-444444444444"


@pytest.fixture(autouse=True)
def _own_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="session")
def fake_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake library, compiled, under the name by which the binding loads the real one."""
    library = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("fake_nvml.c")
    command = [os.environ.get("CC", "cc"), "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([*command, "-o", str(library), str(source), "-lm"], check=True)
    return library


class FakeGpu:
    """The scripted board, and work for it."""

    def __init__(self, library: ctypes.CDLL, script: Path) -> None:
        self._library = library
        self._script = script
        for name in ("fake_wait", "fake_call"):
            getattr(library, name).argtypes = [ctypes.c_double] * (1 if name == "fake_wait" else 2)
        library.fake_now.restype = ctypes.c_double

    def script(self, *lines: str) -> NvmlBoard:
        """Opens the board with these lines as its script."""
        self._script.write_text("\n".join(("process 0", *lines)) + "\n")
        return self.open()

    def open(self, gpu: str | int = UUID) -> NvmlBoard:
        return NvmlBoard(gpu, clock=self._library.fake_now, sleep=self._library.fake_wait)

    def work(self, seconds: float, watts: float) -> Callable[[], None]:
        """A call that keeps the board busy; it returns at once."""
        return lambda: self._library.fake_call(seconds, watts)

    def synchronize(self) -> None:
        self._library.fake_synchronize()

    @property
    def users(self) -> int:
        """How often the library is held."""
        return int(self._library.fake_users())


@pytest.fixture
def gpu(fake_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """The real binding on the fake library; what the binding had loaded before comes back afterwards."""
    library = ctypes.CDLL(str(fake_library))
    monkeypatch.setattr(pynvml, "nvmlLib", library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    monkeypatch.setenv("FAKE_NVML_SCRIPT", str(tmp_path / "script"))
    return FakeGpu(library, tmp_path / "script")
