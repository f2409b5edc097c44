"""`eqr serve` as a process: it says where it listens, and at a signal it answers what is in flight."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from eqr_kernels import EqRConfig
from tests.support.commands import TINY, eqr, make_copier
from tests.support.environment import REPOSITORY
from tests.support.http_server import PUZZLE, SOLUTION
from tests.support.serving import PATIENCE, until


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_copier(tmp_path_factory.mktemp("model"), EqRConfig.sudoku_paper(**TINY, noise_scale=0.0), tol=0.02)


@contextmanager
def process(model: Path, *options: object, **environment: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    command = [sys.executable, "-m", "eqr_kernels", "serve", str(model), "--port", "0", "--json", "--backend"]
    running = subprocess.Popen(
        [*command, "reference", "--max-depth", str(1 << 20), "--max-steps", str(1 << 20), *map(str, options)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stdout is not None
        text = ""
        while not text.rstrip().endswith("}"):
            line = running.stdout.readline()
            assert line, running.communicate(timeout=PATIENCE)[1]
            text += line
        announced = json.loads(text)
        assert (
            announced["command"] == "serve" and announced["pid"] == running.pid and announced["backend"] == "reference"
        )
        with httpx.Client(base_url=announced["address"], timeout=PATIENCE) as client:
            yield running, client
    finally:
        running.kill()
        running.wait()


def running_requests(client: httpx.Client) -> float:
    return float(client.get("/metrics").text.split("\neqr_engine_requests ")[1].split()[0])


@pytest.mark.slow
def test_at_sigterm_it_takes_no_more_and_answers_what_is_in_flight(model):
    with process(model, "--grace", 60, EQR_TOKEN="") as (running, client):
        request = {"puzzles": [PUZZLE], "depth": 60, "halt": "none", "stream": True}
        with client.stream("POST", "/v1/solve", json=request) as response:
            lines = response.iter_lines()
            next(lines)
            running.send_signal(signal.SIGTERM)
            *_, last = lines
        assert json.loads(last)["results"][0]["steps"] == 60
        with pytest.raises(httpx.ConnectError):
            httpx.get(client.base_url)
        _, log = running.communicate(timeout=PATIENCE)
        assert running.returncode == 0
    entries = [json.loads(line) for line in log.splitlines()]
    assert [(e["event"], e["status"], e["puzzles"]) for e in entries] == [("request", 200, 1)]


@pytest.mark.slow
def test_what_is_not_answered_in_time_is_cut_off_and_said(model):
    with process(model, "--grace", 0, "--token", "secret") as (running, client):
        client.headers["Authorization"] = "Bearer secret"
        request = {"puzzles": [PUZZLE], "depth": 1 << 20, "halt": "none"}
        body = json.dumps(request).encode()
        head = f"POST /v1/solve HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: {len(body)}\r\n"
        address = (client.base_url.host, client.base_url.port)
        with socket.create_connection(address, timeout=PATIENCE) as connection:
            connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            until(lambda: running_requests(client) == 1)
            assert client.post("/v1/solve", json={"puzzles": [SOLUTION]}).json()["results"][0]["valid"]
            running.send_signal(signal.SIGINT)
            _, log = running.communicate(timeout=PATIENCE)
        assert running.returncode == 1, log


@pytest.mark.parametrize(
    ("options", "warned"),
    [(["--host", "0.0.0.0"], True), (["--host", "0.0.0.0", "--token", "secret"], False), ([], False)],
)
def test_it_warns_where_others_can_reach_it_without_a_token(model, options, warned):
    result = eqr("serve", model, "--port", "0", *options, "--backend", "quantum", code=2)
    said = "can be reached from other machines, and no token is asked for; set EQR_TOKEN"
    assert (said in result.stderr) == warned


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "{taken}"], "cannot listen on 127.0.0.1:{taken}: Address already in use; choose another --port"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid:8080"),
        (["--depth", "2000"], "depth is 2000 by default, and a request may ask for 1024 at most"),
        (["--tol", "slow"], "--tol must be auto, fast or a positive number, got 'slow'"),
        (["--max-seconds", "0"], "the limit of seconds must be above 0"),
        (["--token", " "], "the token is empty"),
        (["--backend", "quantum"], "backend"),
    ],
)
def test_what_cannot_start_says_why(model, options, message):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        filled = [option.replace("{taken}", port) for option in options]
        if "--port" not in filled and "--host" not in filled:
            filled += ["--port", "0"]
        result = eqr("serve", model, *filled, code=2)
    assert message.replace("{taken}", port) in result.stderr
