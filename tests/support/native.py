"""Building what tests/cpp and tests/cuda/emulator hold, with CMake and ninja, in a folder of build/ that is kept."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.support.environment import REPOSITORY

# Beside this Python first, where pip puts them.
_PLACES = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """The command's exit code, and what it printed on either stream as stdout."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)


def tool(name: str) -> str:
    """The path of a tool; skips the test that asks where it is missing."""
    found = shutil.which(name, path=_PLACES)
    if found is None:
        pytest.skip(f"needs {name}: run  pip install {name}")
    return found


def build(source: str, folder: str, *options: str, target: str = "all") -> Path:
    """Configures tests/`source` and builds what has changed since the last time; returns the folder under build/."""
    place, cmake = REPOSITORY / "build" / folder, tool("cmake")
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}"]
    for command in (
        [cmake, "-S", REPOSITORY / "tests" / source, "-B", place, *generator, *options],
        [cmake, "--build", place, "--target", target],
    ):
        done = run(*command)
        assert done.returncode == 0, f"{command} failed:\n{done.stdout[-8000:]}"
    return place
