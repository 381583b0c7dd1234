"""Builds the native modules with CMake; everything declarative is in pyproject.toml.

Environment:
    RLNAS_CUDA: 0 builds without CUDA, 1 fails where nvcc is missing; by default CUDA is built where nvcc is.
    RLNAS_CUDA_ARCHS: CMake's list of GPU architectures, such as "90a" (default: see CMakeLists.txt).

While developing, ``python setup.py build_ext --inplace`` builds again only what changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def find_nvcc() -> str | None:
    """Returns nvcc's path from CUDACXX, PATH or CUDA_HOME, or None."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((found for name in candidates if name and (found := shutil.which(name))), None)


def wanted_nvcc() -> str | None:
    """Applies RLNAS_CUDA to what was found."""
    choice = os.environ.get("RLNAS_CUDA", "")
    if choice not in {"", "0", "1"}:
        sys.exit(f"RLNAS_CUDA={choice!r}: expected 0, 1 or nothing")
    nvcc = None if choice == "0" else find_nvcc()
    if choice == "1" and nvcc is None:
        sys.exit("RLNAS_CUDA=1, but nvcc is not in CUDACXX, PATH, CUDA_HOME or /usr/local/cuda")
    return nvcc


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
        if target == "_cuda":
            configure.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}")
            if architectures := os.environ.get("RLNAS_CUDA_ARCHS"):
                configure.append(f"-DRLNAS_CUDA_ARCHS={architectures}")
        for command in (configure, ["cmake", "--build", str(build)]):
            subprocess.run(command, check=True, env=environment)


modules = ["_cpu", *(["_cuda"] if wanted_nvcc() else [])]
setup(
    ext_modules=[Extension(f"rlnas_fast.{name}", sources=[]) for name in modules],
    cmdclass={"build_ext": CMakeBuild},
)
