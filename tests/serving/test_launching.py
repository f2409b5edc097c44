"""Requests by a backend that computes in launches: Triton's kernel in its interpreter, states parked between them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from eqr_kernels import Engine, EquilibriumReasoner, SolveResult, Status, StepUpdate
from tests.support.models import make_contractive, tiny_config
from tests.support.serving import PATIENCE, assert_equal, until

IN_INTERPRETER = True
pytest_plugins = ["tests.support.triton_interpreter"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton: pip install triton"),
]

RULES: dict[str, Any] = dict(depth=6, tol=0.1, backend="triton")
POISON = 2
"""A launch with a puzzle of nothing but this fails."""


@pytest.fixture(scope="module")
def model() -> EquilibriumReasoner:
    return make_contractive(tiny_config(H_cycles=1, L_cycles=1, seq_len=6, hidden_size=16))


class Launches(list[tuple[int, int]]):
    """(trajectories, quantum) of each; those from `hold` on wait for `release`."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.release.set()

    def hold(self) -> None:
        self.clear()
        self.release.clear()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    from eqr_kernels.backends.triton.parked import TritonParkedRun

    seen = Launches()
    compute = TritonParkedRun.launch

    def launch(self, rows, quantum):
        seen.append((len(rows), quantum))
        assert seen.release.wait(PATIENCE)
        if (self._values["tokens"][[row // self._rules.breadth for row in rows]] == POISON).all(1).any():
            raise ValueError("poisoned")
        compute(self, rows, quantum)

    monkeypatch.setattr(TritonParkedRun, "launch", launch)
    yield seen
    seen.release.set()


CASES: tuple[dict[str, Any], ...] = (
    dict(),
    dict(breadth=3, select="vote", noise_scale=0.01),
    dict(breadth=2, trace=True, checkpoints=(1, 4), return_all=True),
    dict(halt="none", depth=5, window=2, seed=1),
)


def test_in_any_company_each_gets_the_bits_of_solve(model, puzzles):
    rows = {(i, c): puzzles[i : i + 1 + i] for i in range(2) for c in range(len(CASES) - i)}
    want = {(i, c): model.solve(tokens, **{**RULES, **CASES[c]}) for (i, c), tokens in rows.items()}
    with Engine(model, quantum=3, max_in_flight=16, **RULES) as engine:
        futures = {(i, c): engine.submit(tokens, **CASES[c]) for (i, c), tokens in rows.items()}
        for key, future in futures.items():
            assert_equal(_without_reason(future.result(PATIENCE)), _without_reason(want[key]), str(key))
        assert engine.stats().steps == sum(int(result.nfe.sum()) for result in want.values())


def test_who_takes_the_place_of_another_has_nothing_of_it(model, puzzles):
    options = dict(depth=8, trace=True, return_all=True)
    want = [_without_reason(model.solve(puzzles[i : i + 1], **{**RULES, **options})) for i in range(6)]
    ends = [int(result.steps) for result in want]
    *_, second, first = sorted(range(6), key=ends.__getitem__)
    short = ends.index(min(ends))
    assert min(ends[first], ends[second]) > ends[short]
    with Engine(model, max_in_flight=2, **{**RULES, **options}) as engine:
        futures = {i: engine.submit(puzzles[i]) for i in (first, second, short)}
        for i, future in futures.items():
            assert_equal(_without_reason(future.result(PATIENCE)), want[i], str(i))


def _without_reason(result: SolveResult) -> SolveResult:
    result.backend_reason = ""
    return result


def test_a_race_has_the_winner_of_solve(model, puzzles):
    options = dict(breadth=3, select="first", noise_scale=0.05)
    want = model.solve(puzzles[:1], **{**RULES, **options})
    with Engine(model, quantum=2, **RULES) as engine:
        got = engine.submit(puzzles[:1], **options).result(PATIENCE)
    for field in ("preds", "logits", "restart", "steps", "converged"):
        assert_equal(getattr(got, field), getattr(want, field), field)


@pytest.mark.parametrize("policy", ["least_service", "fifo"])
def test_a_newcomer_is_in_the_next_launch_and_overtakes_the_hard_ones(model, puzzles, launches, policy):
    ended = []
    with Engine(model, quantum=2, policy=policy, **RULES) as engine:
        launches.hold()
        hard = dict(depth=10, halt="none")
        futures = {"hard": engine.submit(puzzles[:2], **hard)}
        until(lambda: len(launches) == 1)
        futures |= {"easy": engine.submit(puzzles[2], depth=3), "late": engine.submit(puzzles[3], **hard)}
        for name, future in futures.items():
            future.add_done_callback(lambda _, name=name: ended.append(name))
        launches.release.set()
        until(lambda: len(ended) == 3)
    assert ended == {"least_service": ["easy", "hard", "late"], "fifo": ["hard", "easy", "late"]}[policy]
    assert launches[:2] == {"least_service": [(2, 2), (1, 2)], "fifo": [(2, 2), (3, 2)]}[policy]


def test_of_a_request_that_wants_steps_each_outer_step_is_told(model, puzzles, launches):
    rules = {**RULES, "depth": 8}
    want = model.solve(puzzles[:2], breadth=2, return_all=True, trace=True, **rules)
    seen: list[StepUpdate] = []
    with Engine(model, **rules) as engine:
        got = engine.submit(puzzles[:2], breadth=2, on_step=seen.append).result(PATIENCE)
    assert len(seen) == int(want.nfe.sum()) and {quantum for _, quantum in launches} == {1}
    for update in seen:
        assert update.residual == pytest.approx(float(want.residuals[update.puzzle, update.restart, update.step - 1]))
    last = {(u.puzzle, u.restart): u for u in seen if u.settled}
    assert len(last) == 4 and (want.all_status == Status.CONVERGED).all()
    for (puzzle, restart), update in last.items():
        assert torch.equal(update.preds, want.all_preds[puzzle, restart])
    assert torch.equal(got.preds, want.preds)


def test_max_in_flight_bounds_what_is_parked(model, puzzles, launches):
    with Engine(model, max_in_flight=6, depth=2, tol=0.1, backend="triton") as engine:
        launches.hold()
        futures = [engine.submit(puzzles[0], breadth=2)]
        until(lambda: len(launches) == 1)  # under way, before the others come
        futures += [engine.submit(puzzles[i], breadth=2) for i in range(1, 5)] + [engine.submit(puzzles[0], breadth=9)]
        stats = engine.stats()
        assert (stats.in_flight, stats.queued) == (2, 5)
        launches.release.set()
        for future in futures:
            future.result(PATIENCE)
        assert engine.stats().in_flight == 0
    # What has more by itself runs alone, as many at a time as the device computes side by side.
    assert [trajectories for trajectories, _ in launches] == [2, 6, 2, 8, 1]


def test_one_that_fails_or_is_cancelled_leaves_the_others_their_answers(model, puzzles, launches):
    want = model.solve(puzzles[:3], **RULES)
    poison = torch.full((6,), POISON)
    with Engine(model, max_in_flight=64, **RULES) as engine:
        launches.hold()
        running = engine.submit(puzzles[5])
        until(lambda: len(launches) == 1)
        futures = [engine.submit(puzzles[i]) for i in range(3)]
        bad, gone = engine.submit(poison), engine.submit(puzzles[4])
        assert gone.cancel() and running.cancel()
        launches.release.set()
        for i, future in enumerate(futures):
            assert torch.equal(future.result(PATIENCE).preds[0], want.preds[i])
        with pytest.raises(ValueError, match="poisoned"):
            bad.result(PATIENCE)
        with pytest.raises(CancelledError):
            running.result(PATIENCE)
        assert torch.equal(engine.submit(puzzles[1]).result(PATIENCE).preds[0], want.preds[1])
