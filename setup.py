"""Builds the native modules with CMake; everything declarative is in pyproject.toml.

Environment:
    RLNAS_CUDA: 0 builds without CUDA, 1 fails where nvcc is missing; by default CUDA is built where nvcc is.
    RLNAS_CUDA_ARCHS: CMake's list of GPU architectures, such as "90a" (default: see CMakeLists.txt).
    RLNAS_TORCH: 0 builds without PyTorch's headers, 1 fails where torch is missing or does not compile; by
        default ``_torch`` is built for the torch that this interpreter has.

While developing, ``python setup.py build_ext --inplace`` builds again only what changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()


def find_nvcc() -> str | None:
    """Returns nvcc's path from CUDACXX, PATH or CUDA_HOME, or None."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def find_torch() -> str | None:
    """Returns the folder of this interpreter's torch, or None; the path of an isolated build is left out."""
    question = "import importlib.util as u; print(*u.find_spec('torch').submodule_search_locations)"
    answer = subprocess.run([sys.executable, "-E", "-c", question], capture_output=True, text=True)
    return answer.stdout.strip() or None


def wanted(setting: str, find: Callable[[], str | None], missing: str) -> str | None:
    """Applies a setting of 0, 1 or nothing to what is found."""
    choice = os.environ.get(setting, "")
    if choice not in {"", "0", "1"}:
        sys.exit(f"{setting}={choice!r}: expected 0, 1 or nothing")
    found = None if choice == "0" else find()
    if choice == "1" and found is None:
        sys.exit(f"{setting}=1, but {missing}")
    return found


def build_tools_path() -> str:
    """Returns PATH with the cmake and ninja of this environment first."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])


class CMakeBuild(build_ext):
    """Runs CMake once a module."""

    def build_extension(self, ext: Extension) -> None:
        """Configures, builds and puts the module where setuptools wants it."""
        target = ext.name.rpartition(".")[2]
        folder = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = Path(self.build_temp).resolve() / target
        environment = {**os.environ, "PATH": build_tools_path()}
        configure = [
            *("cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DRLNAS_OUTPUT={folder}",
            f"-DRLNAS_MODULE={target}",
        ]
        if target == "_torch":
            configure.append(f"-DRLNAS_TORCH={torch}")
        if target == "_cuda":
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
            if architectures := os.environ.get("RLNAS_CUDA_ARCHS"):
                configure.append(f"-DRLNAS_CUDA_ARCHS={architectures}")
        try:
            for command in (configure, ["cmake", "--build", str(build)]):
                subprocess.run(command, check=True, env=environment)
        except subprocess.CalledProcessError as error:
            raise CompileError(f"{ext.name} does not compile ({error})") from error


torch = wanted("RLNAS_TORCH", find_torch, f"{sys.executable} has no torch")
nvcc = wanted("RLNAS_CUDA", find_nvcc, "nvcc is not in CUDACXX, PATH, CUDA_HOME or /usr/local/cuda")
modules = ["_cpu", *(["_torch"] if torch else []), *(["_cuda"] if nvcc else [])]
# _torch may fail: its headers are those of whatever torch there is.
may_fail = {"_torch"} if os.environ.get("RLNAS_TORCH") != "1" else set()
setup(
    ext_modules=[Extension(f"rlnas_fast.{name}", sources=[], optional=name in may_fail) for name in modules],
    cmdclass={"build_ext": CMakeBuild},
)
