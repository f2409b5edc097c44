"""Solving real queries with the shipped model: outer steps spent, time, answers, and what the peers take for them.

Puzzles come from the project's own generator. The CPU kernel and the reference solve them to the full depth and with
early exit; the peers run every trajectory to the full depth, as they have no other way. Each is a process of its own,
and they take turns. Early exit must not change how many puzzles are solved by more than one, or the benchmark fails.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from measure import PRECISIONS, main_precision, quotients, ratios, share_of_peak, spread
from peers import BASELINE, PEERS
from peers.process import Failed, Process
from peers.workload import PRESETS, operations
from rich.table import Table

from eqr_kernels.tasks import sudoku, sudoku_generator

MODEL, TRAJECTORIES, DEPTH = "sudoku-small", 16, 16
ROUNDS = {False: 7, True: 5}  # by --quick


class Runners:
    """The processes, each alive for all of this file's tests."""

    def __init__(self, stack: ExitStack, quick: bool) -> None:
        self.threads = torch.get_num_threads()
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        sizes = ["--preset", MODEL, "--pretrained", "--batch", str(TRAJECTORIES), "--threads", str(self.threads)]

        def start(module: str, *arguments: str) -> Process:
            return stack.enter_context(Process(module, *arguments, threads=self.threads, cache=cache))

        with Process("benchmarks.peers.solver", MODEL, "--info", threads=self.threads) as process:
            self.cpu_reasons: dict[str, str | None] = process.info["cpu"]
        self.meter = start("benchmarks.peers.run", "meter", "--threads", str(self.threads))
        self.solvers = {name: start("benchmarks.peers.solver", MODEL) for name in ("cpu", "reference")}
        self.peers: dict[str, Process] = {}
        self.missing: dict[str, str] = {}
        for name in [BASELINE] if quick else PEERS:
            try:
                peer = start("benchmarks.peers.run", name, *sizes, "--dtype", main_precision())
            except Failed as failure:
                if "AssertionError" in str(failure):
                    raise
                self.missing[name] = f"failed: {failure}"
                continue
            if "skipped" in peer.info:
                self.missing[name] = peer.info["skipped"]
            else:
                self.peers[name] = peer


@pytest.fixture(scope="module")
def runners(request: pytest.FixtureRequest) -> Iterator[Runners]:
    with ExitStack() as stack:
        yield Runners(stack, bool(request.config.getoption("--quick")))


