"""`python -m benchmarks.compare`: quiet on a re-run, sure of a planted slowdown, honest about the rest."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
import re
import statistics
import subprocess
import sys
from fnmatch import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from benchmarks.compare import Settings, compare, pairs, read
from benchmarks.compare.__main__ import app
from benchmarks.compare.measures import RATIO, SHARE, TIME, Measure, Row, Run, expected_range, of_quantiles
from eqr_kernels.studies.curve_report import CheckedPoint
from tests.support.curve_report import make_report
from tests.support.environment import REPOSITORY

RESULTS = REPOSITORY / "benchmarks" / "results" / "amd-epyc-avx512-bf16-2-threads"
PLANTED = 1.15
CPU = {"device": "a CPU", "threads": 2, "cpu_isa": "avx2", "torch": "2.13.0", "busy_before": 0.0}
NOISE = [0.005, 0.01, 0.02, 0.03] * 4  # a round's standard deviation, row by row
BETWEEN = 0.01  # and from run to run
SEEDS = range(60)


def spread(name, values):
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {name: statistics.median(values), f"{name}_p20": fifths[0], f"{name}_p80": fifths[-1]}


def synthetic(rng, slow=(), rounds=5, noise=NOISE, phase=1.0, share=True):
    """What a suite writes: rows of our own and as many of peers, some of them slower by 15 %; `phase` slows all."""
    rows = []
    for number, deviation in enumerate(noise):
        for peer in (False, True):
            level = rng.gauss(0, BETWEEN)
            factor = PLANTED if number in slow and not peer else 1.0
            seconds = [factor * 2.718281828 ** (level + rng.gauss(0, deviation)) for _ in range(rounds)]
            row = {"contender": f"{'eager' if peer else 'op'}{number}", "precision": "bf16", "peer": peer}
            row |= {"rounds": rounds, **spread("ms_per_step", [phase * s for s in seconds])}
            rows.append(row | (spread("share_of_peak", [0.8 / s for s in seconds]) if share else {}))
    return results([("test_x[a]", dict(preset="a", rows=rows))])


def results(benchmarks, **machine):
    timed = dict(rounds=3, median=1.0, q1=0.99, q3=1.01)
    return {
        "machine_info": CPU | machine,
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "benchmarks": [{"name": name, "stats": timed, "extra_info": extra} for name, extra in benchmarks],
    }


@pytest.fixture
def both(tmp_path):
    """Writes two results and reads them as runs."""

    def write(before, after):
        paths = tmp_path / "before.json", tmp_path / "after.json"
        for path, content in zip(paths, (before, after), strict=True):
            path.write_text(json.dumps(content))
        return paths

    return write


def judge(paths, settings=None):
    return compare([(read(paths[0]), read(paths[1]))], settings)


def rows_of(result, verdict):
    return [item.row.split()[1] for item in result.counted(verdict)]


@pytest.mark.parametrize("share", [True, False], ids=["shares", "times"])
def test_a_run_again_is_quiet_and_a_planted_slowdown_is_found(both, share):
    """Over 60 seeds: false alarms at about the 5 % that are asked for, and 15 % found in nearly all."""
    alarms = detected = 0
    for seed in SEEDS:
        rng = random.Random(seed)
        before, slow = synthetic(rng, share=share), rng.randrange(len(NOISE))
        again = judge(both(before, synthetic(rng, share=share)))
        alarms += bool(again.counted("slower") or again.counted("faster"))
        planted = judge(both(before, synthetic(rng, [slow], share=share)))
        detected += f"op{slow}" in rows_of(planted, "slower")
    assert alarms <= 0.1 * len(SEEDS), alarms
    assert detected >= 0.97 * len(SEEDS), detected


def test_few_rounds_and_large_noise_do_not_raise_alarms(both):
    alarms = 0
    for seed in SEEDS:
        rng = random.Random(seed)
        runs = [synthetic(rng, rounds=3, noise=[0.08] * 20) for _ in range(2)]
        result = judge(both(*runs))
        alarms += bool(result.counted("slower") or result.counted("faster"))
        assert any(item.verdict == "within noise" for item in result.items) or alarms or len(result.items) == 40
    assert alarms <= 0.1 * len(SEEDS), alarms


def test_what_got_faster_is_told_as_well(both):
    result = judge(both(synthetic(random.Random(1), slow=[2]), synthetic(random.Random(2))))
    assert rows_of(result, "faster") == ["op2"] and not result.counted("slower")
    (item,) = result.counted("faster")
    assert item.factor == pytest.approx(1 / PLANTED, rel=0.04)


def test_a_slow_phase_of_the_machine_cancels_in_shares_and_is_named(both):
    result = judge(both(synthetic(random.Random(1)), synthetic(random.Random(2), phase=1.3)))
    assert not result.counted("slower")
    (note,) = result.notes
    assert 25 <= int(re.match(r"absolute times are (\d+)% longer", note)[1]) <= 35
    times = judge(both(synthetic(random.Random(1), share=False), synthetic(random.Random(2), phase=1.3, share=False)))
    assert len(times.counted("slower")) == len(NOISE)


def test_peers_that_got_slower_are_shown_and_do_not_count(both):
    before, after = (synthetic(random.Random(seed)) for seed in (1, 2))
    for row in after["benchmarks"][0]["extra_info"]["rows"]:
        if row["peer"]:
            scaled(row, 2.0)
    result = judge(both(before, after))
    assert not result.counted("slower")
    assert sum(item.verdict == "slower" for item in result.items) == len(NOISE)


def scaled(row, factor):
    """Makes a row slower by the factor, in place."""
    for key, value in row.items():
        if key.startswith(("share_of_", "times_as_fast_as")):
            row[key] = {k: v / factor for k, v in value.items()} if isinstance(value, dict) else value / factor
        elif key.startswith(("ms_", "us")):
            row[key] = value * factor


def jittered(report, seed, slow=None):
    """Committed results as another run would have given them: each row's measures off by its own noise."""
    report, rng = copy.deepcopy(report), random.Random(seed)
    for benchmark in report["benchmarks"]:
        for row in benchmark["extra_info"].get("rows", []):
            if "share_of_peak" not in row:
                continue
            width = (row["share_of_peak_p80"] - row["share_of_peak_p20"]) / row["share_of_peak"]
            deviation = width / expected_range(7, 0.2) * 0.47  # of a median of seven
            label = f"{benchmark['name']} {row.get('contender', row.get('run'))} {row.get('precision', '')}".strip()
            scaled(row, (PLANTED if label == slow else 1.0) * 2.718281828 ** rng.gauss(0, deviation))
    return report


