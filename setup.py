"""Builds the compiled extension eqr_kernels._C with CMake and ninja. The metadata is in pyproject.toml.

Environment:
    EQR_BUILD_EXTENSION  unset: build it, or, where there is no C++ compiler, install without it (the package then
                         runs its reference backend and says why); 1: build it or fail; 0: install without it.
    EQR_BUILD_CUDA       AUTO (default), ON or OFF.
    EQR_TORCH_DIR        folder of the torch package to build with, when it is not importable here.
    EQR_CMAKE_ARGS       more arguments for CMake.
    CXX                  the compiler.  CMAKE_BUILD_PARALLEL_LEVEL: parallel jobs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGE = "eqr_kernels"
NOTE = "_no_extension.txt"  # why there is no extension: eqr_kernels.ops reads it
OLDEST_TORCH = (2, 11)
INSTALL = "pip install --no-build-isolation ."


class BuildError(Exception):
    """What is missing and what to do about it."""


def find_compiler() -> str | None:
    wanted = os.environ.get("CXX")
    if wanted:
        return shutil.which(shlex.split(wanted)[0])
    return next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def why_without_extension() -> str | None:
    """The reason to install without the extension, or None to build it."""
    choice = os.environ.get("EQR_BUILD_EXTENSION", "").strip().upper()
    if choice not in ("", "AUTO", "0", "OFF", "1", "ON"):
        raise BuildError(f"EQR_BUILD_EXTENSION={choice!r} is not known; set it to 1, 0, or leave it unset")
    if choice in ("0", "OFF"):
        return "eqr_kernels was installed with EQR_BUILD_EXTENSION=0"
    if find_compiler() is None:
        missing = f"no C++ compiler was found when eqr_kernels was installed (CXX={os.environ.get('CXX', '')!r})"
        if choice in ("1", "ON"):
            raise BuildError(f"EQR_BUILD_EXTENSION=1, but {missing}; install g++ or clang++, or set CXX to one")
        return missing
    return None


def find_torch() -> Path:
    """Folder of the torch package, found without importing it: only headers and the link library are needed."""
    if wanted := os.environ.get("EQR_TORCH_DIR"):
        folder = Path(wanted)
    else:
        spec = importlib.util.find_spec("torch")
        if spec is None or spec.origin is None:
            raise BuildError(
                "torch cannot be imported where the extension is built, and its headers are needed. pip builds in an "
                f"isolated environment unless told otherwise: install torch, then run  {INSTALL}  "
                "(or set EQR_BUILD_EXTENSION=0 to install without the extension)"
            )
        folder = Path(spec.origin).parent
    version_file = folder / "version.py"
    found = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text()) if version_file.is_file() else None
    if found is None:
        raise BuildError(f"{folder} is no folder of a torch package; correct EQR_TORCH_DIR")
    if (int(found[1]), int(found[2])) < OLDEST_TORCH:
        raise BuildError(f"torch in {folder} is {found[1]}.{found[2]}; install torch 2.11 or later")
    return folder


def find_tool(name: str) -> str:
    """cmake or ninja: from the Python package of that name, beside this Python, or on PATH."""
    places = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    if spec := importlib.util.find_spec(name):
        for folder in spec.submodule_search_locations or []:
            places[:0] = [str(Path(folder) / "data" / "bin")]
    found = shutil.which(name, path=os.pathsep.join(places))
    if found is None:
        raise BuildError(f"{name} was not found; run  pip install {name}  and then  {INSTALL}")
    return found


def pybind11_cmake_dir() -> str:
    try:
        import pybind11
    except ImportError:
        raise BuildError(f"pybind11 was not found; run  pip install pybind11  and then  {INSTALL}") from None
    return str(pybind11.get_cmake_dir())


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = find_tool("cmake")
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11_cmake_dir()}",
            f"-DEQR_TORCH_DIR={find_torch()}",
            f"-DEQR_VERSION={self.distribution.get_version()}",
            f"-DEQR_BUILD_CUDA={os.environ.get('EQR_BUILD_CUDA', 'AUTO').upper()}",
            *shlex.split(os.environ.get("EQR_CMAKE_ARGS", "")),
        ]
        try:
            subprocess.run(configure, check=True)
            subprocess.run([cmake, "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            raise BuildError(
                f"the extension did not build: {shlex.join(error.cmd)} gave {error.returncode}, messages above. "
                f"Mend the cause, remove {build} if it holds a stale configuration, and run  {INSTALL}  again; "
                "or set EQR_BUILD_EXTENSION=0 to install without the extension (reference backend only)"
            ) from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(build / target.name, target)


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
        note = folder / NOTE
        note.unlink(missing_ok=True)
        if WITHOUT:
            for stale in folder.glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"):
                stale.unlink()
            note.write_text(WITHOUT + "\n")
            print(
                f"eqr_kernels: NOT building the compiled extension: {WITHOUT}. The reference backend runs without it."
            )


try:
    WITHOUT = why_without_extension()
    setup(
        ext_modules=[] if WITHOUT else [Extension(f"{PACKAGE}._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython},
    )
except BuildError as error:
    sys.exit(f"\neqr_kernels: {error}\n")
