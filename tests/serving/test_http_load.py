"""Streams, full queues, deadlines, and clients that leave; each wait is for what must come."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import Future

import pytest
import torch

from eqr_kernels.serving.http import solving
from eqr_kernels.serving.http.schema import Limits
from eqr_kernels.tasks import sudoku
from tests.support.http_server import PUZZLE, SOLUTION, Served, post, serving
from tests.support.serving import busy, until

TOKENS = torch.from_numpy(sudoku.encode(PUZZLE).astype("int64"))
LONG = {"puzzles": [PUZZLE], "depth": 1 << 20, "halt": "none", "deadline": 60}


@pytest.fixture
def served():
    """One request runs at a time, and two wait."""
    limits = Limits(depth=1 << 20, steps=1 << 20)
    with serving(limits=limits, engine_options={"max_in_flight": 1, "max_queued": 2}) as it:
        yield it


def lines_of(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_stream_has_a_line_for_each_outer_step_and_then_the_results(served: Served):
    fields = dict(breadth=2, depth=16, seed=3)
    response = served.solve(SOLUTION, "abc", **fields, stream=True)
    assert response.status_code == 200 and response.headers["Content-Type"] == "application/x-ndjson"
    *steps, last = lines_of(response.text)
    want = served.solve(SOLUTION, "abc", **fields).json()["results"]
    assert last["results"] == want and last["steps_left_out"] == 0
    for restart in range(2):
        mine = [step for step in steps if step["restart"] == restart]
        assert [step["step"] for step in mine] == list(range(1, len(mine) + 1))
        assert [step["settled"] for step in mine] == [False] * (len(mine) - 1) + [True]
        assert {step["puzzle"] for step in mine} == {0}
    chosen = [step for step in steps if step["restart"] == want[0]["restart"]][-1]
    assert {name: chosen[name] for name in ("prediction", "residual", "q_halt")} == {
        name: want[0][name] for name in ("prediction", "residual", "q_halt")
    }
    assert len(steps) == want[0]["nfe"]


def test_a_stream_shows_steps_while_it_runs(served: Served):
    with served.client.stream("POST", "/v1/solve", json={**LONG, "stream": True}) as response:
        lines = response.iter_lines()
        first = json.loads(next(lines))
        assert first["step"] == 1 and json.loads(next(lines))["step"] == 2
        assert served.engine.stats().requests == 1
    until(lambda: served.engine.stats().cancelled == 1)


def test_a_slow_reader_misses_the_oldest_steps_and_is_told(monkeypatch):
    monkeypatch.setattr(solving, "_STEPS_KEPT", 10)

    async def read_late() -> tuple[list[int], int]:
        steps = solving.Steps(asyncio.get_running_loop())
        for number in range(25):
            steps.put(0, number)  # type: ignore[arg-type]
        return [update for _, update in steps.take()], steps.left_out

    taken, left_out = asyncio.run(read_late())
    assert taken == list(range(left_out, 25)) and left_out >= 15


def test_a_full_queue_is_429_with_the_seconds_to_wait(served: Served):
    with busy(served.engine, TOKENS):
        waiting = [served.engine.submit(TOKENS, depth=1) for _ in range(2)]
        response = served.solve(PUZZLE)
        assert response.status_code == 429
        assert 1 <= int(response.headers["Retry-After"]) <= 120
        assert response.json()["error"]["message"].startswith("the queue is full")
        assert served.engine.stats().queued == 2
    for future in waiting:
        future.result(60)
    assert served.solve(PUZZLE, depth=1).status_code == 200


def test_a_request_that_fits_only_in_part_leaves_nothing_behind(served: Served):
    with busy(served.engine, TOKENS):
        waiting = served.engine.submit(TOKENS, depth=1)
        assert served.solve(PUZZLE, PUZZLE).status_code == 429
        assert served.engine.stats().queued == 1
    waiting.result(60)


def test_at_the_deadline_it_is_504_and_the_request_is_dropped(served: Served):
    with busy(served.engine, TOKENS):
        response = served.solve(PUZZLE, deadline=0.05)
        assert response.status_code == 504
        assert response.json()["error"] == {
            "message": "not answered within the deadline of 0.05 s; raise it or lower depth",
            "argument": "deadline",
        }
        until(lambda: served.engine.stats().queued == 0)
        last = lines_of(served.solve(PUZZLE, deadline=0.05, stream=True).text)[-1]
        assert last == response.json()


def test_what_was_answered_before_the_deadline_is_kept(served: Served, monkeypatch):
    """One puzzle in time, one never: the first has its answer, the second an error."""
    submit, late = served.engine.submit, []

    def some(tokens, **options):
        if not late:
            late.append(submit(tokens, **{**options, "depth": 1 << 20, "halt": "none"}))
            return late[0]
        answered: Future = Future()
        answered.set_result(served.model.solve(tokens[None], depth=1))
        return answered

    monkeypatch.setattr(served.engine, "submit", some)
    results = served.solve(PUZZLE, SOLUTION, depth=1, deadline=0.3).json()["results"]
    assert results[0]["error"]["argument"] == "deadline" and results[1]["steps"] == 1


@pytest.mark.parametrize("others", [0, 1])
def test_a_computation_that_fails_is_an_error_of_its_place(served: Served, monkeypatch, others):
    submit = served.engine.submit

    def poisoned(tokens, **options):
        if torch.equal(tokens, TOKENS):
            failed: Future = Future()
            failed.set_exception(RuntimeError("secret of the machine"))
            return failed
        return submit(tokens, **options)

    monkeypatch.setattr(served.engine, "submit", poisoned)
    response = served.solve(PUZZLE, *[SOLUTION] * others)
    assert response.status_code == (200 if others else 500)
    body = response.json()
    error = body["results"][0]["error"] if others else body["error"]
    assert "the computation failed" in error["message"] and response.headers["X-Request-ID"] in error["message"]
    assert "secret" not in response.text and (not others or body["results"][1]["valid"])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True], ids=["waiting", "running"])
def test_a_client_that_leaves_takes_its_requests_along(served: Served, stream, begun):
    body = json.dumps({**LONG, "stream": stream}).encode()
    if begun:
        with served.raw(post(body)):
            until(lambda: served.engine.stats().requests == 1)
        until(lambda: served.engine.stats().cancelled == 1)
        until(lambda: served.engine.stats().in_flight == 0)
        return
    with busy(served.engine, TOKENS):
        with served.raw(post(body)):
            until(lambda: served.engine.stats().queued == 1)
        until(lambda: served.engine.stats().queued == 0)
    until(lambda: served.engine.stats().cancelled == 2)


def test_half_a_body_and_a_hundred_idle_connections_hold_up_nobody(served: Served):
    idle = [served.raw(post(b'{"puzzles": [', "Expect-More: yes")[:-5]) for _ in range(100)]
    try:
        assert served.solve(SOLUTION).status_code == 200
    finally:
        for connection in idle:
            connection.close()
    assert served.engine.stats().requests == 0
    until(lambda: 'eqr_requests_total{path="/v1/solve",status="499"} 100.0' in served.client.get("/metrics").text)


def test_a_closed_engine_is_503(served: Served):
    served.engine.close()
    for response in (served.solve(SOLUTION), served.client.get("/healthz")):
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "the server is shutting down"
