"""Who shares a launch, and whose turn it is: the runner over a backend that only counts.

A trajectory of the puzzle [n] takes n outer steps, on a device that computes 8 side by side.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from eqr_kernels.backends import FixedPointProblem
from eqr_kernels.ops import Tables
from eqr_kernels.precision import Precision
from eqr_kernels.scheduler import GOING
from eqr_kernels.serving.launching import LaunchingRunner
from eqr_kernels.serving.runner import Job, StepUpdate
from tests.support.serving import PATIENCE, until

WIDTH, IN_FLIGHT, QUANTUM = 8, 32, 4


class Run:
    """See `backends.base.ParkedRun`."""

    width = WIDTH

    def __init__(self, backend: Counting, problem: FixedPointProblem, places: int) -> None:
        self.backend, self.problem = backend, problem
        self.tables = Tables.empty(problem, places * problem.breadth, 1, 2, torch.device("cpu"))
        self.ends = torch.zeros(places * problem.breadth, dtype=torch.int64)

    def grow(self, places: int) -> None:
        self.tables = self.tables.grown(self.problem, places * self.problem.breadth)
        self.ends = torch.cat([self.ends, torch.zeros(len(self.tables.logits) - len(self.ends), dtype=torch.int64)])

    def begin(self, place: int, tokens: Tensor, ident: Tensor) -> None:
        rows = slice(place * self.problem.breadth, (place + 1) * self.problem.breadth)
        self.ends[rows], self.tables.steps[-1, rows] = tokens[0], 0

    def launch(self, rows: list[int], quantum: int) -> None:
        assert len(set(rows)) == len(rows) <= WIDTH
        self.backend.launches.append((self.problem.seed, len(rows), quantum))
        self.backend.before_launch()
        steps = torch.minimum(self.tables.steps[-1, rows] + quantum, self.ends[rows])
        self.tables.steps[-1, rows] = steps
        self.tables.status[-1, rows] = torch.where(steps < self.ends[rows], GOING, 0)


class Counting:
    """A backend. `before_launch` is called in each, `choose` for each job."""

    name = "counting"

    def __init__(self) -> None:
        self.launches: list[tuple[int, int, int]] = []  # seed, trajectories, quantum
        self.before_launch: Callable[[], object] = lambda: None
        self.choose: Callable[[], str] = lambda: "kernel"

    def kernel(self, model: object, problem: FixedPointProblem) -> str:
        return self.choose()

    def parked_run(self, model: object, problem: FixedPointProblem, places: int) -> Run:
        return Run(self, problem, places)


class Collector:
    """Events and recorder of all jobs: order of the ends, what each ended with, steps told."""

    def __init__(self) -> None:
        self.ended: dict[int, BaseException | None] = {}
        self.steps: dict[int, list[int]] = {}

    def begun(self, number: int) -> None: ...

    def step(self, number: int, update: StepUpdate) -> None:
        self.steps.setdefault(number, []).append(update.step)

    def done(self, number: int, error: BaseException | None) -> None:
        assert number not in self.ended, "each job ends once"
        self.ended[number] = error

    def finished(self, rows: object) -> None: ...

    def winners(self, restart: Tensor, logits: Tensor, states: object = None) -> None: ...


class Turns:
    """A runner of counting jobs; nothing is launched to its end before `go`."""

    def __init__(self, policy: str = "least_service") -> None:
        self.backend, self.collector, self.count = Counting(), Collector(), 0
        self.going = threading.Event()
        self.on_launch: Callable[[], object] = lambda: None

        def wait() -> None:
            assert self.going.wait(PATIENCE)
            self.on_launch()

        self.backend.before_launch = wait
        self.runner = LaunchingRunner(self.collector, max_in_flight=IN_FLIGHT, policy=policy, quantum=QUANTUM)

    def job(self, steps: int, puzzles: int = 1, wants_steps: bool = False, **rules: Any) -> int:
        given = dict(seed=0, breadth=1, depth=10_000, halt="none", tol=0.0, patience=1, select="residual", window=1)
        given |= dict(noise_scale=0.0, checkpoints=(), slots=64, trace=False) | rules
        tokens, ids = torch.full((puzzles, 1), steps), torch.zeros(puzzles, dtype=torch.int64)
        problem = FixedPointProblem(tokens=tokens, ids=ids, precision=Precision.fp32, **given)
        solve: Any = SimpleNamespace(backend=self.backend, model=self, problem=problem, collector=self.collector)
        self.count += 1
        self.runner.start(Job(self.count, solve, wants_steps=wants_steps))
        return self.count

    def first(self, **options: Any) -> int:
        """A job of one step, in a launch that waits for `go`: what comes now comes together."""
        number = self.job(1, **options)
        until(lambda: len(self.backend.launches) == 1)
        return number

    def go(self) -> list[int]:
        """Lets all come to their ends; their order."""
        self.going.set()
        until(lambda: len(self.collector.ended) == self.count)
        self.runner.close()
        return list(self.collector.ended)


def test_requests_of_one_kind_fill_the_launches():
    turns = Turns()
    turns.first()
    for _ in range(4 * IN_FLIGHT):
        turns.job(2 * QUANTUM)
    turns.go()
    rows = [count for _, count, _ in turns.backend.launches[1:]]
    assert rows == [WIDTH] * (2 * 4 * IN_FLIGHT // WIDTH)


def test_one_request_of_many_puzzles_holds_up_nobody():
    turns = Turns()
    turns.first()
    big = turns.job(QUANTUM, puzzles=10 * IN_FLIGHT)
    small = [turns.job(QUANTUM) for _ in range(5)]
    assert turns.go()[1:] == [*small, big] and len(turns.backend.launches) <= 10 * IN_FLIGHT // WIDTH + 2


@pytest.mark.parametrize("seeds", [0, 1], ids=["the same rules", "rules of their own"])
def test_newcomers_do_not_starve_who_was_there(seeds):
    turns = Turns()
    old = [turns.job(3 * QUANTUM) for _ in range(2)]
    turns.on_launch = lambda: turns.count < 100 and turns.job(QUANTUM, seed=seeds * turns.count)
    order = turns.go()
    assert max(map(order.index, old)) < 20


def test_requests_of_different_rules_take_turns():
    turns = Turns()
    turns.first()
    for seed in range(1, 20):
        turns.job(2 * QUANTUM, seed=seed)
    turns.go()
    seeds = [seed for seed, _, _ in turns.backend.launches[1:20]]
    assert sorted(seeds) == list(range(1, 20)), "each has had a launch before any has two"


def test_fifo_is_the_order_of_arrival():
    turns = Turns("fifo")
    turns.first()
    for steps, seed in ((5 * QUANTUM, 1), (1, 2), (6 * QUANTUM, 1)):
        turns.job(steps, seed=seed)
    assert turns.go() == [1, 2, 3, 4]
    assert [seed for seed, _, _ in turns.backend.launches[1:]] == [1] * 5 + [2] + [1], "the third beside the first"


def test_a_launch_is_no_longer_than_the_depth():
    turns = Turns()
    turns.job(2, depth=2)
    turns.go()
    assert turns.backend.launches == [(0, 1, 2)]


def test_of_a_launch_that_failed_each_goes_on_alone_and_is_told_each_step_once():
    turns = Turns()
    first = turns.first()
    jobs = [turns.job(4, wants_steps=True) for _ in range(2)]

    def fail() -> None:
        if len(turns.backend.launches) == 4:
            raise RuntimeError("the device is unwell")

    turns.on_launch = fail
    turns.go()
    assert turns.collector.ended == dict.fromkeys([first, *jobs])
    assert turns.collector.steps == dict.fromkeys(jobs, [1, 2, 3, 4])
    assert turns.backend.launches[1:] == [(0, 2, 1)] * 3 + [(0, 1, 1)] * 8


@pytest.mark.parametrize("place", ["kernel", "begin", "take", "launch", "deliver"])
def test_whatever_fails_each_is_answered_and_the_next_is_computed(place, monkeypatch):
    turns = Turns()
    turns.first(seed=1)

    def broken(*arguments: Any, **options: Any) -> Any:
        raise RuntimeError("the device is unwell")

    homes: dict[str, tuple[object, str]] = {
        "kernel": (turns.backend, "choose"),
        "take": (Tables, "take"),
        "deliver": (Collector, "finished"),
    }
    bad = [turns.job(3), turns.job(3)]
    with monkeypatch.context() as patch:
        patch.setattr(*homes.get(place, (Run, place)), broken)
        turns.going.set()
        until(lambda: len(turns.collector.ended) == 3)
    good = turns.job(3)
    turns.go()
    assert all(isinstance(turns.collector.ended[number], RuntimeError) for number in bad)
    assert turns.collector.ended[good] is None


def test_when_memory_is_out_a_request_waits_for_those_that_have_some(monkeypatch):
    turns = Turns()
    turns.first()
    make = Counting.parked_run

    def parked_run(self: Counting, model: object, problem: FixedPointProblem, places: int) -> Run:
        if not turns.collector.ended:
            raise torch.OutOfMemoryError("no")
        return make(self, model, problem, places)

    monkeypatch.setattr(Counting, "parked_run", parked_run)
    turns.job(1, seed=1)
    assert turns.go() == [1, 2] and set(turns.collector.ended.values()) == {None}


def test_memory_out_for_one_alone_is_its_error(monkeypatch):
    turns = Turns()

    def parked_run(*arguments: Any) -> Run:
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(Counting, "parked_run", parked_run)
    turns.job(1)
    turns.go()
    assert isinstance(turns.collector.ended[1], torch.OutOfMemoryError)
