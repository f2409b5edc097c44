"""`make gpu-check` and the launch for profilers, as far as they go without a GPU."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
import torch

from eqr_kernels import EqRConfig
from tests.support.environment import BUILT, REPOSITORY

gpu_check = importlib.import_module("benchmarks.gpu_check")
child = importlib.import_module("benchmarks.gpu_check.child")
main = importlib.import_module("benchmarks.gpu_check.__main__")
stages = importlib.import_module("benchmarks.gpu_check.stages")
table = importlib.import_module("benchmarks.gpu_check.table")
workload = importlib.import_module("benchmarks.peers.workload")

NAMES = ["environment", "build", "tests", "sanitizer", "gemm", "outer_step", "early_exit", "memory"]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this is about a machine without a GPU")


def check(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "benchmarks.gpu_check", *(str(a) for a in arguments)]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def assert_nothing_among_the_results() -> None:
    assert not list((REPOSITORY / "benchmarks" / "results").rglob("no-gpu*"))


@pytest.mark.slow
def test_a_dry_run_goes_through_every_stage(tmp_path):
    process = check("--dry-run", "--results", tmp_path)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert report["dry_run"] and report["label"] == "dry run, not measurements"
    assert list(report["stages"]) == NAMES and not any("failed" in stage for stage in report["stages"].values())
    for stage in report["stages"].values():
        assert stage["seconds"] >= 0
    rows = report["stages"]["outer_step"]["rows"]
    names = ("cuda", "triton", "eager-precast", "cudagraph", "compile-cudagraph", "compile", "reference")
    assert {row["contender"] for row in rows} >= set(names)
    for row in rows:
        assert "skipped" in row or row["ms"] > 0, row
        if row["contender"] == "reference":
            assert row["best_peer"] == "eager-precast" and row["times_best_peer"] > 0 and row["share_of_gemm"] > 0
    ours = {"reference", *(["cpu"] if BUILT else [])}
    assert {row["backend"] for row in report["stages"]["memory"]["rows"]} == ours
    shown = output[output.index("DRY RUN, NOT MEASUREMENTS") :]
    for expected in (*NAMES, "goal >= 70.0%", "goal >= 1.60x", "goal <= 0.300 ms", str(path)):
        assert expected in shown, expected
    assert_nothing_among_the_results()


@no_gpu
def test_without_a_gpu_it_is_a_dry_run_and_fails(tmp_path):
    process = check("--only", "environment", TMPDIR=str(tmp_path))
    output, _ = process.communicate(timeout=120)
    assert process.returncode == main.NO_GPU, output
    assert "torch sees no GPU: this becomes a dry run, and measures nothing" in output
    (path,) = tmp_path.rglob("no-gpu.json")
    assert json.loads(path.read_text())["dry_run"]
    assert_nothing_among_the_results()


def test_cut_off_it_shows_what_it_has(tmp_path):
    process = check("--dry-run", "--results", tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("== tests"):
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == main.ENDED, output
    assert "tests" in output and "failed: ended from outside by SIGTERM" in output
    (path,) = tmp_path.glob("*.json")
    stages_found = json.loads(path.read_text())["stages"]
    assert list(stages_found) == NAMES[:3] and "failed" not in stages_found["build"]


def test_the_stages_fit_in_nine_minutes():
    assert [stage.__name__ for stage, _ in stages.STAGES] == NAMES
    assert sum(seconds for _, seconds in stages.STAGES) <= 520


# ---- programs with a limit -----------------------------------------------------------------------------------------


def test_a_program_past_its_limit_is_ended_with_its_children(tmp_path):
    pid = tmp_path / "pid"
    script = f"echo first; sleep 60 & echo $! > {pid}; wait"
    lines: list[str] = []
    ended = child.run(["bash", "-c", script], 1.0, lines.append)
    assert ended.stopped and lines == ["first"] and "its time limit" in ended.why and ended.seconds < 10
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(int(pid.read_text()), 0)
            time.sleep(0.1)


def test_a_program_that_fails_says_why():
    ended = child.run(
        [sys.executable, "-c", "print('row'); raise ValueError('no such thing')"], 30.0, lambda line: None
    )
    assert ended.code == 1 and not ended.stopped and ended.why == "exit code 1: ValueError: no such thing"
    assert child.run(["true"], 30.0, lambda line: None).why == ""


def test_an_exception_ends_the_program():
    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        child.run(["bash", "-c", "echo go; sleep 60"], 60.0, interrupt)
    assert time.monotonic() - start < 20


def test_a_stage_that_raises_leaves_the_others_to_run(tmp_path, monkeypatch):
    def broken(check: Any, stage: dict[str, Any]) -> None:
        raise OSError("disk full")

    def fine(check: Any, stage: dict[str, Any]) -> None:
        stage["device"] = "Card X-1"

    monkeypatch.setattr(main, "STAGES", ((fine, 1), (broken, 1), (fine, 1)))
    for name, function in (("environment", fine), ("build", broken)):
        monkeypatch.setattr(function, "__name__", name)
    report = main.Report(main.arguments(["--results", str(tmp_path)]))
    assert main.run(main.arguments(["--results", str(tmp_path)]), report) == main.FAILED
    results = json.loads((tmp_path / "card-x-1.json").read_text())["stages"]
    assert results["build"]["failed"] == "OSError: disk full" and "device" in results["environment"]


# ---- the table -----------------------------------------------------------------------------------------------------


def test_an_outer_steps_operations_come_from_the_config():
    assert workload.operations(EqRConfig.sudoku_paper()).total == pytest.approx(18.7e9, rel=0.01)


def invented() -> dict[str, Any]:
    """Round numbers that no machine gave, to check the arithmetic."""
    rows = [
        {"contender": "cuda", "trajectories": 528, "ms": 10.0, "operations": 8e12},
        {"contender": "cuda", "trajectories": 1, "ms": 0.5, "operations": 2e10},
        {"contender": "triton", "trajectories": 528, "ms": 20.0, "operations": 8e12},
        {"contender": "compile", "trajectories": 528, "ms": 25.0, "operations": 8e12},
        {"contender": "cudagraph", "trajectories": 528, "ms": 40.0, "operations": 8e12},
        {"contender": "cudagraph", "trajectories": 1, "failure": "out of memory"},
        {"contender": "compile-cudagraph", "skipped": "not here"},
    ]
    results = {"gemm": {"seconds": 1.0, "rows": [{"per_second": 1e15}]}, "outer_step": {"seconds": 2.0, "rows": rows}}
    return {"dry_run": False, "commit": "abc", "seconds": 3.0, "stages": results}


def test_goals_stand_beside_what_was_measured():
    report = invented()
    rows = report["stages"]["outer_step"]["rows"]
    table.compared(rows, table.gemm_rate(report))
    assert rows[0]["share_of_gemm"] == pytest.approx(0.8) and rows[0]["best_peer"] == "compile"
    assert rows[0]["times_best_peer"] == pytest.approx(2.5) and "times_best_peer" not in rows[3]
    text = " ".join(table.text(report).split())
    assert (
        "cuda 80.0% (goal >= 70.0%: reached) 2.50x (goal >= 1.60x: reached) 0.500 ms (goal <= 0.300 ms: missed)" in text
    )
    assert "triton 40.0% (goal >= 70.0%: missed) 1.25x (goal >= 1.60x: missed) not measured" in text
    assert "DRY RUN" not in text and "out of memory" in text and "not here" in text
    json.dumps(report)


def test_a_table_of_nothing_is_no_error():
    assert "no GPU" in table.text({"dry_run": False, "seconds": 0.0, "stages": {}})


# ---- the launch for profilers --------------------------------------------------------------------------------------


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/profile/launch.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


def test_a_launch_tells_what_ran():
    done = launch(
        "--backend",
        "reference",
        "--device",
        "cpu",
        "--preset",
        "sudoku-small",
        "--trajectories",
        "2",
        "--depth",
        "3",
        "--no-warm-up",
    )
    assert done.returncode == 0, done.stderr
    assert "ran: backend='reference'" in done.stdout and "outer steps: 6\n" in done.stdout
    total = workload.operations(EqRConfig.sudoku_small()).total * 6
    assert f"operations in its matrix products: {total}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "reference", "--regime", "latency"), "--regime latency is for --backend cuda"),
        (("--trajectories", "0"), "--trajectories must be at least 1, got 0"),
        pytest.param(("--backend", "triton"), "needs a CUDA device and torch sees none", marks=no_gpu),
    ],
)
def test_a_launch_names_what_is_wrong(arguments, message):
    done = launch(*arguments)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_passes_its_variables_on():
    arguments = ["DRY_RUN=1", "RESULTS=/tmp/here", "PUZZLES=/tmp/puzzles", "GPU_PYTHON=python-there"]
    hidden = ("MAKEFLAGS", "MAKELEVEL")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    command = ["make", "-n", "gpu-check", *arguments]
    output = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True).stdout
    expected = "python-there -m benchmarks.gpu_check --dry-run --results /tmp/here --puzzles /tmp/puzzles"
    assert expected in " ".join(output.replace("\\\n", " ").split()) and "pip" not in output


# ---- stages with a stand-in for what is not here -------------------------------------------------------------------


@pytest.fixture
def real(tmp_path) -> Any:
    """A run that is no dry run, as after a build in which the cpu backend was called cuda."""
    check = stages.Check(False, tmp_path / "no-puzzles", lambda: None, device="cpu")
    check.results["build"] = {"usable": {"backends": {"cuda": None, "triton": "not here", "reference": None}}}
    check.ends = time.monotonic() + 60
    return check


CHECKER = """#!/bin/sh
[ "$2" = memcheck ] && echo "========= ERROR SUMMARY: 0 errors" && exit 0
echo "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)"
exit 99
"""


def test_what_the_checkers_find_fails_the_stage(real, tmp_path):
    program = tmp_path / "compute-sanitizer"
    program.write_text(CHECKER)
    program.chmod(0o755)
    real.results["environment"] = {"tools": {"compute-sanitizer": str(program)}}
    stage: dict[str, Any] = {}
    stages.sanitizer(real, stage)
    launches = [row["launch"] for row in stage["rows"]]
    assert launches == ["memcheck cuda 1", "racecheck cuda 1", "memcheck cuda 264", "racecheck cuda 264"]
    assert "3 hazards" in stage["rows"][1]["summary"] and "0 errors" in stage["rows"][0]["summary"]
    assert stage["failed"] == "racecheck cuda 1: exit code 99; racecheck cuda 264: exit code 99"


def test_what_is_missing_is_skipped_with_a_reason(real):
    real.results["environment"] = {"tools": {}}
    stage: dict[str, Any] = {}
    stages.sanitizer(real, stage)
    assert stage == {"skipped": "compute-sanitizer is not on PATH"}
    stage = {}
    stages.early_exit(real, stage)
    assert "no-puzzles is not there; give their file or folder with --puzzles" in stage["skipped"]


def test_a_peer_that_fails_is_a_gap_and_a_backend_that_fails_is_a_failure(real, monkeypatch):
    def fake(check: Any, function: str, on_row: Any, limit: float, **arguments: Any) -> Any:
        if arguments["name"] == "compile":
            return child.Ended(-15, limit, True, "")
        if arguments["name"] == "cudagraph":
            on_row({"contender": "cudagraph", "trajectories": 1, "wrong": "the error is 9"})
        return child.Ended(1 if arguments["name"] == "cuda" else 0, 1.0, False, "Boom\n")

    monkeypatch.setattr(stages.Check, "work", fake)
    stage: dict[str, Any] = {}
    stages.outer_step(real, stage)
    assert stage["failed"] == "cuda: exit code 1: Boom; cudagraph, 1 trajectories: the error is 9"
    reasons = {row["contender"]: row for row in stage["rows"]}
    assert reasons["triton"]["skipped"] == "not here" and "its time limit" in reasons["compile"]["failure"]


@no_gpu
def test_gpu_tests_that_were_all_skipped_are_no_success(real):
    stage: dict[str, Any] = {}
    stages.tests(real, stage)
    assert stage["failed"] == "no test ran on the GPU" and stage["outcomes"]["skipped"] > 0
