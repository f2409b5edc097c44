"""The load benchmark of serving: its workload, its servers on a model of no size, and its simulator."""

from __future__ import annotations

import csv
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.serving import load, servers, simulator
from benchmarks.serving.workload import EASY, HARD, Workload
from eqr_kernels.tasks import sudoku, sudoku_generator
from tests.support.http_server import sudoku_copier

pytestmark = pytest.mark.tooling


@pytest.mark.parametrize(
    ("came", "steps", "workers", "fifo", "want"),
    [
        ([0.0], [3], 1, False, [1.5]),  # alone: all workers
        ([0.0, 0.0], [3, 2], 1, True, [2.5, 3.5]),
        ([0.0, 0.0, 0.0], [2, 2, 2], 2, True, [1.5, 2.0, 3.0]),
        ([0.0, 0.6], [100, 1], 1, False, [51.0, 1.4]),  # who comes has the next step
        ([0.0, 0.6], [4, 1], 1, True, [3.0, 2.9]),
    ],
)
def test_a_machine_takes_turns(came, steps, workers, fifo, want):
    speed = simulator.Speed(shared=1.0, alone=0.5, workers=workers)
    assert simulator.simulate(np.array(came), steps, speed, 1, fifo=fifo) == pytest.approx(want)


def test_the_simulator_waits_as_queueing_theory_says():
    """One server, Poisson arrivals, equal work: the mean wait is rho / (2 (1 - rho)) of a service time."""
    speed, rho = simulator.Speed(1.0, 1.0, 1), 0.7
    came = np.cumsum(np.random.default_rng(0).exponential(1 / rho, 40_000))
    latency = simulator.simulate(came, [1] * len(came), speed, 1, fifo=True)
    assert latency.mean() - 1 == pytest.approx(rho / (2 * (1 - rho)), rel=0.02)


def test_fleets_cost_what_their_machines_cost():
    rows = simulator.scaling(
        np.arange(4), [5, 5, 5, 80], simulator.Speed(0.01, 0.01, 1), 4.0, 0.5, (1, 10), 0.72, requests=400, seed=1
    )
    assert [row["offered_per_second"] for row in rows] == [2.0, 20.0]
    assert [row["price_per_1000"] for row in rows] == pytest.approx([0.1, 0.1])
    assert rows[1]["p99"] < rows[0]["p99"]  # two choices among more


@pytest.fixture
def workload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workload:
    made = sudoku_generator.generate(12, "easy", seed=3)
    assert made.labels is not None
    file = tmp_path / "puzzles.csv"
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["source", "question", "answer", "rating"])
        for question, answer in zip(made.inputs, made.labels, strict=True):
            writer.writerow(["made", sudoku.decode(question), sudoku.decode(answer), 0])
    return Workload(str(file), depth=6, tol=0.5, pool=4)


def test_a_workload_is_drawn_alike_each_time(workload):
    tokens = workload.draw()
    assert tokens.shape == (8, 81) and torch.equal(tokens, workload.draw())
    clues = (tokens > 1).sum(1)
    assert all(workload.clues[0] <= n <= workload.clues[1] for n in clues[:4].tolist())
    requests = workload.ask(4000, stream=1)
    assert np.array_equal(requests, workload.ask(4000, stream=1))
    assert np.mean([workload.kind(int(p)) == HARD for p in requests]) == pytest.approx(
        1 - workload.easy_share, abs=0.02
    )
    came = workload.arrivals(50.0, 40.0, stream=1)
    assert (np.diff(came) > 0).all() and came[-1] < 40 and len(came) == pytest.approx(2000, rel=0.1)


@pytest.mark.parametrize("name", servers.SERVERS)
def test_a_server_answers_under_load(workload, name):
    model = sudoku_copier()
    tokens = workload.draw()
    halt = "none" if name == servers.FULL_DEPTH else "residual"
    solved = model.solve(tokens, depth=workload.depth, tol=0.5, halt=halt)
    server = servers.make(name, model, workload)
    try:
        full = load.saturation(server, workload, tokens, solved.preds, 20)
        assert full["answered"] == 20 and full["steps_per_second"] > 0
        row = load.offered(server, workload, tokens, solved.preds, 40.0, 1.0, 30.0)
    finally:
        server.close()
    assert row["unanswered"] == 0 and row["goodput_per_second"] == row["requests"] / 0.8
    assert set(row["latency"]) == {EASY, HARD, "all"}


def test_a_wrong_answer_fails_the_measurement(workload):
    class Wrong:
        def submit(self, tokens):
            future: Future[servers.Served] = Future()
            future.set_result(servers.Served(torch.zeros(81, dtype=torch.int64), 1))
            return future

        def close(self):
            pass

    tokens = workload.draw()
    with pytest.raises(AssertionError, match="differ from those of solve"):
        load.offered(Wrong(), workload, tokens, tokens, 50.0, 0.5, 1.0)