@pytest.mark.parametrize(
    ("file", "row"),
    [
        ("outer_step.json", "test_outer_step[sudoku-paper-1] cpu bf16"),
        ("outer_step.json", "test_outer_step[sudoku-paper-8] cpu int8"),
        ("solve.json", "test_solve[easy-1] cpu bf16, full depth"),
        ("training_step-quick.json", "test_training_step[sudoku-small] fused bf16"),
    ],
)
def test_committed_results(both, file, row):
    committed = json.loads((RESULTS / file).read_text())
    same = judge(both(committed, committed))
    assert same.judged and not same.counted("slower") and not same.counted("faster")
    alarms = detected = 0
    for seed in range(20):
        again = judge(both(committed, jittered(committed, seed)))
        alarms += bool(again.counted("slower") or again.counted("faster"))
        planted = judge(both(committed, jittered(committed, seed, slow=row)))
        detected += row in [item.row for item in planted.counted("slower")]
    assert alarms <= 2 and detected >= 17, (alarms, detected)


STUDIES = (
    "nvidia-h100-80gb-hbm3",
    "long_run",
    "maze_sizes",
    "precision_depth-*",
    "ablation",
    "calibrate-*",
    "eval-*",
    "quantisation",
    "recipe_scan",
    "serving",
    "student",
    "extreme_mix-*",
    "breadth_needed-*",
    "serving_soak",
    "ray_throughput",
)  # of other forms


