"""The app on Ray Serve, on a cluster of two nodes on this machine: the answers of one engine, and a replica lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from eqr_kernels import EqRConfig, EquilibriumReasoner
from eqr_kernels.cli.serve_ray import replicas_of
from eqr_kernels.serving.http.schema import Limits
from eqr_kernels.serving.http.server import address_of, listening_socket
from tests.support.commands import TINY, eqr, make_copier
from tests.support.environment import needs_extension
from tests.support.http_server import BROKEN, PUZZLE, SOLUTION, serving
from tests.support.ray_cluster import SECONDS, time_limit, two_nodes

serve = pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install 'eqr_kernels[distributed]'")

from eqr_kernels.distributed import online  # noqa: E402

pytestmark = [pytest.mark.ray, pytest.mark.slow, needs_extension]
LONG = {"puzzles": [PUZZLE], "depth": 5_000, "halt": "none"}
"""In flight for seconds."""


@pytest.fixture(autouse=True)
def _time_limit() -> Iterator[None]:
    with time_limit("this test"):
        yield


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    pushing = dict.fromkeys(("REPLICA_AUTOSCALING_METRIC_PUSH", "HANDLE_AUTOSCALING_METRIC_PUSH"), "0.2")
    with two_nodes(**{f"RAY_SERVE_{name}_INTERVAL_S": value for name, value in pushing.items()}) as made:
        yield made


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_copier(tmp_path_factory.mktemp("model"), EqRConfig.sudoku_paper(**TINY, noise_scale=0.0), tol=0.02)


@pytest.fixture
def port() -> int:
    with listening_socket("127.0.0.1", 0) as listener:
        return int(address_of(listener).rpartition(":")[2])


def replicas() -> set[int]:
    """Processes of replicas below this one."""
    parents, collected = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica:eqr:"):
                collected.add(int(folder.name))
        except OSError:
            continue  # it has ended

    def mine(pid: int) -> bool:
        return pid == os.getpid() or (pid in parents and mine(parents[pid]))

    return {pid for pid in collected if mine(pid)}


def until(condition: Callable[[], bool]) -> None:
    """Waits for what processes do; to look is not cheap."""
    limit = time.monotonic() + SECONDS / 2
    while not condition():
        assert time.monotonic() < limit, "waited in vain"
        time.sleep(0.1)


def status(client: httpx.Client) -> int:
    try:
        return client.get("/healthz").status_code
    except httpx.TransportError:
        return 0


def results(response: httpx.Response) -> Any:
    assert response.status_code == 200, response.text
    return response.json()["results"]


ASKED: list[dict[str, Any]] = [
    {"puzzles": [SOLUTION]},
    {"puzzles": [PUZZLE, SOLUTION, BROKEN], "breadth": 3, "depth": 9},
    {"puzzles": [PUZZLE], "breadth": 4, "seed": 5, "noise_scale": 0.001, "select": "vote"},
]
REFUSED: list[dict[str, Any]] = [
    {"puzzles": ["abc"]},
    {"puzzles": [PUZZLE], "depth": 0},
    {"puzzles": [PUZZLE], "select": "best"},
    {"puzzles": [PUZZLE] * 5},
]
TOO_MUCH = {"puzzles": [PUZZLE] * 4, "depth": 1_000, "halt": "none"}
"""Of which a replica takes one: two puzzles run, and four wait at most."""
OF_LONG = ("--max-depth", 1 << 20, "--max-steps", 1 << 20)


def test_two_replicas_answer_as_one_engine_also_when_one_is_killed(cluster, model, port):
    """By the command, which answers what is in flight at its end."""
    limits = Limits(depth=1 << 20, steps=1 << 20, puzzles=4)
    alone = {"backend": "cpu", "max_in_flight": 2, "max_queued": 4}
    with serving(
        EquilibriumReasoner.from_pretrained(model), engine_options=alone, limits=limits, name=model.name
    ) as one:
        wanted = [results(one.client.post("/v1/solve", json=fields)) for fields in ASKED]
        wanted_long = results(one.client.post("/v1/solve", json=LONG))
        refusals = [one.client.post("/v1/solve", json=refused) for refused in REFUSED]
        body = one.client.get("/v1/model").json()
        with ThreadPoolExecutor(4) as pool:
            full = [pool.submit(one.client.post, "/v1/solve", json=TOO_MUCH) for _ in range(4)]
            too_many = next(f.result() for f in full if f.result().status_code == 429)

    def use(client: httpx.Client) -> None:
        until(lambda: status(client) == 200)
        for _ in range(2):
            assert [results(client.post("/v1/solve", json=fields)) for fields in ASKED] == wanted
        for refused, said in zip(REFUSED, refusals, strict=True):
            got = client.post("/v1/solve", json=refused)
            assert (got.status_code, got.json()) == (400, said.json()) == (said.status_code, said.json())
        assert client.get("/v1/model").json() == body
        (request_id,) = client.get("/healthz", headers={"x-request-id": "mine"}).headers.get_list("x-request-id")
        assert request_id == "mine"

        with ThreadPoolExecutor(12) as pool:
            both = [pool.submit(client.post, "/v1/solve", json=TOO_MUCH) for _ in range(8)]
            refused = [f.result() for f in both if f.result().status_code != 200]
        assert refused and {r.status_code for r in refused} == {429}
        assert refused[0].headers.keys() >= {"retry-after"} and too_many.headers.keys() >= {"retry-after"}
        assert {r.json()["error"]["message"].partition(";")[0] for r in refused} == {
            too_many.json()["error"]["message"].partition(";")[0]
        }

        before = replicas()
        with ThreadPoolExecutor(6) as pool:
            streams = []
            for _ in range(4):
                event = threading.Event()
                streams.append(pool.submit(streamed, client, LONG, event))
                assert event.wait(SECONDS)
            whole: list[Future[Any]] = [pool.submit(client.post, "/v1/solve", json=LONG) for _ in range(2)]
            os.kill(min(before), signal.SIGKILL)
            answered = [future.result() for future in streams]
            assert answered.count(None) in (1, 2, 3), "each replica had some"
            assert [each for each in answered if each is not None] == [wanted_long] * (4 - answered.count(None))
            for future in whole:
                response = future.result()
                if response.status_code != 200:
                    assert (response.status_code, response.text) == (
                        500,
                        "Internal Server Error",
                    )  # Ray's proxy says it
                else:
                    assert results(response) == wanted_long
        assert results(client.post("/v1/solve", json=ASKED[1])) == wanted[1]
        until(lambda: len(replicas() - before) == 1)
        assert [results(client.post("/v1/solve", json=fields)) for fields in ASKED] == wanted

        with ThreadPoolExecutor(1) as pool:
            event = threading.Event()
            last = pool.submit(streamed, client, LONG, event)
            assert event.wait(SECONDS)
            os.kill(os.getpid(), signal.SIGINT)
            assert last.result() == wanted_long

    failures: list[BaseException] = []

    def used() -> None:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client:
                use(client)
        except BaseException as error:
            failures.append(error)
            os.kill(os.getpid(), signal.SIGINT)

    using = threading.Thread(target=used)
    using.start()
    try:
        serving_on_ray = (
            "serve",
            model,
            "--engine",
            "ray",
            "--replicas",
            2,
            "--port",
            port,
            "--json",
            "--max-in-flight",
        )
        result = eqr(*serving_on_ray, 2, "--max-queued", 4, "--max-puzzles", 4, *OF_LONG, "--backend", "cpu")
    finally:
        using.join(SECONDS)
    assert not failures, failures
    assert f'"address": "http://127.0.0.1:{port}"' in result.stdout and "replicas: 2" in result.stdout
    until(lambda: not replicas())


def streamed(client: httpx.Client, fields: dict[str, Any], started: threading.Event) -> Any:
    """The results of a streamed request, or None where it broke off."""
    last: dict[str, Any] = {}
    try:
        with client.stream("POST", "/v1/solve", json={**fields, "stream": True}) as response:
            for line in response.iter_lines():
                started.set()
                last = httpx.Response(200, text=line).json()
    except httpx.TransportError:
        return None
    return last["results"]


def test_waiting_requests_ask_for_another_replica(cluster, model, port):
    soon = dict(target_ongoing_requests=1, upscale_delay_s=0.1, aggregation_function="max")
    app = online.application(
        EquilibriumReasoner.from_pretrained(model),
        replicas=(1, 2),
        autoscaling=soon,
        app={"limits": Limits(depth=1 << 20, steps=1 << 20)},
    )
    with (
        online.running(app, "127.0.0.1", port),
        httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=SECONDS) as client,
    ):
        with pytest.raises(RuntimeError, match="Ray Serve runs on this cluster already"), online.running(app, "", 1):
            pass
        wanted = threading.Event()

        def load() -> None:
            while not wanted.is_set():
                fields = {"puzzles": [PUZZLE] * 2, "depth": 1 << 20, "halt": "none", "deadline": 2}
                assert client.post("/v1/solve", json=fields).status_code == 504

        def running() -> int:
            (deployment,) = serve.status().applications[online.APP].deployments.values()
            return sum(deployment.replica_states.values())

        assert running() == 1
        with ThreadPoolExecutor(3) as pool:
            loads = [pool.submit(load) for _ in range(3)]
            try:
                until(lambda: running() == 2)
            finally:
                wanted.set()
        assert [each.result() for each in loads] == [None] * 3


@pytest.mark.parametrize(("text", "numbers"), [(None, (1, 7)), ("2", (2, 2)), ("1:4", (1, 4)), ("3:3", (3, 3))])
def test_replicas_are_read(text, numbers):
    assert replicas_of(text, 7) == numbers


@pytest.mark.parametrize("text", ["0", "2:1", "0:3", "a", "1:", ":2:3", "1:2:3", "-1"])
def test_replicas_that_are_none_are_named(text):
    with pytest.raises(ValueError, match="--replicas must be LEAST:MOST, as in 1:4, or a number of at least 1, got"):
        replicas_of(text, 7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--engine", "dask"), "--engine must be one of local, ray, got 'dask'"),
        (("--replicas", "2"), "--replicas is for --engine ray, and --engine is local; leave one out"),
        (("--engine", "ray", "--replicas", "2:1"), "--replicas must be LEAST:MOST"),
        (("--engine", "ray", "--port", "0"), "Ray Serve does not tell which port it took; name one"),
    ],
)
def test_wrong_options_are_named_before_anything_starts(options, message):
    assert message in " ".join(eqr("serve", *options, code=2).stderr.split())
