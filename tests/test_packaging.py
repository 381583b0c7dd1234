"""sdist to wheel to import: what a user installs is what the repository holds."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import rlnas_fast
from rlnas_fast._version import __version__
from rlnas_fast.ops import native

ROOT = Path(__file__).parents[1]


def run(*command: str, cwd: Path, **environment: str) -> str:
    """Runs a command of this interpreter's environment and returns what it printed."""
    done = subprocess.run(
        command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_sdist_builds_a_wheel_that_imports(tmp_path: Path) -> None:
    """As on a CPU that is no x86 and without optimisation: the package under test was built the other way."""
    build = (sys.executable, "-m", "build", "--no-isolation")
    run(*build, "--sdist", "--outdir", str(tmp_path), cwd=ROOT)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
        sdist.extractall(tmp_path, filter="data")
    tracked = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert tracked <= names
    assert {"CMakeLists.txt", "LICENSE", "pyproject.toml", "setup.py", "rlnas_fast/py.typed"} <= names
    source = tmp_path / f"rlnas_fast-{__version__}"
    toolchain = tmp_path / "toolchain.cmake"
    toolchain.write_text(
        "set(CMAKE_SYSTEM_NAME ${CMAKE_HOST_SYSTEM_NAME})\nset(CMAKE_SYSTEM_PROCESSOR other)\n"
        'set(CMAKE_CXX_FLAGS_DEBUG "" CACHE STRING "no symbols either")\n'
    )
    settings = {"RLNAS_CUDA": "0", "RLNAS_TORCH": "0", "CMAKE_TOOLCHAIN_FILE": str(toolchain)}
    debug = "--config-setting=--build-option=build_ext --debug"
    run(*build, "--wheel", debug, "--outdir", str(tmp_path), cwd=source, **settings)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as contents:
        contents.extractall(site)
    assert list(site.glob("rlnas_fast/_cpu.*.so"))
    assert (site / "rlnas_fast" / "py.typed").exists()
    assert list(site.glob("*.dist-info/licenses/LICENSE"))
    code = (
        "import rlnas_fast, torch; from rlnas_fast.ops import nonlocal_attention; "
        "from rlnas_fast.ops.native import cpu; assert cpu().usable_isas() == ['plain']; "
        "y = nonlocal_attention(*torch.randn(3, 1, 4, 5), backend='cpu'); print(rlnas_fast.__file__, y.shape)"
    )
    assert str(site) in run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(site))


def test_version_has_one_source() -> None:
    assert rlnas_fast.__version__ == __version__


def test_kernels_include_no_torch_header() -> None:
    """They serve every torch; what is tied to one lies apart."""
    tied = {ROOT / "csrc/bindings_torch.cpp", *(ROOT / "csrc/torch").iterdir()}
    for path in {*(ROOT / "csrc").rglob("*.*")} - tied:
        assert "torch/" not in path.read_text(), path


def test_calls_of_kernels_are_built_for_this_torch() -> None:
    assert native.torch_calls_unavailable_reason() is None


def test_calls_of_another_build_are_not_used() -> None:
    """Kernels are C++ objects: one module must not call what it was not compiled for."""
    code = (
        "import torch; from rlnas_fast import _cpu; _cpu.KERNEL_INTERFACE = 'older'\n"
        "from rlnas_fast.ops import native; assert native.torch_calls() is None\n"
        "print(native.torch_calls_unavailable_reason())"
    )
    assert "from another build" in run(sys.executable, "-c", code, cwd=ROOT)


def test_one_openmp_pool() -> None:
    """The extension finds libgomp by name, which is the one PyTorch has loaded."""
    code = (
        "from rlnas_fast.ops.native import cpu; cpu(); import re; "
        "print(len(set(re.findall(r'/\\S*libgomp\\S*', open('/proc/self/maps').read()))))"
    )
    assert run(sys.executable, "-c", code, cwd=ROOT).strip() == "1"