def test_all_committed_files_of_the_suites_are_read():
    files = [
        p
        for p in (REPOSITORY / "benchmarks" / "results").rglob("*.json")
        if not any(fnmatch(p.stem, name) for name in STUDIES)
    ]
    assert len(files) >= 10
    for path in files:
        assert read(path).rows, path


def test_results_without_rows_are_compared_by_what_pytest_benchmark_timed(both):
    """As damped_update.json was: no ranges but the quartiles of all calls."""
    old = REPOSITORY / "benchmarks" / "results" / "amd-epyc-avx2-2-threads" / "damped_update.json"
    before = json.loads(old.read_text())
    after = copy.deepcopy(before)
    stats = after["benchmarks"][3]["stats"]
    stats |= {key: PLANTED * stats[key] for key in ("median", "q1", "q3")}
    result = judge(both(before, after), Settings())
    assert result.judged == 24 and {item.measure for item in result.items} == {"seconds"}
    slower = [item.row for item in result.counted("slower")]
    assert slower in ([], [after["benchmarks"][3]["name"]])
    assert result.items[3].verdict in ("slower", "within noise")
    stats |= {key: 2 * stats[key] for key in ("median", "q1", "q3")}
    assert [i.row for i in judge(both(before, after)).counted("slower")] == [after["benchmarks"][3]["name"]]


@pytest.mark.parametrize("name", ["device", "threads", "cpu_isa", "torch"])
def test_absolute_times_of_other_machines_are_not_compared(both, name):
    before = synthetic(random.Random(1), share=False)
    after = synthetic(random.Random(2), slow=range(16), share=False)
    after["machine_info"] = CPU | {name: "another"}
    result = judge(both(before, after))
    assert (name, CPU[name], "another") in result.differences and not result.absolute
    assert result.judged == 0 and {item.verdict for item in result.items} == {"not compared"}
    forced = judge(both(before, after), Settings(force=True))
    assert len(forced.counted("slower")) == 16


def test_shares_of_other_machines_are_compared(both):
    after = synthetic(random.Random(2), slow=[5])
    after["machine_info"] = CPU | {"device": "another"}
    result = judge(both(synthetic(random.Random(1)), after))
    assert rows_of(result, "slower") == ["op5"] and result.differences


def test_another_commit_is_named_and_changes_nothing(both):
    after = synthetic(random.Random(2), slow=[5], share=False)
    after["commit_info"] = {"id": "fedcba9876543210", "dirty": True}
    result = judge(both(synthetic(random.Random(1), share=False), after))
    assert result.differences == (("commit", "0123456789ab", "fedcba987654+"),) and result.absolute
    assert rows_of(result, "slower") == ["op5"]


def test_rows_of_other_sizes_are_not_compared_and_say_so(both):
    after = synthetic(random.Random(2))
    after["benchmarks"][0]["extra_info"]["preset"] = "b"
    result = judge(both(synthetic(random.Random(1)), after))
    assert not result.judged and {item.reason for item in result.items} == {"preset is a and b"}


def test_steps_and_bytes_are_compared_as_they_are(both):
    rows = [{"run": "cpu", "nfe": 100, "peak_rss": 1000, "trajectory_bytes": 50}]
    more = [{"run": "cpu", "nfe": 120, "peak_rss": 1040, "trajectory_bytes": 51}]
    result = judge(both(results([("t", dict(rows=rows))]), results([("t", dict(rows=more))])))
    assert {item.measure: item.verdict for item in result.items} == {
        "nfe": "slower",
        "peak_rss": "same",
        "trajectory_bytes": "same",
    }


def test_a_ratio_is_judged_where_there_is_no_share_and_before_the_time():
    def row(ratio, ms):
        measures = [
            of_quantiles("ms_per_step", TIME, ms, 0.99 * ms, 1.01 * ms, 7, 0.2),
            Measure("times_as_fast_as other", RATIO, ratio, 0.01, 7),
            Measure("times_as_fast_as eager", RATIO, 2 * ratio, 0.01, 7),
        ]
        return Row("a", {m.name: m for m in measures}, baseline="eager")

    runs = [Run("x.json", "benchmark", {}, {"a": row(*of)}) for of in ((2.0, 10.0), (1.6, 10.0))]
    (item,) = compare([tuple(runs)]).items
    assert (item.measure, item.verdict) == ("times_as_fast_as eager", "slower")
    assert item.factor == pytest.approx(1.25)


