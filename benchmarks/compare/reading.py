"""From files to runs: what pytest-benchmark wrote for the suites in benchmarks/, and curve.json of `eqr curve`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.compare.measures import AMOUNT, RATIO, SHARE, TIME, Measure, Row, Run, of_quantiles

if TYPE_CHECKING:
    from eqr_kernels.studies.curve_report import CurveReport

LABELS = ("contender", "run", "class", "precision")
CONTEXT = (
    "model",
    "preset",
    "batch",
    "puzzles",
    "breadth",
    "depth",
    "difficulty",
    "shape",
    "dtype",
    "precision",
    "sizes",
)
"""What a benchmark or a row says of its sizes."""
AMOUNTS = ("nfe", "peak_rss", "trajectory_bytes", "packed_bytes", "peak_bytes")
FEWEST_ROUNDS, OLD_ROUNDS, OLD_QUICK_ROUNDS = 3, 7, 3
"""Of what pytest-benchmark timed by itself, to be used; of rows in files from before they said so."""
BUSY = 0.1
CURVE_DEVIATION = 0.02
"""Of a unit cost in a curve.json that has checked no point, so that nothing there tells."""


class NotResults(ValueError):
    """A file that holds neither kind of results, and why."""


def pairs(before: Path, after: Path) -> tuple[list[tuple[Path, Path]], list[str], list[str]]:
    """Two files as one pair, or the files of two folders that have the same name, and the names in one only.

    Raises:
        ValueError: one is a folder and the other a file, or no name is in both.
        FileNotFoundError: one is not there.
    """
    for path in (before, after):
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there")
    if before.is_dir() != after.is_dir():
        raise ValueError(f"{before} and {after}: name two files or two folders of them, not one of each")
    if before.is_file():
        return [(before, after)], [], []
    left, right = ({p.relative_to(root).as_posix() for p in root.rglob("*.json")} for root in (before, after))
    if not left & right:
        raise ValueError(f"no results file is in both {before} and {after}; files in folders are matched by their name")
    both = [(before / name, after / name) for name in sorted(left & right)]
    return both, sorted(left - right), sorted(right - left)


def read(path: Path) -> Run:
    """The run that a results file holds.

    Raises:
        NotResults: the file is not of a benchmark suite or of `eqr curve`, or holds no measurement.
        OSError: it cannot be read.
    """
    try:
        results = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise NotResults(f"{path} is not JSON: {error}") from None
    if isinstance(results, dict) and isinstance(results.get("benchmarks"), list):
        run = _benchmarks(path.name, results)
    elif isinstance(results, dict) and results.get("command") == "curve":
        # Not above: torch comes with it, and the benchmarks' own results need none.
        from eqr_kernels.studies.curve_report import CurveReport, ReportError

        try:
            run = _curve(path.name, CurveReport.from_json(path.read_text()))
        except ReportError as error:
            raise NotResults(f"{path}: {error}") from None
    else:
        raise NotResults(f"{path} is neither a pytest-benchmark JSON of benchmarks/ nor a curve.json of eqr curve")
    if not run.rows:
        raise NotResults(f"{path} holds no measurement")
    return run


def _benchmarks(file: str, results: dict[str, Any]) -> Run:
    info = {k: v for k, v in results.get("machine_info", {}).items() if k not in ("cpu_features", "busy_before")}
    commit = results.get("commit_info") or {}
    if commit.get("id"):
        info["commit"] = commit["id"][:12] + ("+" if commit.get("dirty") else "")
    rows: dict[str, Row] = {}
    for benchmark in results["benchmarks"]:
        for row in _rows(benchmark, OLD_QUICK_ROUNDS if file.endswith("-quick.json") else OLD_ROUNDS):
            if row.name in rows:
                raise NotResults(f"{file} has two rows {row.name!r}")
            rows[row.name] = row
    busy = results.get("machine_info", {}).get("busy_before") or 0
    notes = (f"{file}: the machine was {busy:.0%} busy with other work before this run",) if busy > BUSY else ()
    return Run(file, "benchmark", info, rows, notes)


def _rows(benchmark: Mapping[str, Any], rounds: int) -> Iterator[Row]:
    extra = benchmark["extra_info"]
    context, baseline = {key: extra[key] for key in CONTEXT if key in extra}, extra.get("baseline", "")
    # Of its own: the rows hold the same more carefully, in turns with the peers.
    if "rows" not in extra or not isinstance(extra["rows"], list):
        measures = {m.name: m for m in (*_measures(extra, rounds), *_stats(benchmark["stats"]))}
        yield Row(benchmark["name"], measures, context=context, baseline=baseline)
        return
    against = {peer for row in extra["rows"] for peer in row.get("times_as_fast_as", {})}
    for row in extra["rows"]:
        measures = {m.name: m for m in _measures(row, rounds)}
        if not measures:
            continue
        labels = list(dict.fromkeys(str(row[key]) for key in LABELS if key in row))
        own = row.get("contender", row.get("run", ""))
        peer = row.get("peer", own in against and not own.startswith("reference"))
        sizes = context | {key: row[key] for key in CONTEXT if key in row}
        yield Row(" ".join([benchmark["name"], *labels]), measures, peer, sizes, baseline)


def _measures(row: Mapping[str, Any], rounds: int) -> Iterator[Measure]:
    rounds = int(row.get("rounds", rounds))
    for name, value in row.items():
        kind = _kind(name)
        if kind == RATIO and isinstance(value, dict):
            low, high = row.get(f"{name}_p20", {}), row.get(f"{name}_p80", {})
            for peer, ratio in value.items():
                yield _measure(f"{name} {peer}", kind, ratio, low.get(peer), high.get(peer), rounds)
        elif kind is not None and isinstance(value, int | float) and value > 0:
            yield _measure(name, kind, value, row.get(f"{name}_p20"), row.get(f"{name}_p80"), rounds)


def _measure(name: str, kind: str, value: float, low: float | None, high: float | None, rounds: int) -> Measure:
    if low is not None and high is not None:
        return of_quantiles(name, kind, value, low, high, rounds, 0.2)
    return Measure(name, kind, value, 0.0 if kind == AMOUNT else None)


def _kind(name: str) -> str | None:
    if name.endswith(("_p20", "_p80")):
        return None
    if name.startswith("share_of_"):
        return SHARE
    if name == "times_as_fast_as":
        return RATIO
    if name in AMOUNTS:
        return AMOUNT
    return TIME if name in ("ms", "us") or name.startswith(("ms_", "us_")) else None


def _stats(stats: Mapping[str, Any]) -> Iterator[Measure]:
    if stats.get("rounds", 0) >= FEWEST_ROUNDS and stats["median"] > 0:
        yield of_quantiles("seconds", TIME, stats["median"], stats["q1"], stats["q3"], stats["rounds"], 0.25)


def _curve(file: str, report: CurveReport) -> Run:
    settings, costs, again = report.settings, report.unit_costs, report.reproduce
    known = {
        "device": report.device,
        "threads": again.get("torch_threads"),
        "backend": report.backend,
        "precision": settings.precision,
        "weights": again.get("weights_sha256"),
        "cpu_isa": settings.instruction_set,
        **(again.get("versions") or {}),
    }
    errors = [abs(row.run.latency_error) for row in report.checked]
    # How far computed latencies lie from measured ones is the only noise that a curve tells of.
    noise = statistics.median(errors) if errors else CURVE_DEVIATION
    turns = None if settings.turns is None else (settings.turns.every, settings.turns.cycle)
    context = {"model": report.model, "precision": settings.precision, "turns": turns}
    # Outer steps, and which puzzles a query's percentiles are over, depend on these.
    settings_of_run = {name: getattr(settings, name) for name in ("seed", "noise_scale", "window", "depth", "views")}
    settings_of_run["data"] = again.get("data_sha256")
    rows: list[Row] = []

    def add(name: str, measure: str, value: float, kind: str = TIME, sizes: Mapping[str, Any] = {}) -> None:
        if value > 0:
            held = Measure(measure, kind, value, 0.0 if kind == AMOUNT else noise)
            rows.append(Row(f"{name} {measure}", {measure: held}, context={**context, **sizes}))

    for one in costs.latency:
        add(f"latency, breadth {one.breadth}:", "overhead_ms", one.overhead_ms)
        add(f"latency, breadth {one.breadth}:", "ms_per_nfe", one.ms_per_nfe)
    add("saturation:", "ms_per_nfe", costs.ms_per_nfe, sizes={"trajectories": costs.trajectories})
    for peak in costs.memory:
        add(f"memory, depth {peak.depth}, breadth {peak.breadth}:", "peak_bytes", peak.peak_bytes, AMOUNT)
    if costs.energy is not None:
        add("energy:", "joules_per_nfe", costs.energy.joules_per_nfe)
    for row in report.checked:
        policy = report.points[row.index].policy
        tol = "" if policy.tol is None else f" {policy.tol:.4g}"
        name = f"checked {policy.name}{tol}, depth {policy.depth}, breadth {policy.breadth}:"
        sizes = {**settings_of_run, "select": policy.select}
        add(name, "p50", row.run.latency_ms[0], sizes={**sizes, "queries": row.run.queries})
        if policy.select != "first" or settings.views:  # what the losers of others spend depends on timing
            add(name, "nfe", row.run.nfe, AMOUNT, sizes)
    named = {key: value for key, value in known.items() if value is not None}
    return Run(file, "curve", named, {row.name: row for row in rows}, ())
