"""The torch-free C++ code and its own tests (tests/cpp), built as one program in build/cpp-tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.environment import needs_compiler
from tests.support.native import build, kernel_archive, run


@pytest.fixture(scope="module")
def program() -> Path:
    return build("cpp", "cpp-tests", f"-DEQR_ARCHIVE={kernel_archive() or ''}") / "eqr_cpp_tests"


@needs_compiler
@pytest.mark.slow
def test_the_kernels_and_the_fixed_point_loop(program: Path) -> None:
    done = run(program)
    print(done.stdout)  # its times, and what it skipped and why
    assert done.returncode == 0, done.stdout


@needs_compiler
@pytest.mark.slow
def test_a_name_that_no_test_has_is_an_error(program: Path) -> None:
    done = run(program, "no such test")
    assert done.returncode == 1 and "0 tests ran" in done.stdout