def test_a_measure_whose_noise_is_unknown_is_not_judged():
    runs = [Run("x.json", "benchmark", {}, {"a": Row("a", {"s": Measure("s", SHARE, v)})}) for v in (0.9, 0.3)]
    (item,) = compare([tuple(runs)]).items
    assert item.verdict == "not compared" and "noise" in item.reason


@given(st.integers(2, 40), st.integers(0, 10_000))
def test_the_deviation_from_a_range_of_few_rounds_is_not_biased(rounds, seed):
    """The mean of many estimates, for any number of rounds."""
    rng, estimates = random.Random(seed), []
    for _ in range(150):
        values = [2.718281828 ** rng.gauss(0, 0.02) for _ in range(rounds)]
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        estimates.append(of_quantiles("x", TIME, 1.0, fifths[0], fifths[-1], rounds, 0.2).deviation)
    error = statistics.stdev(estimates) / len(estimates) ** 0.5
    assert abs(statistics.mean(estimates) - 0.02) < 5 * error + 0.02 * 0.04


def curve() -> dict:
    """A report of three points, of which the first and the last were run for real, with an error of 1 and -2 %."""
    report = make_report(price=False)
    places = [i for i, p in enumerate(report.points) if p.policy.name == "residual"][:3]
    points = tuple(report.points[i] for i in places)

    def checked(index: int, error: float) -> CheckedPoint:
        run = dataclasses.replace(
            report.checked[0].run, latency_ms=(6.0, 9.0, 9.0), computed_ms=(6.0 * (1 + error), 9.0, 9.0), nfe=5.0
        )
        return CheckedPoint(index, ("front",), run)

    costs = dataclasses.replace(
        report.unit_costs, latency=report.unit_costs.latency[:3], memory=report.unit_costs.memory[:1]
    )
    bend = dataclasses.replace(report.bend, front=(0,), best=0, cheapest_within=0, knee=None)
    changes = dict(unit_costs=costs, bend=bend, recommendation=None, checked=(checked(0, 0.01), checked(2, -0.02)))
    return json.loads(dataclasses.replace(report, points=points, **changes).to_json())


CURVE = curve()


def test_curves(both):
    after = copy.deepcopy(CURVE)
    same = judge(both(CURVE, after))
    assert same.judged == 3 * 2 + 1 + 1 + 2 * 2 and not same.counted("slower")
    after["unit_costs"]["latency"][1]["ms_per_nfe"] *= PLANTED
    after["unit_costs"]["memory"][0]["peak_bytes"] *= 2
    after["unit_costs"]["ms_per_nfe"] *= 1.04
    result = judge(both(CURVE, after))
    assert [item.row for item in result.counted("slower")] == [
        "latency, breadth 2: ms_per_nfe",
        "memory, depth 1, breadth 1: peak_bytes",
    ]
    for point, error in zip(after["checked"], (0.05, -0.1), strict=True):  # 7 % off: 15 % may be noise
        point["run"]["computed_ms"][0] = 6.0 * (1 + error)
    noisy = judge(both(CURVE, after))
    assert [item.row for item in noisy.counted("slower")] == ["memory, depth 1, breadth 1: peak_bytes"]
    after["settings"]["precision"] = "int8"
    other = judge(both(CURVE, after))
    assert other.judged == 0 and ("precision", "bfloat16", "int8") in other.differences


runner = CliRunner()


def run(*arguments):
    return runner.invoke(app, [*map(str, arguments)])


