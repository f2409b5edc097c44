"""Builds the compiled extension eqr_kernels._C with CMake and ninja. The metadata is in pyproject.toml.

Environment:
    EQR_BUILD_EXTENSION  unset: build it, or, where there is no C++ compiler, install without it (the package then
                         runs its reference backend and says why); 1: build it or fail; 0: install without it.
    EQR_BUILD_CUDA       AUTO (default), ON or OFF.
    EQR_TORCH_DIR        folder of the torch package to build with, when it is not importable here.
    EQR_CMAKE_ARGS       more arguments for CMake.
    CXX                  the compiler.  CMAKE_BUILD_PARALLEL_LEVEL: parallel jobs.
    CPPFLAGS, CXXFLAGS, LDFLAGS, CUDAFLAGS: flags, behind which come those of csrc/flags.cmake.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
PACKAGE = "eqr_kernels"
NOTE = "_no_extension.txt"  # why there is no extension: eqr_kernels.ops reads it
COMMIT = "_commit.txt"  # of the code, where there is no git to ask: eqr_kernels.commit reads it
CONFIGURED = "eqr_configured_for.json"
KEPT = (
    *("CXX", "CPPFLAGS", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDAHOSTCXX", "CUDAARCHS", "EQR_CMAKE_ARGS"),
    *("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS"),
    *("CMAKE_BUILD_TYPE", "CMAKE_CXX_COMPILER_LAUNCHER", "CMAKE_CUDA_COMPILER_LAUNCHER", "CMAKE_TOOLCHAIN_FILE"),
)
OLDEST_TORCH = (2, 11)
INSTALL = "pip install --no-build-isolation ."

# Files of the package that import nothing of it: it cannot be imported where torch is missing.
atomic_write = runpy.run_path(str(ROOT / PACKAGE / "atomic.py"))["atomic_write"]
code_commit = runpy.run_path(str(ROOT / PACKAGE / "commit.py"))["code_commit"]


class BuildError(Exception):
    """What is missing and what to do about it."""


def find_compiler() -> str | None:
    wanted = os.environ.get("CXX", "").strip()
    if wanted:
        return shutil.which(wanted) or shutil.which(wanted.split()[0])  # a path with spaces, or with arguments
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
    match = re.search(r"__version__ = '(\d+)\.(\d+)", version_file.read_text()) if version_file.is_file() else None
    if match is None:
        raise BuildError(f"{folder} is no folder of a torch package; correct EQR_TORCH_DIR")
    if (int(match[1]), int(match[2])) < OLDEST_TORCH:
        raise BuildError(f"torch in {folder} is {match[1]}.{match[2]}; install torch 2.11 or later")
    return folder


def find_tool(name: str) -> str:
    """cmake or ninja: from the Python package of that name, beside this Python, or on PATH."""
    places = [sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)]
    if spec := importlib.util.find_spec(name):
        for folder in spec.submodule_search_locations or []:
            places[:0] = [str(Path(folder) / "data" / "bin")]
    program = shutil.which(name, path=os.pathsep.join(places))
    if program is None:
        raise BuildError(f"{name} was not found; run  pip install {name}  and then  {INSTALL}")
    return program


def pybind11_cmake_dir() -> str:
    try:
        import pybind11
    except ImportError:
        raise BuildError(f"pybind11 was not found; run  pip install pybind11  and then  {INSTALL}") from None
    return str(pybind11.get_cmake_dir())


def remove_stale(build: Path) -> None:
    """Removes a build folder that CMake configured for something else: it keeps most of what it finds the first time.

    So a checkout that was moved would fail, and a compiler or flags that are named anew would be passed over.
    """
    compiler = Path(find_compiler() or "")
    nvcc = shutil.which(os.environ.get("CUDACXX") or "nvcc") or ""
    now = {"the folder": str(build), "the source folder": str(ROOT), "Python": sys.executable, "nvcc": nvcc}
    # /usr/bin/c++ is a link, to another one after an upgrade.
    now["the compiler"] = f"{compiler} ({compiler.resolve()})"
    now |= {name: os.environ.get(name, "") for name in KEPT}
    file = build / CONFIGURED
    if build.exists():
        try:
            before = json.loads(file.read_text())
            changed = [name for name, value in now.items() if before.get(name, "") != value]
            reason = f"{', '.join(changed)} changed since"
        except (OSError, ValueError, AttributeError):
            changed, reason = ["all"], "it does not say for what it was configured"
        if changed:
            print(f"eqr_kernels: building afresh in {build}: {reason}", flush=True)
            shutil.rmtree(build)
    build.mkdir(parents=True, exist_ok=True)
    atomic_write(file, json.dumps(now, indent=1).encode())


class CMakeBuild(build_ext):
    def run(self) -> None:
        in_place = self.inplace or self.editable_mode
        if in_place and not os.access(ROOT / PACKAGE, os.W_OK):
            raise BuildError(
                f"{ROOT / PACKAGE} cannot be written, where an editable or in-place build puts the extension; run  "
                f"pip install --no-build-isolation {shlex.quote(str(ROOT))}  or work in a copy of the folder"
            )
        super().run()

    def copy_file(self, infile: Any, outfile: Any, *args: Any, **options: Any) -> tuple[Any, bool]:
        """Puts a built extension in place at once: a process that uses the old one keeps it, none sees half of one."""
        atomic_write(outfile, Path(infile).read_bytes())
        return outfile, True

    def build_extension(self, ext: Extension) -> None:
        build = BUILD / f"cmake-{sys.implementation.cache_tag}"
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
        # CMake knows no CPPFLAGS.
        flags = " ".join(os.environ[name] for name in ("CPPFLAGS", "CXXFLAGS") if os.environ.get(name))
        remove_stale(build)
        try:
            subprocess.run(configure, check=True, env={**os.environ, "CXXFLAGS": flags})
            subprocess.run([cmake, "--build", str(build)], check=True)
        except subprocess.CalledProcessError as error:
            raise BuildError(
                f"the extension did not build: {shlex.join(error.cmd)} gave {error.returncode}, messages above. "
                f"Mend the cause and run  {INSTALL}  again; or set EQR_BUILD_EXTENSION=0 to install without the "
                "extension (reference backend only)"
            ) from None
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(build / target.name, target)


def write_commit(package: Path) -> None:
    """Notes the commit of the code in a copy of the package."""
    (package / COMMIT).unlink(missing_ok=True)  # of an earlier build
    if commit := code_commit():
        (package / COMMIT).write_text(f"{commit}\n")


class SourceDistribution(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        write_commit(Path(base_dir) / PACKAGE)


class BuildPython(build_py):
    def run(self) -> None:
        super().run()
        folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
        if not self.editable_mode:
            write_commit(folder)
        note = folder / NOTE
        note.unlink(missing_ok=True)
        if WITHOUT:
            for stale in folder.glob(f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"):
                stale.unlink()
            note.write_text(WITHOUT + "\n", encoding="utf-8")
            print(
                f"eqr_kernels: NOT building the compiled extension: {WITHOUT}. The reference backend runs without it."
            )


BUILD = ROOT / "build"
options: dict[str, dict[str, str]] = {}
if not os.access(ROOT, os.W_OK):
    BUILD = Path(tempfile.mkdtemp(prefix="eqr_kernels-build-"))
    atexit.register(shutil.rmtree, BUILD, ignore_errors=True)
    print(f"eqr_kernels: {ROOT} cannot be written, so the build is in {BUILD}", flush=True)
    options = {"build": {"build_base": str(BUILD)}, "egg_info": {"egg_base": str(BUILD)}}
try:
    WITHOUT = why_without_extension()
    setup(
        ext_modules=[] if WITHOUT else [Extension(f"{PACKAGE}._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild, "build_py": BuildPython, "sdist": SourceDistribution},
        options=options,
    )
except BuildError as error:
    sys.exit(f"\neqr_kernels: {error}\n")
