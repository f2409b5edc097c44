"""The torch-free C++ code and its own tests (tests/cpp), built as one program in build/cpp-tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from conftest import REPOSITORY, needs_compiler

PLACES = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)


@pytest.fixture(scope="module")
def program() -> Path:
    """The test program; CMake builds what has changed since the last time."""
    cmake, ninja = shutil.which("cmake", path=PLACES), shutil.which("ninja", path=PLACES)
    if cmake is None:
        pytest.skip("needs CMake: run  pip install cmake")
    if ninja is None:
        pytest.skip("needs ninja: run  pip install ninja")
    build = REPOSITORY / "build" / "cpp-tests"
    source = REPOSITORY / "tests" / "cpp"
    for command in (
        [cmake, "-S", source, "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"],
        [cmake, "--build", build],
    ):
        done = run(*command)
        assert done.returncode == 0, f"{command} failed:\n{done.stdout[-8000:]}"
    return build / "eqr_cpp_tests"


@needs_compiler
@pytest.mark.slow
def test_the_kernels_and_the_fixed_point_loop(program: Path) -> None:
    done = run(program)
    print(done.stdout)  # its times, and what it skipped and why
    assert done.returncode == 0, done.stdout


@needs_compiler
def test_a_name_that_no_test_has_is_an_error(program: Path) -> None:
    done = run(program, "no such test")
    assert done.returncode == 1 and "0 tests ran" in done.stdout