def runs(breadth: int, cpu_reasons: dict[str, str | None]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> process and options of `solve`."""
    main = main_precision()
    common = dict(depth=DEPTH, breadth=breadth)
    variants = {}
    for backend in ("cpu", "reference"):
        if backend == "cpu" and cpu_reasons[main] is not None:
            continue
        options = dict(common, backend=backend, precision=main)
        variants[f"{backend} {main}, full depth"] = backend, dict(options, halt="none")
        variants[f"{backend} {main}, early exit"] = backend, options
        if breadth > 1:
            variants[f"{backend} {main}, race"] = backend, dict(options, select="first")
    for precision in PRECISIONS:
        if precision != main and cpu_reasons[precision] is None:
            variants[f"cpu {precision}, early exit"] = "cpu", dict(common, backend="cpu", precision=precision)
    return variants


@pytest.mark.parametrize("breadth", [1, 4])
@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_solve(benchmark, tables: list[Table], quick: bool, runners: Runners, difficulty: str, breadth: int) -> None:
    if quick and (difficulty, breadth) != ("easy", 4):
        pytest.skip("left out by --quick")
    puzzles = sudoku_generator.generate(TRAJECTORIES // breadth, difficulty, seed=1)
    tokens = puzzles.inputs.tolist()
    wanted = runs(breadth, runners.cpu_reasons)
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in [*wanted, *runners.peers, "meter"]}
    for number in range(ROUNDS[quick] + 1):  # the first warms up
        for name in turns if number % 2 == 0 else reversed(turns):
            if name in wanted:
                solver, options = wanted[name]
                answer = runners.solvers[solver].request(tokens=tokens, options=options)
            elif name == "meter":
                answer = runners.meter.request() if "skipped" not in runners.meter.info else {}
            else:
                answer = runners.peers[name].request(query=DEPTH) | {"nfe": TRAJECTORIES * DEPTH}
            if number:
                turns[name].append(answer)
    rows = [_row(name, turns, len(tokens)) for name in turns if name != "meter"]
    for row in rows:
        if row["run"] in wanted:
            row["solved"] = int(sudoku.is_solution(puzzles.inputs, turns[row["run"]][0]["preds"]).sum())
    solved = {row["run"]: row["solved"] for row in rows if "solved" in row}
    for name, count in solved.items():
        backend = name.partition(" ")[0]
        assert count >= solved[f"{backend} {main_precision()}, full depth"] - 1, solved
    tables.append(_table(rows, f"{MODEL}, {difficulty}, {len(tokens)} puzzles, breadth {breadth}, depth {DEPTH}"))
    benchmark.extra_info.update(
        model=MODEL,
        difficulty=difficulty,
        puzzles=len(tokens),
        breadth=breadth,
        depth=DEPTH,
        threads=runners.threads,
        cpu_reasons=runners.cpu_reasons,
        missing=runners.missing,
        baseline=BASELINE,
        rows=rows,
    )
    solver, options = next(run for name, run in wanted.items() if name.endswith("early exit"))
    query = dict(tokens=tokens, options=options)
    benchmark.pedantic(runners.solvers[solver].request, kwargs=query, rounds=1 if quick else 3, warmup_rounds=0)


def _row(name: str, turns: dict[str, list[dict[str, Any]]], puzzles: int) -> dict[str, Any]:
    """What was measured of one run, with a ratio for each run that is not the CPU kernel's."""
    seconds = [turn["seconds"] for turn in turns[name]]
    steps = [turn["nfe"] for turn in turns[name]]
    row: dict[str, Any] = {"run": name, "peer": not name.startswith(("cpu", "reference")), "rounds": len(seconds)}
    # Only the losers of a race depend on timing.
    row |= {"nfe": statistics.median(steps)} if len(set(steps)) == 1 else spread("nfe", steps)
    row |= spread("ms_per_puzzle", [s / puzzles * 1e3 for s in seconds])
    row |= spread("ms_per_trajectory_step", [s / n * 1e3 for s, n in zip(seconds, steps, strict=True)])
    precision = name.partition(",")[0].split()[-1] if "," in name else main_precision()
    peaks = [turn["peak"] for turn in turns["meter"] if turn]
    if peaks:
        cost = operations(PRESETS[MODEL]())
        each = zip(peaks, seconds, steps, strict=True)
        row |= spread("share_of_peak", [share_of_peak(cost, precision, peak, s / n) for peak, s, n in each])
    if name.startswith("cpu"):
        others = [other for other in turns if other != "meter" and not other.startswith("cpu")]
        row |= ratios({other: quotients([turn["seconds"] for turn in turns[other]], seconds) for other in others})
    return row


def _table(rows: list[dict[str, Any]], title: str) -> Table:
    shown = Table(title=title)
    shown.add_column("run")
    reference = f"reference {main_precision()}, full depth"
    shown_peers = (BASELINE, reference)
    columns = ("solved", "outer steps", "ms a puzzle", "ms a step", "share of peak")
    for name in (*columns, f"against {BASELINE}", "against reference, full depth"):
        shown.add_column(name, justify="right")
    for row in rows:
        faster = row.get("times_as_fast_as", {})
        shown.add_row(
            row["run"],
            str(row.get("solved", "")),
            str(row["nfe"]),
            f"{row['ms_per_puzzle']:.2f}",
            f"{row['ms_per_trajectory_step']:.2f}",
            f"{row['share_of_peak']:.1%}" if "share_of_peak" in row else "",
            *(f"{faster[peer]:.2f}x" if peer in faster else "" for peer in shown_peers),
        )
    return shown
