"""What every benchmark file shares: where results go, what they say of the machine, and how two things are compared.

`pytest benchmarks/test_x.py --results DIR` writes DIR/<device>/x.json: device, versions, commit, command, and a row for
each benchmark. `make bench` does so for every file, each in a fresh process. With --quick, fewer sizes and peers are
measured, in minutes, and the file is x-quick.json.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import pytest
from peers.workload import cpu_flags
from rich.console import Console
from rich.table import Table

TABLES = pytest.StashKey[list[Table]]()
BUSY = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="DIR", help="write the results as JSON to DIR/<device>/<file>.json")
    parser.addoption("--quick", action="store_true", help="fewer sizes and peers: minutes in place of an hour")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = []
    config.stash[BUSY] = machine.busy()
    folder = config.getoption("--results")
    if folder is None:
        return
    stems = {Path(argument.partition("::")[0]).stem.removeprefix("test_") for argument in config.args}
    quick = "-quick" if config.getoption("--quick") else ""
    name = f"{'+'.join(sorted(stems))}{quick}.json"
    path = Path(folder) / machine.folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    config.option.benchmark_json = str(path)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # the plugin's own includes the host's name
    machine_info.update(
        machine.information(),
        cpu_features=sorted(f for f in cpu_flags() if f.startswith(("avx", "fma", "amx"))),
        busy_before=config.stash[BUSY],
    )


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    output_json["command"] = shlex.join(["python", "-m", "pytest", *sys.argv[1:]])
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)  # every single timing


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def tables(request: pytest.FixtureRequest) -> list[Table]:
    """Tables to print at the end of the run."""
    return request.config.stash[TABLES]


def pytest_terminal_summary(config: pytest.Config) -> None:
    if config.stash[TABLES] and config.stash[BUSY] > 0.1:
        print(f"The machine was {config.stash[BUSY]:.0%} busy with other work before this run: its timings say little.")
    for table in config.stash[TABLES]:
        # As wide as it must be: a log has no width.
        Console(width=None if sys.stdout.isatty() else 140).print(table)


def median_seconds(candidates: dict[str, Callable[[], object]], seconds: float = 1.0) -> dict[str, float]:
    """Median time of a call of each, in turn, so that whatever else the machine does meets them all alike."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for call in candidates.values():
        call()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}
