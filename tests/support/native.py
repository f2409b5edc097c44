"""Building what tests/cpp and tests/cuda/emulator hold, with CMake and ninja, in a folder of build/ that is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from filelock import FileLock

from eqr_kernels import ops
from tests.support.environment import BUILT, REPOSITORY

# Beside this Python first, where pip puts them.
_PLACES = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """The command's exit code, and what it printed on either stream as stdout."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)


def tool(name: str) -> str:
    """The path of a tool; skips the test that asks where it is missing."""
    path = shutil.which(name, path=_PLACES)
    if path is None:
        pytest.skip(f"needs {name}: run  pip install {name}")
    return path


def build(source: str, folder: str, *options: str, target: str = "all") -> Path:
    """Configures tests/`source` and builds what has changed since the last time; returns the folder under build/."""
    place = REPOSITORY / "build" / folder
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    _build(place, target, REPOSITORY / "tests" / source, *generator, *options)
    return place


def _is_configured(place: Path, source: Path) -> bool:
    """Whether CMake configured this folder for these sources; in a copied checkout both are elsewhere."""
    cache = place / "CMakeCache.txt"
    lines = set(cache.read_text().splitlines()) if cache.is_file() and (place / "build.ninja").is_file() else set()
    return {f"CMAKE_HOME_DIRECTORY:INTERNAL={source}", f"CMAKE_CACHEFILE_DIR:INTERNAL={place}"} <= lines


def kernel_archive() -> Path | None:
    """The CPU kernels as the package's own build has them, brought up to date; None where tests must compile their own.

    That is where there is no such build, and on machines that cannot run all of it but for AMX.
    """
    place = REPOSITORY / "build" / f"cmake-{sys.implementation.cache_tag}"
    if not BUILT or "avx512_bf16" not in ops.cpu_isas() or not _is_configured(place, REPOSITORY):
        return None
    _build(place, "eqr_cpu_archive")
    return place / "libeqr_cpu_archive.a"


def _build(place: Path, target: str, source: Path | None = None, *options: str) -> None:
    """Configures where sources are named, and builds; one process at a time, for tests run in several."""
    commands = [[tool("cmake"), "--build", place, "--target", target]]
    if source is not None:
        commands.insert(0, [tool("cmake"), "-S", source, "-B", place, *options])
    place.parent.mkdir(exist_ok=True)
    with FileLock(f"{place}.lock", timeout=900):
        if source is not None and not _is_configured(place, source):
            shutil.rmtree(place, ignore_errors=True)
        for command in commands:
            done = run(*command)
            assert done.returncode == 0, f"{command} failed:\n{done.stdout[-8000:]}"
