"""What the benchmark suites share: rows that can be compared, the runner, and the slowdown that can be planted."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

from benchmarks.compare import read
from eqr_kernels import ops
from tests.support.environment import REPOSITORY

suites = importlib.import_module("benchmarks.suites")


@pytest.fixture
def oplevel(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("oplevel")


def test_rows_hold_what_a_comparison_needs(oplevel):
    times = {"op": [1e-3, 2e-3, 3e-3], "eager": [2e-3, 4e-3, 9e-3], "copy": [5e-4, 5e-4, 1e-3], "meter": [1, 1, 1]}
    op, eager = oplevel.op_rows(times, "bf16", moved=10**6, floor=[5e-4, 5e-4, 1e-3])
    assert (op["contender"], op["peer"], op["rounds"]) == ("op", False, 3)
    assert (eager["contender"], eager["peer"]) == ("eager", True)
    assert (op["us"], op["us_p20"], op["us_p80"]) == (2000, 1400, 2600)
    assert op["gb_per_s"] == 0.5 and op["share_of_copy_bandwidth"] == pytest.approx(1 / 3, rel=1e-3)
    assert op["share_of_peak"] == pytest.approx(1 / 3, rel=1e-3)
    assert op["times_as_fast_as"] == {"eager": 2.0} and op["times_as_fast_as_p80"] == {"eager": 2.6}


def test_candidates_take_turns_there_and_back(oplevel, monkeypatch):
    monkeypatch.setattr(oplevel, "SECONDS", 0.0)
    called = []
    times = oplevel.turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, 2)
    assert [len(taken) for taken in times.values()] == [2, 2]
    assert "".join(called) == "aabb" + "aabb" + "bbaa"  # a count of one: warm-ups and lengths, then two rounds


def test_the_meter_tells_of_each_round(oplevel, monkeypatch):
    rates = iter(range(1000))
    monkeypatch.setattr(oplevel, "peak", lambda *_: next(rates))
    monkeypatch.setattr(oplevel, "SECONDS", 0.0)
    meter = oplevel.Peak(("bf16",))
    oplevel.turns(meter.candidate, 3)
    assert [rate["bf16"] for rate in meter.of(3)] == [4, 6, 8]  # the timed call of each pair


def test_the_quick_run_has_every_op_and_no_real_puzzles():
    every, quick = suites.files(False), suites.files(True)
    assert set(every) == {f"benchmarks/{p.name}" for p in (REPOSITORY / "benchmarks").glob("test_*.py")}
    assert set(every) - set(quick) == {"benchmarks/test_end_to_end.py"}


@pytest.mark.skipif(not ops.extension_status()[0], reason=ops.extension_status()[1])
def test_every_op_has_a_benchmark():
    import torch

    import eqr_kernels.ops  # noqa: F401

    names = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "eqr_kernels::" in name
    }
    names -= {"trajectory_bytes"}  # a number that test_memory.py and test_fixed_point.py report
    elsewhere = {"philox_words": "philox", "philox_normal": "philox", "adam_atan2_": "adam_atan2"}
    elsewhere |= {name: "training_step" for name in ("differentiable_step", "differentiable_step_backward")}
    assert {f"benchmarks/test_{elsewhere.get(name, name)}.py" for name in names} <= set(suites.files(True))


def runner(*arguments):
    command = [sys.executable, "-m", "benchmarks.suites", *arguments, "-q", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.fixture
def files(tmp_path):
    """Benchmark files with the suites' conftest, and the folder for results."""
    text = (REPOSITORY / "benchmarks" / "conftest.py").read_text()
    path = f"import sys; sys.path.insert(0, {str(REPOSITORY / 'benchmarks')!r})\n"
    future = "from __future__ import annotations\n"
    (tmp_path / "conftest.py").write_text(text.replace(future, future + path))
    rows = "[dict(contender='op', precision='fp32', us=1.0, us_p20=0.9, us_p80=1.1, rounds=5)]"
    bodies = {
        "right": f"benchmark.extra_info.update(rows={rows}); benchmark.pedantic(int, rounds=3)",
        "wrong": "benchmark.pedantic(int, rounds=3); assert not 'the result is wrong'",
        "absent": "__import__('pytest').skip('needs what is not here')",
    }
    for name, body in bodies.items():
        (tmp_path / f"test_{name}.py").write_text(f"def test_{name}(benchmark):\n    {body}\n")
    (tmp_path / "test_broken.py").write_text("import nothing_of_that_name\n")
    return tmp_path


@pytest.mark.slow
def test_the_runner_goes_on_and_says_what_came_of_each_file(files):
    paths = [str(files / f"test_{name}.py") for name in ("wrong", "broken", "absent", "right")]
    run = runner(*paths, "--quick", "--results", str(files / "results"))
    assert run.returncode == 1, run.stdout + run.stderr
    *lines, last = run.stdout.splitlines()[-5:]
    assert lines[0].startswith("test_wrong.py: 1 failed")
    assert lines[1].startswith("test_broken.py: 1 error")
    assert lines[2].startswith("test_absent.py: 1 skipped") and lines[2].endswith("; skipped: needs what is not here")
    assert lines[3].startswith("test_right.py: 1 passed") and lines[3].endswith("right-quick.json")
    assert "failed: " in last and "test_wrong.py" in last and "test_right.py" not in last
    (path,) = (files / "results").rglob("right-quick.json")
    assert list(read(path).rows) == ["test_right op fp32"] and json.loads(path.read_text())["wall_seconds"] > 0


@pytest.mark.slow
def test_the_runner_is_content_with_what_must_be_skipped(files):
    run = runner(str(files / "test_absent.py"), str(files / "test_right.py"))
    assert run.returncode == 0 and run.stdout.splitlines()[-1].endswith("all results are right")
