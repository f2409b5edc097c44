"""What every benchmark file shares: where results go, what they say of the machine, and how two things are compared.

`pytest benchmarks/test_x.py --results DIR` writes DIR/<device>/x.json: device, versions, commit, command, and a row for
each benchmark. `make bench` does so for every file, each in a fresh process. With --quick, fewer sizes and peers are
measured, in minutes, and the file is x-quick.json.
"""

from __future__ import annotations

import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peers.workload import cpu_flags
from rich.console import Console
from rich.table import Table

import eqr_kernels
from eqr_kernels import ops

TABLES = pytest.StashKey[list[Table]]()
BUSY = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="DIR", help="write the results as JSON to DIR/<device>/<file>.json")
    parser.addoption("--quick", action="store_true", help="fewer sizes and peers: minutes in place of an hour")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = []
    config.stash[BUSY] = busy()
    folder = config.getoption("--results")
    if folder is None:
        return
    stems = {Path(argument.partition("::")[0]).stem.removeprefix("test_") for argument in config.args}
    quick = "-quick" if config.getoption("--quick") else ""
    name = f"{'+'.join(sorted(stems))}{quick}.json"
    path = Path(folder) / re.sub(r"[^a-z0-9]+", "-", device().lower()).strip("-") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    config.option.benchmark_json = str(path)


def cpu() -> str:
    found = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    return found[1].strip() if found else platform.processor() or platform.machine()


def busy(seconds: float = 0.5) -> float:
    """The share of the machine's CPU time that others took while this process slept; 0 where /proc does not say."""

    def ticks() -> tuple[int, int]:
        fields = [int(f) for f in _read("/proc/stat").partition("\n")[0].split()[1:9]]
        return sum(fields), sum(fields[3:5])  # all, idle and waiting for a disk

    if not _read("/proc/stat"):
        return 0.0
    before, idle_before = ticks()
    time.sleep(seconds)
    after, idle_after = ticks()
    return round(1 - (idle_after - idle_before) / max(1, after - before), 3)


def device() -> str:
    """The GPU's name, or the CPU's with its highest instruction set (a name may stand for several) and the threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    isa = f" {ops.cpu_isas()[-1].replace('_', ' ')}" if ops.extension_status()[0] else ""
    return f"{cpu()}{isa}, {torch.get_num_threads()} threads"


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    built, reason = ops.extension_status()
    machine_info.clear()  # the plugin's own includes the host's name
    machine_info.update(
        device=device(),
        cpu=cpu(),
        cpu_features=sorted(f for f in cpu_flags() if f.startswith(("avx", "fma", "amx"))),
        threads=torch.get_num_threads(),
        busy_before=config.stash[BUSY],
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=numpy.__version__,
        eqr_kernels=eqr_kernels.__version__,
        extension=reason,
        cpu_isa=ops.cpu_isa() if built else None,
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
