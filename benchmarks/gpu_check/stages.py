"""The stages in order: what each runs, for how long at most, and what counts as failed."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import PRESET, SMALL
from .child import ROOT, Ended, run

FUSED = ("cuda", "triton")
PEERS = ("eager-precast", "cudagraph", "compile-cudagraph", "compile")
# In the order of what matters: a stage that is cut off has the first ones.
SIZES = (528, 1, 132, 2112, 8)
# Shares of the stage's time; compiling takes minutes where a launch takes milliseconds.
WEIGHTS = {"cuda": 2.0, "triton": 3.0, "compile-cudagraph": 3.0, "compile": 2.0}
KERNELS = "kns=throughput|latency|fixed_point"


@dataclass
class Check:
    """One run of all stages.

    Attributes:
        device: "cuda", or "cpu" in a dry run.
        puzzles: file or folder of real puzzles.
        found: what each stage has found so far, by its name.
        save: called whenever `found` has changed.
    """

    dry_run: bool
    puzzles: Path
    save: Callable[[], object]
    device: str = "cuda"
    python: str = sys.executable
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    ends: float = 0.0  # of the stage that runs now, on the monotonic clock

    @property
    def left(self) -> float:
        return max(1.0, self.ends - time.monotonic())

    def usable(self) -> dict[str, str | None]:
        """Backend -> why it cannot run here, as the build stage found it."""
        reasons: dict[str, str | None] = self.results.get("build", {}).get("usable", {}).get("backends", {})
        return {name: reasons.get(name, "the build stage did not tell") for name in (*FUSED, "reference", "cpu")}

    def ours(self) -> list[str]:
        """Our backends that can run, the reference last; in a dry run the cpu backend stands in for the fused ones."""
        names = ("cpu", "reference") if self.dry_run else (*FUSED, "reference")
        return [name for name in names if self.usable()[name] is None]

    def work(self, function: str, on_row: Callable[[dict[str, Any]], object], limit: float, **arguments: Any) -> Ended:
        """Runs a function of work.py; `on_row` gets each of its rows."""
        command = [self.python, "-m", "benchmarks.gpu_check.work", function, json.dumps(arguments)]
        threads = {"OMP_NUM_THREADS": "1"} if self.dry_run else {}
        return run(command, limit, lambda line: line.startswith("{") and on_row(json.loads(line)), **threads)

    def rows(self, stage: dict[str, Any], function: str, limit: float | None = None, **arguments: Any) -> Ended:
        """The same, with rows kept in stage["rows"], printed and saved as they come."""
        rows = stage.setdefault("rows", [])

        def keep(row: dict[str, Any]) -> None:
            rows.append(row)
            print(json.dumps(row), flush=True)
            self.save()

        return self.work(function, keep, self.left if limit is None else limit, **arguments)


Stage = Callable[[Check, dict[str, Any]], None]
"""(the run, what it has found: to be filled). Sets "failed" or "skipped" to the reason where it is that."""


def _failures(stage: dict[str, Any], *ended: Ended) -> None:
    reasons = [e.why for e in ended if e.why]
    for row in stage.get("rows", []):
        # A peer that does not work here is a gap in the table; one that computes something else is a mistake.
        for key in ("wrong",) if row.get("contender") in PEERS else ("wrong", "failure"):
            if key in row:
                reasons.append(f"{_label(row)}: {row[key]}")
    if reasons:
        stage["failed"] = "; ".join(reasons)


def _label(row: dict[str, Any]) -> str:
    size = f", {row['trajectories']} trajectories" if "trajectories" in row else ""
    return str(row.get("contender") or row.get("backend") or row.get("launch", "")) + size


def environment(check: Check, stage: dict[str, Any]) -> None:
    ended = check.work("environment", stage.update, check.left)
    _failures(stage, ended)
    missing = stage.get("missing_packages", [])
    if missing:
        stage["note"] = f"packages not installed: {', '.join(missing)}; carry wheels of them, nothing is fetched here"


def build(check: Check, stage: dict[str, Any]) -> None:
    """The extension in place, in the source tree: no installation."""
    start, ended = time.monotonic(), []
    if check.dry_run:
        stage["note"] = "dry run: what is built already is used"
    else:
        nvcc = check.results["environment"].get("tools", {}).get("nvcc")
        settings = {"EQR_BUILD_EXTENSION": "1", "EQR_BUILD_CUDA": "ON" if nvcc else "OFF"}
        if nvcc:
            settings["CUDACXX"] = nvcc
        lines: list[str] = []
        done = run([check.python, "setup.py", "build_ext", "--inplace"], check.left - 10, lines.append, **settings)
        ended.append(done)
        stage |= {"settings": settings, "output": lines[-20:]}
    stage["build_s"] = round(time.monotonic() - start, 1)
    results: dict[str, Any] = {}
    ended.append(check.work("usable", results.update, max(20.0, check.left), device=check.device))
    stage["usable"] = results
    _failures(stage, *ended)


def tests(check: Check, stage: dict[str, Any]) -> None:
    outcomes: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "ERROR": [], "SKIPPED": []}
    lines: list[str] = []

    def read(line: str) -> None:
        lines.append(line)
        if match := re.match(r"(tests/\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", line):
            outcomes[match[2]].append(match[1])

    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*_gpu.py"))
    command = ["-m", "pytest", *files, "-m", "gpu", "-v", "-p", "no:cacheprovider", "--color=no", "--tb=short"]
    ended = run([check.python, *command], check.left, read)
    stage["outcomes"] = {name.lower(): len(tests) for name, tests in outcomes.items() if tests}
    stage["failures"] = outcomes["FAILED"] + outcomes["ERROR"]
    if stage["failures"] or ended.why:
        stage["output"] = lines[-60:]
        stage["failed"] = ended.why or f"{len(stage['failures'])} tests failed"
    elif not check.dry_run and not outcomes["PASSED"]:
        stage["failed"] = "no test ran on the GPU"


def sanitizer(check: Check, stage: dict[str, Any]) -> None:
    """Memory errors and races in shared memory of the fused kernels: a launch with one trajectory, one with many."""
    program = check.results["environment"].get("tools", {}).get("compute-sanitizer")
    backends = [name for name in check.ours() if name != "reference"]
    if not check.dry_run and (program is None or not backends):
        stage["skipped"] = "compute-sanitizer is not on PATH" if program is None else "no fused backend can run"
        return
    rows = stage["rows"] = []
    # The first of each pair runs in the latency regime where a backend has one, the second in that for throughput.
    launches = [(b, n) for n in ((2,) if check.dry_run else (1, 264)) for b in backends]
    tools = ("no checker",) if check.dry_run else ("memcheck", "racecheck")
    cases = [(tool, *launch) for launch in launches for tool in tools]
    for number, (tool, backend, count) in enumerate(cases):
        launch = ["benchmarks/profile/launch.py", "--no-warm-up", "--backend", backend, "--preset", SMALL]
        launch += ["--trajectories", str(count), "--depth", "2"]
        under = [
            program,
            "--tool",
            tool,
            "--kernel-name",
            KERNELS,
            "--show-backtrace",
            "device",
            "--error-exitcode",
            "99",
        ]
        lines: list[str] = []
        limit = max(5.0, check.left / (len(cases) - number))
        command = [check.python, *launch] if check.dry_run else [*under, check.python, *launch]
        # A tuner would time each of its candidates, hundreds of times as slow under the checker.
        ended = run(command, limit, lines.append, EQR_TRITON_TUNE="0", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        row: dict[str, Any] = {"launch": f"{tool} {backend} {count}", "seconds": round(ended.seconds, 1)}
        row["summary"] = next((line.strip() for line in reversed(lines) if "SUMMARY" in line), "")
        if ended.why:
            reports = [line for line in lines if line.startswith("=========")]
            row |= {"wrong": ended.why, "output": reports[:15] or [*lines, *ended.errors.splitlines()][-15:]}
        rows.append(row)
        print(json.dumps(row), flush=True)
        check.save()
    _failures(stage)


def gemm(check: Check, stage: dict[str, Any]) -> None:
    size, repeats = (256, 3) if check.dry_run else (8192, 30)
    _failures(stage, check.rows(stage, "gemm", device=check.device, size=size, repeats=repeats))


def outer_step(check: Check, stage: dict[str, Any]) -> None:
    reasons = check.usable()
    names = [*FUSED, *PEERS, "reference"]
    if check.dry_run:
        names.insert(len(FUSED), "cpu")
    stage["rows"] = []
    can_run = []
    for name in names:
        if reasons.get(name) is not None:
            stage["rows"].append({"contender": name, "skipped": reasons[name]})
        elif check.dry_run and name in PEERS[1:]:
            stage["rows"].append({"contender": name, "skipped": "not in a dry run: compiles or needs CUDA graphs"})
        else:
            can_run.append(name)
    timing: dict[str, Any] = dict(preset=PRESET, sizes=list(SIZES), turns=5, seconds=0.25)
    if check.dry_run:
        timing = dict(preset=SMALL, sizes=[2, 1], turns=2, seconds=0.01)
    for number, name in enumerate(can_run):
        weights = [WEIGHTS.get(other, 1.0) for other in can_run[number:]]
        limit = max(10.0, check.left * weights[0] / sum(weights))
        ended = check.rows(stage, "outer_step", limit, name=name, device=check.device, **timing)
        if ended.why:
            stage["rows"].append({"contender": name, "failure": ended.why})
    _failures(stage)


def early_exit(check: Check, stage: dict[str, Any]) -> None:
    there = check.puzzles / "dev.csv.gz" if check.puzzles.is_dir() else check.puzzles
    if not there.is_file():
        stage["skipped"] = f"no puzzles: {there} is not there; give their file or folder with --puzzles"
        return
    count, depth, repeats = (4, 4, 1) if check.dry_run else (528, 64, 5)
    # The reference first: it is what the others' answers are compared with.
    names = [name for name in ("reference", *FUSED, "cpu") if name in check.ours()]
    sizes = dict(count=count, depth=depth, repeats=repeats)
    ended = check.rows(stage, "early_exit", names=names, device=check.device, puzzles=str(there.resolve()), **sizes)
    _failures(stage, ended)


def memory(check: Check, stage: dict[str, Any]) -> None:
    rows, depths = (2, [2, 4]) if check.dry_run else (132, [16, 1024])
    _failures(stage, check.rows(stage, "memory", names=check.ours(), device=check.device, rows=rows, depths=depths))


# Seconds of each; one that needs less leaves the rest to those after it. Together they are below nine minutes.
STAGES: tuple[tuple[Stage, float], ...] = (
    (environment, 20),
    (build, 100),
    (tests, 80),
    (sanitizer, 50),
    (gemm, 15),
    (outer_step, 190),
    (early_exit, 35),
    (memory, 30),
)


def default_puzzles() -> Path:
    return Path(os.environ.get("EQR_SUDOKU_DATA", ROOT.parent / "shared" / "data" / "sudoku"))
