"""Backends that compute a whole problem in one launch: requests that wait for the same rules share it."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest
import torch

from eqr_kernels import Engine, StepUpdate
from eqr_kernels.backends.cpu import CpuBackend
from eqr_kernels.serving import engine as engine_module
from eqr_kernels.serving.launching import LaunchingRunner
from tests.support.environment import needs_extension
from tests.support.serving import PATIENCE, assert_equal, until

pytestmark = needs_extension
RULES = dict(depth=8, tol=0.1)
POISON = 2
"""A launch with a puzzle of nothing but this fails."""
release = threading.Event()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The cpu backend as one that is launched; (puzzles, breadth) of each launch. The first waits for `release`."""
    monkeypatch.setattr(engine_module, "runner_class", lambda backend: LaunchingRunner)
    seen: list[tuple[int, int]] = []
    compute = CpuBackend.fixed_point

    def fixed_point(self, model, problem, recorder, proceed):
        seen.append((len(problem.tokens), problem.breadth))
        if len(seen) == 1:
            assert release.wait(PATIENCE)
        if (problem.tokens == POISON).all(1).any():
            raise ValueError("poisoned")
        compute(self, model, problem, recorder, proceed)

    monkeypatch.setattr(CpuBackend, "fixed_point", fixed_point)
    release.clear()
    return seen


def test_a_launch_takes_all_that_wait_for_the_same_rules(contractive, puzzles, launches):
    cases = [
        dict(),
        dict(breadth=3),
        dict(breadth=3, select="vote"),
        dict(trace=True, checkpoints=(1, 4)),
        dict(seed=1),
    ]
    release.set()
    want = {
        (i, c): contractive.solve(puzzles[i : i + 1], backend="cpu", return_state=c == 1, **RULES, **case)
        for i in range(4)
        for c, case in enumerate(cases)
    }
    launches.clear()
    release.clear()
    with Engine(contractive, backend="cpu", **RULES) as engine:
        first = engine.submit(puzzles[5])
        until(lambda: len(launches) == 1)
        futures = {(i, c): engine.submit(puzzles[i], return_state=c == 1, **cases[c]) for i, c in want}
        release.set()
        for key, future in futures.items():
            assert_equal(future.result(PATIENCE), want[key], str(key))
        assert first.result(PATIENCE).steps.tolist()
        assert engine.stats().steps == sum(int(r.nfe.sum()) for r in [*want.values(), first.result()])
    assert launches == [(1, 1), (4, 1), (4, 3), (4, 3), (4, 1), (4, 1)]


def test_max_in_flight_bounds_a_launch(contractive, puzzles, launches):
    with Engine(contractive, backend="cpu", max_in_flight=6, **RULES) as engine:
        engine.submit(puzzles[5])
        until(lambda: len(launches) == 1)
        futures = [engine.submit(puzzles[i], breadth=2) for i in range(5)] + [engine.submit(puzzles[0], breadth=9)]
        release.set()
        for future in futures:
            future.result(PATIENCE)
    assert launches == [(1, 1), (3, 2), (2, 2), (1, 9)]


def test_one_that_fails_or_is_cancelled_leaves_the_others_their_answers(contractive, puzzles, launches):
    poison = torch.full((6,), POISON)
    release.set()
    want = contractive.solve(puzzles[:3], backend="cpu", **RULES)
    launches.clear()
    release.clear()
    seen: list[StepUpdate] = []
    with Engine(contractive, backend="cpu", **RULES) as engine:
        running = engine.submit(puzzles[5])
        until(lambda: len(launches) == 1)
        futures = [engine.submit(puzzles[i], on_step=seen.append) for i in range(3)]
        bad, gone = engine.submit(poison), engine.submit(puzzles[4])
        assert gone.cancel() and running.cancel()
        release.set()
        for i, future in enumerate(futures):
            assert torch.equal(future.result(PATIENCE).preds[0], want.preds[i])
        with pytest.raises(ValueError, match="poisoned"):
            bad.result(PATIENCE)
        with pytest.raises(CancelledError):
            running.result(PATIENCE)
    assert launches == [(1, 1), (4, 1), (1, 1), (1, 1), (1, 1), (1, 1)]  # once together, then each by itself
    assert sorted(update.step for update in seen) == sorted(want.steps.tolist())
