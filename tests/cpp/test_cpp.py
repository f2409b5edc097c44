"""The torch-free C++ code and its own tests (tests/cpp), built as one program in build/cpp-tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from eqr_kernels import ops
from tests.support.environment import needs_compiler
from tests.support.native import build, kernel_archive, run


@pytest.fixture(scope="module")
def program() -> Path:
    archive = kernel_archive()
    emulate_amx = archive is not None and "amx" not in ops.cpu_isas()
    options = (f"-DEQR_ARCHIVE={archive or ''}", f"-DEQR_EMULATE_AMX={'ON' if emulate_amx else 'OFF'}")
    return build("cpp", "cpp-tests", *options) / "eqr_cpp_tests"


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
