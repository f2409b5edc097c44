"""Bodies of the CUDA kernels on the host, built from tests/cuda/emulator as one program; no GPU is needed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.environment import REPOSITORY, needs_compiler
from tests.support.native import build, run

SOURCE = REPOSITORY / "tests" / "cuda" / "emulator"
TESTS = [
    pytest.param(
        name,
        id=f"{file.stem.removeprefix('test_')}-{name}",
        marks=[pytest.mark.slow] if name.endswith("under_every_schedule") else [],
    )
    for file in sorted(SOURCE.glob("test_*.cpp"))
    for name in re.findall(r"^TEST\((\w+)\)", file.read_text(), re.MULTILINE)
]
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def program() -> Path:
    return build("cuda/emulator", "cuda-tests") / "eqr_cuda_tests"


@pytest.mark.parametrize("name", TESTS)
def test_on_the_host(program: Path, name: str) -> None:
    done = run(program, name)
    print(done.stdout)
    assert done.returncode == 0 and re.search(rf"^ok .* {name}$", done.stdout, re.MULTILINE), done.stdout


def test_every_test_has_a_case_here(program: Path) -> None:
    done = run(program, *[f"-{test.values[0]}" for test in TESTS])
    assert "0 tests ran" in done.stdout, done.stdout


def test_the_emulator_has_all_of_the_device() -> None:
    device = (REPOSITORY / "csrc" / "cuda" / "device.h").read_text()
    emulator = (SOURCE / "emulator.h").read_text()
    functions = set(re.findall(r"EQR_DEVICE static [\w ]+?[ *](\w+)\(", device))
    assert len(functions) > 40, functions
    assert not functions - set(re.findall(r"^  static [\w ]+?[ *](\w+)\(", emulator, re.MULTILINE))