def test_exit_codes_and_text(both, tmp_path):
    before, after = both(synthetic(random.Random(1)), synthetic(random.Random(2), slow=[3]))
    assert run(before, before).exit_code == 0
    result = run(before, after)
    assert result.exit_code == 1 and "% slower" in result.output and "test_x[a] op3 bf16" in result.output
    assert "1 slower, 0 faster, of 16 measures" in result.output
    assert run(after, before).exit_code == 0  # faster
    other = synthetic(random.Random(3), share=False)
    other["machine_info"] = CPU | {"device": "another"}
    apart = both(synthetic(random.Random(3), share=False), other)
    nothing = run(*apart)
    assert nothing.exit_code == 2 and "device: a CPU before, another after" in nothing.output
    assert run("--force", *apart).exit_code == 0


def test_threshold(both):
    paths = both(synthetic(random.Random(1)), synthetic(random.Random(2), slow=[0]))
    assert run(*paths, "--threshold", 5).exit_code == 1
    assert run(*paths, "--threshold", 25).exit_code == 0
    assert run(*paths, "--threshold", 0).exit_code == 2


def test_json(both, tmp_path):
    paths = both(synthetic(random.Random(1)), synthetic(random.Random(2), slow=[3]))
    result = run(*paths, "--json", "-o", tmp_path / "out.json")
    report = json.loads(result.output)
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert (report["slower"], report["faster"], report["judged"]) == (1, 0, 16)
    (row,) = [row for row in report["rows"] if row["verdict"] == "slower" and not row["peer"]]
    assert row["row"] == "test_x[a] op3 bf16" and row["factor"] == pytest.approx(PLANTED, rel=0.04)


def test_folders_are_matched_by_name(tmp_path):
    for side, slow in (("a", []), ("b", [3])):
        (tmp_path / side).mkdir()
        (tmp_path / side / "x.json").write_text(json.dumps(synthetic(random.Random(len(slow)), slow)))
        (tmp_path / side / f"only-{side}.json").write_text(json.dumps(CURVE))
        (tmp_path / side / "other.json").write_text("{}")
    result = run(tmp_path / "a", tmp_path / "b")
    assert result.exit_code == 1
    for text in ("only before: only-a.json", "only after: only-b.json", "left out:", "other.json is neither"):
        assert text in result.output


def test_rows_in_one_file_only_are_listed(both):
    before, after = synthetic(random.Random(1)), synthetic(random.Random(2))
    before["benchmarks"][0]["extra_info"]["rows"].pop(0)
    after["benchmarks"][0]["extra_info"]["rows"].pop()
    result = judge(both(before, after))
    assert result.only_before == ("before.json: test_x[a] eager15 bf16",)
    assert result.only_after == ("after.json: test_x[a] op0 bf16",)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("none.json", "x.json", "none.json is not there"),
        ("x.json", ".", "not one of each"),
        ("broken.json", "x.json", "is not JSON"),
        ("other.json", "x.json", "is neither"),
        ("empty.json", "x.json", "holds no measurement"),
        ("curve.json", "x.json", "compare two of a kind"),
        ("schema.json", "curve.json", "schema 1"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path, before, after, message):
    (tmp_path / "x.json").write_text(json.dumps(synthetic(random.Random(1))))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text("[1]")
    (tmp_path / "empty.json").write_text(json.dumps(results([])))
    (tmp_path / "curve.json").write_text(json.dumps(CURVE))
    (tmp_path / "schema.json").write_text(json.dumps(CURVE | {"schema": 1}))
    result = run(tmp_path / before, tmp_path / after)
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_no_file_name_in_common(tmp_path):
    for side in "ab":
        (tmp_path / side).mkdir()
        (tmp_path / side / f"{side}.json").write_text("{}")
    with pytest.raises(ValueError, match="no results file is in both"):
        pairs(tmp_path / "a", tmp_path / "b")


def test_it_imports_no_torch(both):
    before, after = both(synthetic(random.Random(1)), synthetic(random.Random(2)))
    code = (
        "import sys; from benchmarks import compare as b; from benchmarks.compare import __main__; "
        "from pathlib import Path; "
        f"b.compare([(b.read(Path({str(before)!r})), b.read(Path({str(after)!r})))]); "
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
