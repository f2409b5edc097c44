"""Fixtures: small models, one of which contracts (random weights do not), and the real puzzles where they are."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eqr_kernels import EquilibriumReasoner, ops
from tests.support.environment import BUILT, REPOSITORY, needs_extension
from tests.support.models import make_contractive, tiny_config

# Some tests run pytest in a process of its own, which must not take itself for a worker of this run.
for _name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
    del os.environ[_name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of benchmarks/, and puts the files with most slow tests first: at the end no process waits."""
    for item in items:
        if item.path.parent == REPOSITORY / "tests" / "benchmarks":
            item.add_marker(pytest.mark.tooling)
        # `make gpu-check` runs these files alone.
        assert item.path.stem.endswith("_gpu") or not item.get_closest_marker("gpu"), f"{item.path}: name it test_*_gpu"
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.fixture
def contractive() -> EquilibriumReasoner:
    return make_contractive(tiny_config())


@pytest.fixture(params=["reference", pytest.param("cpu", marks=needs_extension)])
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that runs here, by name."""
    return request.param


@pytest.fixture(params=ops.cpu_isas() if BUILT else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that was built and runs here, in use during the test."""
    before = ops.cpu_isa()
    ops.set_cpu_isa(request.param)
    yield request.param
    ops.set_cpu_isa(before)


@pytest.fixture
def restore():
    """Puts the instruction set and the number of threads back."""
    isa, threads = ops.cpu_isa() if BUILT else None, torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    if isa is not None:
        ops.set_cpu_isa(isa)


@pytest.fixture
def puzzles() -> torch.Tensor:
    """Tokens [12, 6] of the tiny config, all rows different."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, 7, (12, 6), generator=generator)


@pytest.fixture(scope="session")
def sudoku_data() -> Path:
    """Folder of train.csv.gz and dev.csv.gz; the test skips where it is missing."""
    folder = Path(os.environ.get("EQR_SUDOKU_DATA", REPOSITORY.parent / "shared" / "data" / "sudoku"))
    if not (folder / "dev.csv.gz").is_file():
        pytest.skip(f"needs real puzzles: {folder}/dev.csv.gz is not there; set EQR_SUDOKU_DATA to their folder")
    return folder
