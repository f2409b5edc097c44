"""What every benchmark file shares: where results go, what they say of the machine, and the tables at the end.

`pytest benchmarks/test_x.py --results DIR` writes DIR/<device>/x.json: device, versions, commit, command, and a row for
each benchmark. `make bench` does so for every file, each in a fresh process (suites.py). With --quick, fewer sizes and
peers are measured, in minutes, and the file is x-quick.json.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import machine
import pytest
from peers.workload import cpu_flags
from rich.console import Console
from rich.table import Table

TABLES = pytest.StashKey[list[Table]]()
BUSY = pytest.StashKey[float]()
STARTED = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="DIR", help="write the results as JSON to DIR/<device>/<file>.json")
    parser.addoption("--summary", metavar="FILE", help="append to FILE a line that says what was measured, and where")
    parser.addoption("--quick", action="store_true", help="fewer sizes and peers: minutes in place of an hour")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLES] = []
    config.stash[STARTED] = time.perf_counter()
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
    output_json["wall_seconds"] = round(time.perf_counter() - config.stash[STARTED], 1)
    for row in output_json["benchmarks"]:
        row["stats"].pop("data", None)  # every single timing


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def tables(request: pytest.FixtureRequest) -> list[Table]:
    """Tables to print at the end of the run."""
    return request.config.stash[TABLES]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if config.stash[TABLES] and config.stash[BUSY] > 0.1:
        print(f"The machine was {config.stash[BUSY]:.0%} busy with other work before this run: its timings say little.")
    for table in config.stash[TABLES]:
        # As wide as it must be: a log has no width.
        Console(width=None if sys.stdout.isatty() else 140).print(table)
    seconds = time.perf_counter() - config.stash[STARTED]
    print(f"wall time: {seconds:.0f} s")
    if config.getoption("--summary"):
        with Path(config.getoption("--summary")).open("a") as file:
            print(summary(terminalreporter.stats, config, seconds), file=file)


def summary(stats: dict[str, list[Any]], config: pytest.Config, seconds: float) -> str:
    """One line: the file, counts of tests, wall time, and where the JSON is or why there is none."""
    names = ", ".join(Path(argument.partition("::")[0]).name for argument in config.args)
    by_outcome = {kind: stats.get(kind, []) for kind in ("passed", "failed", "error", "skipped")}
    counts = ", ".join(f"{len(reports)} {kind}" for kind, reports in by_outcome.items() if reports) or "nothing was run"
    path = getattr(config.option, "benchmark_json", None)
    path = getattr(path, "name", path)  # the plugin opens it
    reasons = dict.fromkeys(str(report.longrepr[2]).removeprefix("Skipped: ") for report in by_outcome["skipped"])
    reasons.pop("left out by --quick", None)
    where = f" -> {path}" if path and by_outcome["passed"] else ""
    return f"{names}: {counts}, {seconds:.0f} s{where}" + "".join(f"; skipped: {reason}" for reason in reasons)
