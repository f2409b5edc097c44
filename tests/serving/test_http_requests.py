"""What a request gets: its answers, or an error that says what is wrong."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import re

import pytest
import torch

import eqr_kernels.serving.http as package
from eqr_kernels.serving.http.schema import Defaults, Limits
from eqr_kernels.tasks import sudoku
from eqr_kernels.tasks.registry import SUDOKU
from eqr_kernels.tasks.task import turns_of
from eqr_kernels.trajectory import Status
from tests.support.http_server import BROKEN, PUZZLE, SOLUTION, Served, post, serving
from tests.support.serving import PATIENCE, until

LIMITS = Limits(body=4000, puzzles=4, depth=32, breadth=4, steps=64, seconds=20.0)


@pytest.fixture(scope="module")
def served():
    with serving(limits=LIMITS, defaults=Defaults(depth=16)) as it:
        yield it


# answers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"depth": 5, "breadth": 3, "seed": 7},
        {"depth": 9, "breadth": 2, "select": "q", "halt": "none"},
        {"tol": 0.3, "patience": 2, "noise_scale": 0.05},
        {"breadth": 2, "select": "first", "tol": "fast", "ids": [-(1 << 63), (1 << 63) - 1]},
        {"turn_every": 2, "seed": 7, "halt": "none", "depth": 6, "patience": 3},
        {"turn_every": None},
    ],
)
def test_answers_are_those_of_solve(served: Served, options):
    texts = [SOLUTION, PUZZLE]
    response = served.solve(*texts, **options)
    assert response.status_code == 200, response.text
    for place, (text, got) in enumerate(zip(texts, response.json()["results"], strict=True)):
        solved = {"depth": 16, "backend": "reference", **options}
        if "ids" in options:
            solved["ids"] = torch.tensor([options["ids"][place]])
        if "turn_every" in options and (every := solved.pop("turn_every")) is not None:
            solved["turns"] = turns_of(SUDOKU, every, options["seed"])
        tokens = torch.from_numpy(sudoku.encode(text).astype("int64"))[None]
        want = served.model.solve(tokens, **solved)
        restart = int(want.restart)
        assert got == {
            "prediction": sudoku.decode(want.preds[0].numpy()),
            "valid": bool(sudoku.is_solution(tokens.numpy(), want.preds.numpy())[0]),
            "status": Status(int(want.all_status[0, restart])).name.lower(),
            "converged": bool(want.converged),
            "steps": int(want.steps),
            "residual": want.residual.item(),
            "q_halt": want.q_halt.item(),
            "score": want.score.item(),
            "restart": restart,
            "nfe": int(want.nfe),
        }
    assert 0 <= response.json()["seconds"] < PATIENCE


def test_a_bad_row_has_an_error_of_its_own_and_its_neighbours_are_answered(served: Served):
    grid = "\n".join(PUZZLE[i : i + 9] for i in range(0, 81, 9))
    results = served.solve("abc", SOLUTION, BROKEN, grid).json()["results"]
    assert ["error" in entry for entry in results] == [True, False, True, False]
    assert "text has 3 cells; it needs 81" in results[0]["error"]["message"]
    assert results[0]["error"]["argument"] == "puzzles[0]"
    assert results[2]["error"]["message"] == "the givens break the rules: row 1 has the digit 5 more than once"
    assert results[1] == served.solve(SOLUTION).json()["results"][0]
    assert results[3] == served.solve(PUZZLE).json()["results"][0]


def test_an_error_of_the_server_has_the_same_form_and_it_goes_on(served: Served):
    bias = served.model.q_head.bias
    with torch.no_grad():
        before = bias.clone()
        bias.fill_(torch.inf)
    try:
        response = served.solve(SOLUTION)
    finally:
        with torch.no_grad():
            bias.copy_(before)
    assert response.status_code == 500
    assert response.headers["X-Request-ID"] in response.json()["error"]["message"]
    assert served.solve(SOLUTION).json()["results"][0]["valid"]


# refusals ------------------------------------------------------------------------------------------------------------

ONE = {"puzzles": [SOLUTION]}
REFUSED = [
    (b"", "the body is not JSON", None),
    (b"{", "the body is not JSON", None),
    (b"\xff\xfe", "the body is not JSON", None),
    (b"[" * 2000, "the body is", None),
    (b"[]", 'the body must be an object such as {"puzzles": [...]}, got [] (list)', None),
    ({}, "puzzles is missing", "puzzles"),
    ({"puzzles": SOLUTION}, "puzzles must be a valid list", "puzzles"),
    ({"puzzles": []}, "puzzles must hold at least 1, got 0", "puzzles"),
    ({"puzzles": ["."] * 5}, "puzzles must be at most 4 on this server, got 5", "puzzles"),
    ({"puzzles": [SOLUTION, 3]}, "puzzles[1] must be a valid string, got 3", "puzzles[1]"),
    ({"puzzles": ["abc"]}, "text has 3 cells; it needs 81", "puzzles[0]"),
    ({"puzzles": ["a", "b"]}, "none of the 2 puzzles can be read, the first because text has 1 cells", "puzzles[0]"),
    ({"puzzles": ["\ud800" * 81]}, "text has", "puzzles[0]"),
    ({"puzzles": [BROKEN]}, "the givens break the rules: row 1 has the digit 5 more than once", "puzzles[0]"),
    ({**ONE, "depht": 3}, "'depht' is no field of a request; did you mean depth?", "depht"),
    ({**ONE, "depth": 0}, "depth must be at least 1, got 0", "depth"),
    ({**ONE, "depth": 2.5}, "depth must be an int, got 2.5 (float)", "depth"),
    ({**ONE, "depth": True}, "depth must be an int, got True (bool)", "depth"),
    ({**ONE, "depth": 33}, "depth must be at most 32 on this server, got 33", "depth"),
    ({**ONE, "breadth": "2"}, "breadth must be an int, got '2' (str)", "breadth"),
    ({**ONE, "depth": 32, "breadth": 3}, "depth x breadth must be at most 64 on this server, got 32 x 3", "depth"),
    ({**ONE, "turn_every": 0}, "turn_every must be at least 1, got 0", "turn_every"),
    ({**ONE, "turn_every": 16}, "turn_every must be less than the depth, 16, or nothing turns, got 16", "turn_every"),
    ({**ONE, "turn_every": 2, "patience": 3}, "patience must be at most turns.every=2", "patience"),
    ({**ONE, "patience": 0}, "patience must be at least 1, got 0", "patience"),
    ({**ONE, "tol": -1}, "tol must be finite and not negative, got -1", "tol"),
    ({**ONE, "tol": "slow"}, 'tol must be "auto", "fast" or a number of at least 0, got \'slow\'', "tol"),
    (b'{"puzzles": ["x"], "tol": 1e999}', "tol must be finite and not negative, got inf", "tol"),
    (b'{"puzzles": ["x"], "noise_scale": NaN}', "noise_scale must be finite and not negative, got nan", "noise_scale"),
    ({**ONE, "select": "best"}, "select must be one of residual, vote, q, first, got 'best'", "select"),
    ({**ONE, "halt": 7}, "halt must be one of", "halt"),
    ({**ONE, "halt": "none", "select": "first"}, 'select="first" needs a halting rule, got halt="none"', "select"),
    ({**ONE, "seed": 1 << 32}, "seed must be in 0..2**32 - 1, got 4294967296", "seed"),
    ({**ONE, "ids": [1, 2]}, "ids must be one for each of the 1 puzzles, got 2", "ids"),
    ({**ONE, "ids": [1 << 63]}, "ids[0] must be below 9223372036854775808", "ids[0]"),
    ({**ONE, "deadline": 0}, "deadline must be above 0 seconds, got 0", "deadline"),
    ({**ONE, "deadline": 21}, "deadline must be at most 20.0 on this server, got 21", "deadline"),
    ({**ONE, "stream": "yes"}, "stream must be a valid boolean, got 'yes'", "stream"),
]


@pytest.mark.parametrize(("body", "message", "argument"), REFUSED, ids=[str(body)[:60] for body, _, _ in REFUSED])
def test_a_bad_request_is_told_what_is_wrong(served: Served, body, message, argument):
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = served.client.post("/v1/solve", content=sent, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"].startswith(message) and error.get("argument") == argument, error
    assert len(error["message"]) < 600


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status", "message"),
    [
        ("GET", "/v1/solve", {}, b"", 405, "/v1/solve takes POST, got GET"),
        ("POST", "/healthz", {}, b"", 405, "/healthz takes GET, got POST"),
        ("GET", "/../etc/passwd", {}, b"", 404, "there is no /etc/passwd; there are /, /v1/solve, "),
        ("GET", "/docs", {}, b"", 404, "there is no /docs"),
        ("POST", "/v1/solve/", {}, b"", 404, "there is no /v1/solve/"),
        (
            "POST",
            "/v1/solve",
            {"Content-Type": "text/plain"},
            b"{}",
            415,
            "the body must be application/json, got text",
        ),
        ("POST", "/v1/solve", {}, b"{}", 415, "the body must be application/json, got no Content-Type"),
        ("POST", "/v1/solve", {"Content-Type": "application/json"}, b" " * 4001, 413, "the body must be at most 4000"),
    ],
)
def test_other_refusals_have_the_same_form(served: Served, method, path, headers, body, status, message):
    response = served.client.request(method, path, headers=headers, content=body)
    assert response.status_code == status
    assert list(response.json()) == ["error"] and response.json()["error"]["message"].startswith(message)
    assert (response.headers.get("Allow") is not None) == (status == 405)


def test_a_body_that_does_not_say_its_size_is_cut_off_at_the_limit(served: Served):
    def endless():
        for _ in range(100):
            yield b" " * 1000

    response = served.client.post("/v1/solve", content=endless(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


# around it -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (None, 401),
        ("Bearer secret", 200),
        ("bearer secret", 200),
        ("Bearer secre", 401),
        ("Bearer secrett", 401),
        ("Basic secret", 401),
        ("Bearer \xe9", 401),
    ],
)
def test_a_token_guards_all_but_the_page_and_the_health(guarded: Served, given, status):
    headers = {} if given is None else {"Authorization": given.encode("latin-1")}
    for path, wanted in (("/v1/model", status), ("/metrics", status), ("/healthz", 200), ("/", 200)):
        assert guarded.client.get(path, headers=headers).status_code == wanted, path
    response = guarded.client.post("/v1/solve", json=ONE, headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.headers["WWW-Authenticate"] == "Bearer" and "token" in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def guarded():
    with serving(token="secret") as it:
        yield it


def test_the_model_tells_what_a_request_may_ask_for(served: Served):
    body = served.client.get("/v1/model").json()
    assert body["task"] == "sudoku" and body["name"] == "tiny" and body["config"]["hidden_size"] == 16
    assert body["limits"] == {"body": 4000, "puzzles": 4, "depth": 32, "breadth": 4, "steps": 64, "seconds": 20.0}
    assert body["defaults"]["depth"] == 16 and body["card"]["tol"] == 0.02
    assert body["tolerances"]["auto"] == {"value": 0.02, "caveat": None}
    assert body["backend"] == "reference" and body["backend_reason"]


def test_metrics_count_what_happened(guarded: Served):
    headers = {"Authorization": "Bearer secret"}

    def metrics() -> dict[str, float]:
        lines = guarded.client.get("/metrics", headers=headers).text.splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[:1] != "#")}

    before = metrics()
    guarded.client.post("/v1/solve", json={"puzzles": [SOLUTION, "abc"]}, headers=headers)
    guarded.client.post("/v1/solve", json=ONE)
    guarded.client.get("/nowhere")
    after = metrics()
    grown = {name: value - before.get(name, 0) for name, value in after.items()}
    for name in (
        'eqr_requests_total{path="/v1/solve",status="200"}',
        'eqr_requests_total{path="other",status="404"}',
        'eqr_rejected_total{reason="unauthorized"}',
        'eqr_puzzles_total{outcome="converged"}',
        'eqr_puzzles_total{outcome="unreadable"}',
        "eqr_engine_completed_total",
        'eqr_trajectory_steps_bucket{le="+Inf"}',
    ):
        assert grown[name] == 1, name
    assert grown['eqr_request_seconds_count{path="/v1/solve"}'] == 2 and grown["eqr_engine_steps_total"] >= 1
    assert {"eqr_engine_queued", "eqr_engine_in_flight", "eqr_engine_utilisation"} <= set(after)


@pytest.mark.parametrize(("sent", "kept"), [("abc-1.2", True), ("a" * 65, False), ("a b", False), (None, False)])
def test_each_request_has_an_id_and_a_line_in_the_log(served: Served, caplog, sent, kept):
    with caplog.at_level(logging.INFO, "eqr_kernels.serving.http"):
        headers = {} if sent is None else {"X-Request-ID": sent}
        response = served.client.post("/v1/solve", json=ONE, headers=headers)
        given = response.headers["X-Request-ID"]
        until(lambda: any(getattr(r, "fields", {}).get("request_id") == given for r in caplog.records))
    assert (given == sent) == kept and re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given)
    fields = next(r.fields for r in caplog.records if getattr(r, "fields", {}).get("request_id") == given)
    assert (fields["status"], fields["path"], fields["puzzles"], fields["answered"]) == (200, "/v1/solve", 1, 1)
    assert fields["ms"] > 0


def test_a_bad_first_line_hurts_nobody(served: Served):
    with served.raw(b"\x16\x03\x01 nonsense\r\n\r\n") as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    with served.raw(post(b"{}", "X: " + "y" * 100_000)) as connection:
        assert connection.recv(1000).startswith(b"HTTP/1.1 4")
    assert served.client.get("/healthz").json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("limits", "defaults", "message"),
    [
        (dict(depth=32), dict(depth=64), "depth is 64 by default, and a request may ask for 32 at most"),
        (dict(steps=100), dict(depth=64, breadth=2), "depth x breadth is 64 x 2 by default"),
        ({}, dict(select="best"), "select must be one of"),
        ({}, dict(tol=-1.0), "tol must be finite"),
        ({}, dict(halt="ever"), "halt must be one of"),
        ({}, dict(halt="none", select="first"), 'select is "first" by default, which needs a halting rule'),
        ({}, dict(turn_every=0), "turn_every must be at least 1"),
        ({}, dict(depth=8, turn_every=8), "turn_every is 8 by default and depth 8, so that nothing turns; lower it"),
    ],
)
def test_defaults_must_fit_the_limits(limits, defaults, message):
    with (
        pytest.raises(ValueError, match=re.escape(message)),
        serving(limits=Limits(**limits), defaults=Defaults(**defaults)),
    ):
        pass


def test_a_server_turns_by_default_where_a_request_is_deep_enough_and_does_not_refuse():
    with serving(limits=LIMITS, defaults=Defaults(depth=8, turn_every=4, halt="none")) as turning:
        tokens = torch.from_numpy(sudoku.encode(PUZZLE).astype("int64"))[None]
        facts = turning.client.get("/v1/model").json()["defaults"]
        assert (facts["turn_every"], facts["halt"]) == (4, "none")
        for options, turned in (({}, True), ({"turn_every": None}, False), ({"depth": 4}, False)):
            (got,) = turning.solve(PUZZLE, **options).json()["results"]
            turns = turns_of(SUDOKU, 4, 0) if turned else None
            depth = options.get("depth", 8)
            want = turning.model.solve(tokens, depth=depth, halt="none", backend="reference", turns=turns)
            assert got["residual"] == want.residual.item(), options


class Still(type(SUDOKU)):
    """A task that knows no symmetries."""

    views = None


def test_a_task_without_symmetries_says_so_where_turns_are_wanted():
    with serving(task=Still()) as still:
        response = still.solve(PUZZLE, turn_every=2)
        assert response.status_code == 400 and response.json()["error"]["argument"] == "turn_every"
        assert "turn_every must be null on this server: the sudoku task has no `views`" in response.text
        assert still.solve(PUZZLE).status_code == 200
    with (
        pytest.raises(ValueError, match="turn_every is 2 by default, and must be None here: the sudoku task has no"),
        serving(task=Still(), defaults=Defaults(turn_every=2)),
    ):
        pass


def test_without_the_extra_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"fastapi, uvicorn, prometheus_client: pip install 'eqr_kernels\[serve\]'"):
        importlib.reload(package)


class Peculiar(type(SUDOKU)):
    """A task of the user's own, whose reader raises what it likes."""

    def encode(self, text):
        if text == "boom":
            raise KeyError("boom")
        return super().encode(text)


def test_a_task_that_raises_anything_hurts_one_row_only():
    with serving(task=Peculiar()) as served:
        results = served.solve("boom", SOLUTION).json()["results"]
    assert results[0]["error"]["message"] == "cannot be read (KeyError('boom'))" and results[1]["valid"]
